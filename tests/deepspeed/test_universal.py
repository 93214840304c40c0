"""Universal checkpoints: another number of ranks, another ZeRO stage, and what is refused."""

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import arsg_dist.deepspeed
from arsg_dist.checkpoint import SavedRun
from arsg_dist.deepspeed.checkpoint.reader import UniversalCheckpoint, read_checkpoint
from arsg_dist.deepspeed.universal import convert, main
from arsg_dist.engine.state import travelling
from tests.checkpoint.test_commands import command
from tests.deepspeed.checkpoint_cases import Everything, Kept, kept_cases, transfers
from tests.deepspeed.jobs.common import weights_of
from tests.deepspeed.saved_checkpoints import converted, results_saved_by, resumed_on
from tests.support.compare import REDUCTION_ORDER, assert_same_weights
from tests.support.turns import parts

HALF_PRECISION_ROUNDINGS = 8  # as in the matrix

LAUNCHES: list[tuple[int, int, str, list[pytest.MarkDecorator]]] = [
    (2, 3, "core", []),
    (1, 2, "few", [pytest.mark.turn(2)]),
    # Of what test_checkpoints has saved in this turn.
    *((saved_on, ranks, part, marks) for part, marks in parts() for saved_on, ranks in ((2, 3), (3, 1))),
]
ALL = [
    pytest.param(
        saved_on,
        ranks,
        selection,
        source,
        target,
        id=f"{saved_on}to{ranks}ranks-{f'part{selection}-' if selection.isdecimal() else ''}{source}-to-{target}",
        marks=[pytest.mark.ranks, *marks],
    )
    for saved_on, ranks, selection, marks in LAUNCHES
    for source, target in transfers(selection)
]
everywhere = pytest.mark.parametrize(("saved_on", "ranks", "selection", "source", "target"), ALL)


def result_of(saved_on: int, ranks: int, selection: str) -> dict[str, Any]:
    job, results, _ = resumed_on(ranks, saved_on, selection)
    assert job.code == 0, job.output[-5000:]
    return results


@functools.cache
def started_from() -> dict[str, torch.Tensor]:
    return weights_of(Everything())


@everywhere
def test_resumed_elsewhere_it_ends_like_the_uninterrupted_run(
    saved_on: int, ranks: int, selection: str, source: Kept, target: Kept
) -> None:
    """Catches v̂, steps or a group's settings lost on the way: the last updates would be of another size."""
    before = results_saved_by(saved_on, selection)[str(source)]
    after = result_of(saved_on, ranks, selection)[f"{source} to {target}"]
    assert after["epoch"] == 7
    assert after["steps"] == 4
    half = {source.case.precision, target.case.precision} != {"fp32"}
    relative = HALF_PRECISION_ROUNDINGS * torch.finfo(source.case.dtype).eps if half else REDUCTION_ORDER
    for name in [name for name in before["end"] if name.startswith("frozen")]:
        assert torch.equal(after["end"].pop(name), before["end"].pop(name))
    start = {name: started_from()[name].to(source.case.dtype).float() for name in before["end"]}
    assert_same_weights(after["end"], before["end"], started_from=start, relative=relative)


@everywhere
def test_loaded_masters_are_the_saved_ones(
    saved_on: int, ranks: int, selection: str, source: Kept, target: Kept
) -> None:
    """Catches masters refreshed from half-precision copies, and fragments in the wrong place."""
    before = results_saved_by(saved_on, selection)[str(source)]["saved"]
    loaded = result_of(saved_on, ranks, selection)[f"{source} to {target}"]["loaded"]
    for name, master in before.items():
        assert torch.equal(loaded[name], master), name


@everywhere
def test_a_schedule_goes_on_where_it_was(
    saved_on: int, ranks: int, selection: str, source: Kept, target: Kept
) -> None:
    """Catches a warm-up that starts again, a boost made twice or forgotten, and settings of another group."""
    before = results_saved_by(saved_on, selection)[str(source)]
    after = result_of(saved_on, ranks, selection)[f"{source} to {target}"]
    assert (before["schedule"] is not None) == source.schedule
    assert after["schedule"] == before["schedule"]
    assert after["settings"][:3] == before["settings"][:3]  # the fourth group is frozen, if it is there


@everywhere
def test_saved_again_everything_has_the_same_bits(
    saved_on: int, ranks: int, selection: str, source: Kept, target: Kept
) -> None:
    """Catches any state, setting, buffer, frozen parameter or loss scale that does not come through: two engines of
    different layout wrote these checkpoints."""
    result_of(saved_on, ranks, selection)
    folder = converted(saved_on, selection)
    first = read_checkpoint(folder / str(source) / "universal")
    again = read_checkpoint(folder / f"again{ranks}" / f"{source} to {target}")
    same_precision = source.case.dtype == target.case.dtype
    # foreach, fused and capturable are the engine's own, and stage 0 in fp32 has a group of frozen parameters more.
    groups = [[travelling(group) for group in checkpoint.groups[:3]] for checkpoint in (first, again)]
    assert groups[0] == groups[1]
    assert first.group_of == again.group_of
    assert first.module.aliases == again.module.aliases
    if same_precision:
        scales = [checkpoint.loss_scale or {} for checkpoint in (first, again)]
        assert all(scales[0][key] == scales[1][key] for key in scales[0].keys() & scales[1].keys())
        assert (first.loss_scale is not None) == (source.case.precision == "fp16")
    for name in first.trained:
        assert first.entries(name) == again.entries(name) != set()
        assert torch.equal(first.master(name), again.master(name)), name
        for key in first.entries(name):
            some, other = first.state(name, key), again.state(name, key)
            if key == "step":
                assert some == other
            else:
                assert some.dtype == other.dtype
                assert torch.equal(some, other), f"{name} {key}"
    for some, other in (
        (first.module.buffers, again.module.buffers),
        (first.module.frozen, again.module.frozen),
    ):
        assert some.keys() == other.keys() != set()
        for name, tensor in some.items():
            assert torch.equal(tensor, other[name].to(tensor.dtype)), name


@pytest.mark.ranks
@pytest.mark.parametrize("config", list(kept_cases("core")), ids=str)
def test_converted_checkpoints_have_every_entry(config: Kept, tmp_path: Path) -> None:
    """Catches v̂, a step count or slow weights left out; and an export from the converted files that differs."""
    folder = converted(2, "core") / str(config)
    universal = UniversalCheckpoint(folder / "universal")
    first = next(iter(universal.trained))
    assert {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"} <= universal.entries(first)
    assert ("slow_param" in universal.entries(first)) == bool(config.extra)
    if config.case.groups == "several":
        assert universal.state("used.2.weight", "step") == 4 - config.case.overflow
        assert "max_exp_avg_sq" not in universal.entries("used.2.weight")
    for name, source in (("a", folder), ("b", folder / "universal")):
        arsg_dist.deepspeed.export(source, tmp_path / name, at="theta")
    assert command("convert", folder, tmp_path / "portable") == 0
    assert command("export", tmp_path / "portable", tmp_path / "c", "--at", "theta") == 0
    portable, exported = SavedRun(tmp_path / "portable"), load_file(tmp_path / "a")
    for other in (load_file(tmp_path / "b"), load_file(tmp_path / "c")):
        assert other.keys() == exported.keys()
        assert all(torch.equal(tensor, exported[name]) for name, tensor in other.items())
    assert portable.counters["global_steps"] == 4
    assert set(portable.trained) == set(universal.trained)
    for name in universal.trained:
        assert portable.entries(name) == universal.entries(name)
    assert (portable.loss_scale is not None) == (universal.loss_scale is not None)


@functools.cache
def refusals() -> dict[str, Any]:
    first, *others = result_of(2, 3, "core")["refusals"]
    for other in others:
        warned = {key for key in first if key.startswith("warned")}
        assert all(other[key] == [] for key in warned), "only rank 0 warns"
        assert {key: other[key] for key in first if key not in warned} == {
            key: first[key] for key in first if key not in warned
        }, "ranks disagree"
    return first


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (
            "lost, zero1",
            r"has lost \['max_exp_avg_sq'\].*python -m arsg_dist.deepspeed.universal.*restart_lost",
        ),
        ("lost, zero3", r"has lost \['max_exp_avg_sq'\]"),
        ("lost steps", r"has lost \['step'\]"),
        ("not converted, zero1", "is not converted: run 'python -m arsg_dist.deepspeed.universal"),
        ("not converted, zero3", "is not converted"),
        ("other ranks, zero1", "was written by 2 ranks and this job has 3.*universal"),
        ("other ranks, zero3", "was written by 2 ranks and this job has 3.*universal"),
        ("converted, zero1", "is a universal checkpoint: set .checkpoint.: {.load_universal.: true}"),
        ("converted, zero3", "is a universal checkpoint"),
        ("missing, zero1", "nowhere does not exist"),
        ("missing, zero3", "nowhere does not exist"),
        ("zero3 into zero1", "does not fit this engine"),
        ("zero1 into zero3", "does not fit this engine"),
        ("zero0 into zero1", "does not fit this engine"),
        ("zero1 into zero0", "does not fit this engine"),
        ("stateless, zero0", "after 1 updates and has no optimizer state.*load_module_only=True"),
        ("stateless, zero1", "after 1 updates and has no optimizer state"),
        ("stateless, zero3", "after 1 updates and has no optimizer state"),
        ("stateless, universal", "after 4 updates and has no optimizer state"),
        ("Adam's, zero0", "was not written by ARSG or RemoteObservation: its parameter groups have"),
        ("Adam's, zero1", "was not written by ARSG"),
        ("Adam's, zero3", "was not written by ARSG"),
        ("another shape", r"has 'unused.weight' in shape \(3, 7\), the model in \(4, 7\)"),
        ("another parameter", "has no parameter 'added"),
        ("another buffer", "has no buffer 'added'"),
        ("another group", "parameters of groups .* whose settings differ"),
    ],
)
def test_every_rank_refuses_with_the_reason(attempt: str, message: str) -> None:
    """Catches state silently lost or mixed up, an error on some ranks while the others wait, and riddles."""
    said = refusals()[attempt]
    assert said.startswith("ValueError: "), said
    with pytest.raises(ValueError, match=message):
        raise ValueError(said)


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 3])
def test_on_request_a_lost_maximum_restarts_at_v_and_rank_0_says_so(stage: int) -> None:
    """Catches a restart that is silent, or that leaves v̂ at zero."""
    said = refusals()
    assert len(said[f"warned, zero{stage}"]) == 1
    assert said[f"restarted at v, zero{stage}"] is True


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_without_state_loads_before_the_first_update_or_for_its_weights(stage: int) -> None:
    """Catches a refusal of a new run's checkpoint, and of the way out that the message names; and what was there before
    left in place."""
    assert refusals()[f"new, zero{stage}"] == ("accepted", [])
    assert refusals()[f"stateless, weights, zero{stage}"] == ("accepted", [])


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_weights_alone_may_come_from_another_optimizer(stage: int) -> None:
    """Catches a guard that is in the way of warm starts, and weights that stay as they were."""
    assert refusals()[f"Adam's weights, zero{stage}"] == ([], True)


def test_the_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, and an existing directory overwritten."""
    (tmp_path / "empty").mkdir()
    for source, target, message in [
        ("nowhere", "out", "does not exist"),
        ("empty", "out", "holds no DeepSpeed checkpoint"),
        ("empty", "empty", "exists already"),
    ]:
        assert main([str(tmp_path / source), str(tmp_path / target)]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.ranks
def test_an_incomplete_checkpoint_is_not_converted(tmp_path: Path) -> None:
    """Catches a rank's missing file taken for fewer ranks."""
    source = converted(2, "core") / "zero1-fp32"
    tag = (source / "latest").read_text()
    (tmp_path / "in").mkdir()
    for path in (source / tag).glob("*.pt"):
        if "rank_1_" not in path.name:
            shutil.copy(path, tmp_path / "in" / path.name)
    with pytest.raises(ValueError, match=r"incomplete.*2 ranks wrote it"):
        convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.ranks
def test_a_checkpoint_without_state_is_not_converted(tmp_path: Path) -> None:
    """Catches a universal checkpoint from which training would go on with m, v and v̂ at zero."""
    refusals()
    with pytest.raises(ValueError, match="has no optimizer state"):
        convert(converted(2, "core") / "stateless" / "zero1", tmp_path / "out")
