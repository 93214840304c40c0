"""The checkpoint format: what is written comes back, and what is damaged is named."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from arsg_dist.checkpoint import SavedRun
from arsg_dist.checkpoint.writer import write_manifest, write_part
from arsg_dist.engine import JobError
from arsg_dist.engine.replicated_state import replicated_state
from arsg_dist.engine.state import PARAMETER, TensorSpec, from_order, in_order, order_of
from tests.checkpoint.runs import engine, saved, saved_by


@pytest.mark.parametrize("world_size", [1, 3, 50])
def test_any_number_of_writers_makes_the_same_run(tmp_path: Path, world_size: int) -> None:
    """Catches elements lost or doubled where the parts of two ranks meet, and ranks with nothing to write."""
    source = engine()
    run = SavedRun(saved_by(tmp_path / "run", world_size, source))
    assert run.damage() == []
    assert len(run.manifest.shards) == world_size
    assert run.aliases == {"last.weight": "first.weight"}
    target = engine(seed=1)
    target.load_state(run)
    for name, tensor in source.module.state_dict().items():
        assert torch.equal(target.module.state_dict()[name], tensor), name
    for parameter, other in zip(target.module.parameters(), source.module.parameters(), strict=True):
        for entry, value in source.optimizer.state[other].items():
            loaded = target.optimizer.state[parameter][entry]
            assert torch.equal(loaded, value)
            assert loaded.untyped_storage().nbytes() == loaded.nbytes, "a view of the file"


def test_elements_are_read_in_any_order(tmp_path: Path) -> None:
    """Catches a channels_last parameter whose pieces are taken for rows, and its moments for the parameter itself."""
    source = engine()
    weight = source.module.get_parameter("conv.weight")
    order = order_of(weight.stride(), weight.shape)
    assert order == (0, 2, 3, 1)
    assert order_of(weight.contiguous().stride(), weight.shape) == ()
    assert torch.equal(from_order(in_order(weight, order), tuple(weight.shape), order), weight)
    run = SavedRun(saved_by(tmp_path / "run", 1, source))
    assert run.spec(PARAMETER, "conv.weight") == TensorSpec(torch.float32, (6, 4, 3, 3))
    part = run.read(PARAMETER, "conv.weight", 10, 33, order)
    assert torch.equal(part, in_order(weight, order)[10:43])
    moment = source.optimizer.state[weight]["exp_avg"]
    for entry, tensor in ((PARAMETER, weight.detach()), ("exp_avg", moment), (PARAMETER, weight.detach())):
        assert torch.equal(run.read(entry, "conv.weight", 10, 33), tensor.contiguous().view(-1)[10:43]), entry
        assert torch.equal(run.read(entry, "conv.weight", 10, 33, order), in_order(tensor, order)[10:43]), (
            entry
        )


def test_ranks_may_hold_any_part_of_a_tensor_and_of_the_numbers(tmp_path: Path) -> None:
    """Catches pieces joined in the order of the ranks, and step counts that only one of several ranks knows lost."""
    source = engine(preconditioner="adam")  # which counts steps
    states = [replicated_state("single", source.module, source.optimizer, rank, 3) for rank in (2, 0, 1)]
    names = list(states[0].numbers)
    assert len(names) > 3
    for rank, state in enumerate(states):
        state.numbers = {name: state.numbers[name] for name in names[rank::3]}
        write_part(tmp_path, rank, state)
    write_manifest(tmp_path, 3, states[0], {})
    target = engine(seed=1, preconditioner="adam")
    target.load_state(SavedRun(tmp_path))
    for parameter, other in zip(target.module.parameters(), source.module.parameters(), strict=True):
        assert torch.equal(parameter, other)
        assert target.optimizer.state[parameter]["step"] == source.optimizer.state[other]["step"]


@pytest.mark.parametrize(
    ("pieces", "place"), [([(0, 5), (0, 4)], 5), ([(0, 5), (6, 4)], 5), ([(1, 9)], 0), ([(0, 9), (9, 0)], 9)]
)
def test_pieces_that_do_not_make_the_tensor_are_refused(
    pieces: list[tuple[int, int]], place: int, tmp_path: Path
) -> None:
    """Catches pieces that overlap and are as many elements as the tensor's all the same, with a gap, or empty."""
    manifest = SavedRun(saved(tmp_path)).manifest
    held = manifest.tensors["parameter:first.weight"].pieces
    held[:] = [dataclasses.replace(held[0], start=start, numel=numel) for start, numel in pieces]
    with pytest.raises(ValueError, match=f"do not fit together at element {place}"):
        manifest.check()


def damage_of(path: Path) -> str:
    try:
        return "\n".join(SavedRun(path).damage())
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("what", ["flipped", "truncated", "grown", "missing", "mixed up", "pickle"])
def test_a_damaged_shard_is_named(what: str, tmp_path: Path) -> None:
    """Catches values of another run or of a broken disk that are trained on."""
    path = saved_by(tmp_path / "run", 2, engine())
    shard = path / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    if what == "flipped":
        content[-1] ^= 1
    elif what == "truncated":
        del content[-7:]
    elif what == "grown":
        content += b"x"
    elif what == "mixed up":
        content = bytearray((saved_by(tmp_path / "other", 2, engine(seed=1)) / shard.name).read_bytes())
    elif what == "pickle":
        content = bytearray(pickle.dumps(print))
    shard.write_bytes(content)
    if what == "missing":
        shard.unlink()
    said = damage_of(path)
    assert str(shard) in said
    assert "missing" in said if what == "missing" else "is damaged" in said
    with pytest.raises(JobError, match=shard.name):
        engine(seed=1).load_state(SavedRun(path))


def test_damage_in_the_second_piece_of_a_tensor_is_named(tmp_path: Path) -> None:
    """Catches a digest that is checked for the first piece of a tensor only."""
    path = saved_by(tmp_path / "run", 2, engine())
    cut = {key: t.pieces for key, t in SavedRun(path).manifest.tensors.items() if len(t.pieces) == 2}
    (key, (_, second)) = cut.popitem()
    shard = path / second.shard
    content = bytearray(shard.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    content[8 + length + header[f"{key}@{second.start}"]["data_offsets"][0]] ^= 1
    shard.write_bytes(content)
    assert f"{shard} is damaged, or of another checkpoint: the digest of {key!r}" in damage_of(path)
    with pytest.raises(JobError, match=f"the digest of '{key}' does not match"):
        engine(seed=1).load_state(SavedRun(path))


def test_every_flipped_bit_of_a_manifest_is_seen(tmp_path: Path) -> None:
    """Catches a step count or learning rate that changes unseen."""
    path = saved(tmp_path) / "manifest.json"
    good = path.read_bytes()
    unseen = 0
    for place in range(0, len(good), 97):
        bad = bytearray(good)
        bad[place] ^= 2
        path.write_bytes(bad)
        said = damage_of(path.parent)
        if said:
            assert str(path) in said
        else:
            unseen += 1
            assert good[place : place + 1].isspace(), place
    assert unseen < 5


def test_what_is_no_checkpoint_is_refused_with_a_way_out(tmp_path: Path) -> None:
    """Catches a traceback from json, and an old checkpoint that is taken for a broken new one."""
    with pytest.raises(ValueError, match="does not exist"):
        SavedRun(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"holds no checkpoint: manifest\.json is missing"):
        SavedRun(tmp_path)
    (tmp_path / "deepspeed").mkdir()
    with pytest.raises(ValueError, match=r"of an earlier version .* arsg-dist checkpoint convert"):
        SavedRun(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="no manifest of a checkpoint"):
        SavedRun(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "arsg_dist checkpoint", "version": 2}')
    with pytest.raises(ValueError, match="format version 2, and this arsg-dist reads version 1"):
        SavedRun(tmp_path)


def test_a_run_of_another_model_changes_nothing(tmp_path: Path) -> None:
    """Catches an engine that is half loaded when the message comes."""
    path = saved(tmp_path)
    other = engine(seed=1)
    other.module.norm = torch.nn.BatchNorm2d(6)
    other.module.register_parameter("added", torch.nn.Parameter(torch.zeros(2)))
    before = {name: tensor.clone() for name, tensor in other.module.state_dict().items()}
    with pytest.raises((JobError, ValueError), match=r"has no parameter 'added'|not the model's"):
        other.load_state(SavedRun(path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.module.state_dict().items())


def test_a_copied_directory_is_the_same_checkpoint(tmp_path: Path) -> None:
    """Catches absolute paths in the manifest."""
    shutil.copytree(saved(tmp_path), tmp_path / "copy")
    assert damage_of(tmp_path / "copy") == ""
