"""Every way to load a checkpoint, and what must be equal afterwards."""

import atexit
import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file

from arsg_dist.deepspeed import export, update_checks
from arsg_dist.deepspeed.checkpoint import load_check
from arsg_dist.deepspeed.universal import convert
from tests.deepspeed import load_cases
from tests.deepspeed.load_cases import Case, plain
from tests.deepspeed.test_one_rank import _one_rank  # noqa: F401
from tests.support.launchers import REPOSITORY, Finished, launch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With --full every cell, with --sample some of them, else enough, in three turns, for every pair of values."""
    if "case" not in metafunc.fixturenames:
        return
    selection = selection_of(metafunc.config)
    if selection != "few":
        metafunc.parametrize("case", load_cases.selected(selection), ids=str)
        return
    quick = load_cases.quick_cases()
    cases = [
        pytest.param(case, id=str(case), marks=[] if case in quick else [pytest.mark.turn(number % 3)])
        for number, case in enumerate(load_cases.few_cases())
    ]
    metafunc.parametrize("case", cases)


def selection_of(config: pytest.Config) -> str:
    if sample := config.getoption("--sample"):
        return ",".join(map(str, sample))
    return "every" if config.getoption("--full") else "few"


@functools.cache
def directory() -> Path:
    path = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def by_one_rank(case: Case) -> Path:
    path = directory() / "by one rank" / load_cases.source_name(case)
    return path if path.exists() else load_cases.save_source(case, path.parent)


@pytest.fixture
def by_two_ranks(pytestconfig: pytest.Config) -> Path:
    """The directory in which two ranks have saved checkpoints, and results of their own."""
    job = _on_ranks(selection_of(pytestconfig))
    assert job.code == 0, job.output[-5000:]
    return directory()


@functools.cache
def _on_ranks(cases: str) -> Finished:
    for case in load_cases.cases_on_ranks():
        if case.source == "other ranks":
            by_one_rank(case)
    return launch("warm deepspeed", 2, "tests/deepspeed/jobs/loads.py", directory(), cases, timeout=590)


def test_what_must_be_equal_is_equal_at_once_and_after_one_update(
    case: Case, request: pytest.FixtureRequest
) -> None:
    """Catches nothing loaded, another tag's weights, masters or slow weights of before, another lr, and a refusal that
    comes when part of the engine has changed."""
    if case.source == "other ranks":
        source = request.getfixturevalue("by_two_ranks") / "by several ranks" / load_cases.source_name(case)
    else:
        source = by_one_rank(case)
    assert load_cases.run(case, source) == []


@pytest.mark.ranks
@pytest.mark.parametrize("shared", load_cases.cases_on_ranks(), ids=str)
def test_it_is_on_every_rank_of_several(shared: Case, by_two_ranks: Path) -> None:
    """Catches pieces of another rank, and a refusal on one rank for which the others wait."""
    results = torch.load(by_two_ranks / "results.pt", weights_only=True)
    assert results[str(shared)] == [[], []]


def refused(engine: Any, where: Path, message: str, **options: Any) -> None:
    """With nothing changed."""
    before = load_cases.snapshot(engine)
    with pytest.raises(ValueError, match=message):
        engine.load_checkpoint(str(where), **options)
    assert load_cases.differences(before, load_cases.snapshot(engine)) == []


def masters(taken: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in taken.items() if key.startswith(("master", "buffer"))}


def saved(source: Path, tag: str) -> dict[str, Any]:
    return torch.load(source / "snapshots.pt", weights_only=True)[tag]


@pytest.mark.parametrize(
    ("there", "here", "stages"),
    [("fp16", "fp32", (3, 0)), ("fp32", "bf16", (0, 3)), ("bf16", "fp16", (2, 3)), ("fp32", "fp16", (3, 1))],
)
def test_weights_alone_come_from_every_stage_and_precision(
    there: str, here: str, stages: tuple[int, int]
) -> None:
    """Catches weights that are taken from copies instead of masters, and a file of this stage's name that is missing;
    the optimizer's state of another precision would be loaded with its loss scale."""
    source = by_one_rank(plain(stages[0], there, "frozen"))
    engine = load_cases.build(plain(stages[1], here, "frozen"), "target")
    refused(engine, source, "does not fit this engine", tag="older")
    engine.load_checkpoint(str(source), tag="older", load_module_only=True)
    after, expected = load_cases.snapshot(engine), saved(source, "older")
    assert load_cases.differences(masters(expected), masters(after)) == []
    dtype = load_cases.DTYPES[here]
    for name in [name for name in expected if name.startswith("weight")]:
        master = expected.get(name.replace("weight ", "master ", 1), expected[name])
        assert torch.equal(after[name], master.to(dtype)), name
    engine.destroy()


def test_the_state_of_another_precision_is_refused() -> None:
    """Catches an fp32 checkpoint at stage 1 in an fp16 engine: its loss scale would be 1 from then on."""
    source = by_one_rank(plain(1))
    engine = load_cases.build(plain(1, "fp16"), "target")
    refused(engine, source, "was saved in float32.*universal INPUT OUTPUT", tag="older")
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_parameters_in_another_order_are_not_loaded_by_their_places(stage: int) -> None:
    """Catches masters and moments of one parameter in another of the same size."""

    def engine(order: list[int], **sections: Any) -> Any:
        layers = [load_cases.Slope(4, slope, 1.0) for slope in (0.5, -1.0)]
        module = torch.nn.Sequential(*layers)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000},
            "optimizer": {"type": "ARSG", "params": load_cases.SETTINGS},
            **sections,
        }
        parameters = [layers[index].weight for index in order]
        return deepspeed.initialize(model=module, model_parameters=parameters, config=config)[0]

    first, where = engine([0, 1]), directory() / f"order {stage}"
    load_cases.train(first, 0)
    first.save_checkpoint(str(where), tag="one")
    other = engine([1, 0])
    refused(other, where, "another order.*group 0 has '0.weight'.*this engine has '1.weight'", tag="one")
    convert(where / "one", where / "universal")
    last = engine([1, 0], checkpoint={"load_universal": True})
    last.load_checkpoint(str(where))
    expected, after = load_cases.snapshot(first), load_cases.snapshot(last)
    assert all(
        torch.equal(after[f"{key} {i}.weight"], expected[f"{key} {i}.weight"])
        for key in ("master", "exp_avg")
        for i in (0, 1)
    )


def test_a_schedule_that_is_not_there_or_of_another_kind_is_refused_before_the_weights() -> None:
    """Catches a TypeError after the weights are loaded, and a schedule with another one's attributes."""
    source = by_one_rank(plain(1))
    warmup = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}}
    engine = load_cases.build(plain(1), "target", **warmup)
    refused(engine, source, "another kind of schedule.*load_lr_scheduler_states=False", tag="older")
    engine.load_checkpoint(str(source), tag="older", load_lr_scheduler_states=False)
    bare = load_cases.build(plain(1), "source", scheduler=None)
    bare.save_checkpoint(str(directory() / "bare"), tag="one")
    refused(engine, directory() / "bare", "no state of a learning rate schedule", tag="one")


def test_what_a_schedule_sets_comes_with_it() -> None:
    """Catches a boosted schedule in front of an unboosted μ, and one of DeepSpeed's whose lr begins again."""
    for kind, params, keys in (
        ("WarmupLR", {"warmup_num_steps": 6, "warmup_type": "linear"}, ["lr"]),
        ("ObservationBoost", {"milestones": [2], "factor": 1.5}, ["lr", "mu"]),
    ):
        section = {"scheduler": {"type": kind, "params": params}}
        source = load_cases.build(plain(2), "source", **section)
        load_cases.train(source, 0, 1, 2)
        source.save_checkpoint(str(directory() / kind), tag="one")
        expected = [[group[key] for key in keys] for group in source.basic_optimizer.param_groups]
        fresh = load_cases.build(plain(2), "source", **section)
        begun = [[group[key] for key in keys] for group in fresh.basic_optimizer.param_groups]
        assert expected != begun
        fresh.load_checkpoint(str(directory() / kind), load_lr_scheduler_states=False)
        assert [[group[key] for key in keys] for group in fresh.basic_optimizer.param_groups] == begun
        fresh.load_checkpoint(str(directory() / kind), load_optimizer_states=False)
        assert [[group[key] for key in keys] for group in fresh.basic_optimizer.param_groups] == expected


def test_a_directory_from_which_nothing_is_loaded_is_named() -> None:
    """Catches a run that starts again from the random weights without a word."""
    source = by_one_rank(plain(1))
    engine = load_cases.build(plain(1), "target")
    refused(engine, source / "older", "is a checkpoint itself: pass the directory above it, and tag='older'")
    incomplete = directory() / "incomplete"
    shutil.copytree(source / "older", incomplete / "older")
    before = load_cases.snapshot(engine)
    with pytest.warns(UserWarning, match="nothing is loaded.*no file latest.*There are older: pass tag"):
        assert engine.load_checkpoint(str(incomplete)) == (None, None)
    assert load_cases.differences(before, load_cases.snapshot(engine)) == []


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("tag='latest' is the name of DeepSpeed's own file", {"tag": "latest"}),
        ("tag='latest/a' is the name of DeepSpeed's own file", {"tag": "latest/a"}),
        ("tag='../a' leads out of the directory", {"tag": "../a"}),
        ("tag='/a' leads out of the directory", {"tag": "/a"}),
        ("tag='a ' would not be found", {"tag": "a "}),
        (r"client_state has \['arsg', 'lr_scheduler'\]", {"client_state": {"arsg": 1, "lr_scheduler": {}}}),
        (r"client_state has \['global_steps'\]", {"client_state": {"global_steps": 5}}),
    ],
)
def test_what_would_not_be_read_back_is_not_written(said: str, arguments: dict[str, Any]) -> None:
    """Catches a checkpoint that `latest` does not lead to, and a client's state in the place of the engine's, or lost
    at the load."""
    engine = load_cases.build(plain(0), "source")
    with pytest.raises(ValueError, match=said):
        engine.save_checkpoint(str(directory() / "refused"), **arguments)
    assert not (directory() / "refused").exists()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_what_a_load_returns_can_be_saved_with_the_next_checkpoint(stage: int) -> None:
    """Catches the optimizer's state (stage 0) and the counters of the load in the place of those of the save, for
    DeepSpeed hands them to the client; and a directory whose name is a pattern."""
    where = str(directory() / f"lr=[0.1] {stage}")
    engine = load_cases.build(plain(stage), "source")
    load_cases.train(engine, 0)
    engine.save_checkpoint(where, tag="a/1", client_state={"epoch": 1, "global_steps": 1})
    _, client_state = engine.load_checkpoint(where)
    assert client_state == {"epoch": 1}
    load_cases.train(engine, 1, 2)
    engine.save_checkpoint(where, tag="ä [2]", client_state=client_state)
    resumed = load_cases.build(plain(stage), "target")
    resumed.load_checkpoint(where)
    assert load_cases.differences(load_cases.snapshot(engine), load_cases.snapshot(resumed)) == []
    assert resumed.global_samples == engine.global_samples == 3
    resumed.load_checkpoint(where, tag="a/1", load_module_only=True)
    assert resumed.global_steps == 3


def test_a_converted_checkpoint_older_than_the_newest_is_named() -> None:
    """Catches a run with load_universal in its config that goes back to the same checkpoint at every start."""
    source = by_one_rank(plain(2))
    where = directory() / "converted"
    shutil.copytree(source, where)
    convert(where / "older", where / "universal")
    engine = load_cases.build(plain(1), "target", checkpoint={"load_universal": True})
    with pytest.warns(UserWarning, match="universal after 2 updates, and latest newest after 3"):
        engine.load_checkpoint(str(where))
    assert load_cases.differences(masters(saved(source, "older")), masters(load_cases.snapshot(engine))) == []


def test_weights_come_from_another_optimizers_universal_checkpoint() -> None:
    """Catches a message that names load_module_only as the way out, and is what that raises."""
    source = by_one_rank(plain(2))
    where = directory() / "foreign" / "universal"
    convert(source / "older", where)
    model = torch.load(where / "mp_rank_00_model_states.pt", weights_only=False)
    model["param_shapes"] = [
        {
            name: tuple(torch.load(where / "zero" / name / "fp32.pt")["param"].shape)
            for name in ("0.weight", "1.weight", "2.weight")
        }
    ]
    del model["arsg"]
    torch.save(model, where / "mp_rank_00_model_states.pt")
    torch.save(
        {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.9), "params": [0]}]},
        where / "zero" / "optimizer_state.pt",
    )
    engine = load_cases.build(plain(3), "target", checkpoint={"load_universal": True})
    refused(engine, where.parent, "was not written by ARSG.*load_module_only=True")
    engine.load_checkpoint(str(where.parent), load_module_only=True)
    assert load_cases.differences(masters(saved(source, "older")), masters(load_cases.snapshot(engine))) == []


def halved(src: dict[str, Any], dst: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in dst.named_parameters():
            parameter.copy_(src[name] / (1 if name == "1.weight" else 2))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_a_function_of_the_users_loads_the_module(stage: int, with_optimizer: bool) -> None:
    """Catches nothing loaded at stage 3, or the weights of `latest`; and masters, or slow weights, of before in bf16,
    from which the next update makes the weights again."""
    source = by_one_rank(plain(stage, "bf16"))
    engine = load_cases.build(plain(stage, "bf16"), "target")
    engine.load_checkpoint(
        str(source), tag="older", load_optimizer_states=with_optimizer, custom_load_fn=halved
    )
    loaded, written = load_cases.snapshot(engine), saved(source, "older")
    load_cases.train(engine, 3)
    after = load_cases.snapshot(engine)
    for name in ("0.weight", "1.weight", "2.weight"):
        wanted = written[f"weight {name}"] / (1 if name == "1.weight" else 2)
        assert torch.equal(loaded[f"weight {name}"], wanted), name
        master = loaded[f"master {name}"]
        assert torch.equal(master.to(torch.bfloat16), wanted), name
        assert (after[f"master {name}"] - master).abs().max() < 0.5, name
        slow = loaded[f"slow_param {name}"]
        assert slow is None or torch.equal(slow, master), name
    # Nothing was written there but what the masters round to.
    assert torch.equal(loaded["master 1.weight"], written["master 1.weight"]) == with_optimizer
    moments = loaded["exp_avg 0.weight"]
    assert (moments is not None and torch.equal(moments, written["exp_avg 0.weight"])) == with_optimizer


@pytest.mark.parametrize("stage", [1, 3])
def test_an_error_of_the_users_function_is_its_own(stage: int) -> None:
    """Catches a stage 3 engine that is left with whole parameters, and another error in the place of the first."""
    source = by_one_rank(plain(stage, "bf16"))
    engine = load_cases.build(plain(stage, "bf16"), "target")

    def broken(src: dict[str, Any], dst: torch.nn.Module) -> None:
        raise LookupError(f"no head in {sorted(src)[0]}")

    with pytest.raises(LookupError, match=r"no head in 0\.seen"):
        engine.load_checkpoint(str(source), tag="older", custom_load_fn=broken)
    engine.load_checkpoint(str(source), tag="older")
    assert load_cases.differences(saved(source, "older"), load_cases.snapshot(engine)) == []


@pytest.mark.parametrize("kind", ["parameter", "frozen one", "buffer"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_one_side_lacks_is_named_or_left_as_it_is(stage: int, kind: str) -> None:
    """Catches a name that is passed over with load_module_strict=True, a value of another parameter with False, an
    error halfway, and a message whose remedy leads into the next one."""
    cases = [plain(stage, "bf16"), plain(stage, "bf16", f"and a {kind}")]
    for there, here in (cases, reversed(cases)):
        source, engine = by_one_rank(there), load_cases.build(here, "target")
        for options in ({"load_optimizer_states": False}, {"load_module_only": True}, {}):
            refused(engine, source, "load_module_strict=False", tag="older", **options)
        own, written = load_cases.snapshot(engine), saved(source, "older")
        resumed: dict[str, Any] = {}
        if kind == "parameter":
            refused(engine, source, "load the weights alone", tag="older", load_module_strict=False)
            resumed["load_optimizer_states"] = False
        engine.load_checkpoint(str(source), tag="older", load_module_strict=False, **resumed)
        expected = {
            key: written.get(key, value)
            for key, value in own.items()
            if key.startswith(("weight", "master", "buffer"))
        }
        after = load_cases.snapshot(engine)
        assert load_cases.differences(expected, {key: after[key] for key in expected}) == []
        load_cases.train(engine, 3)
        moved = load_cases.snapshot(engine)
        for key in expected:
            if key.startswith("master"):
                assert 0 < (moved[key] - expected[key]).abs().max() < 1, key
        engine.destroy()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_that_was_written_in_part_is_refused(stage: int, tmp_path: Path) -> None:
    """Catches a load that has changed the engine when it finds the file of a save that was killed, and one that
    passes over a file that is not there."""
    source = by_one_rank(plain(stage, "bf16"))
    engine = load_cases.build(plain(stage, "bf16"), "target")
    for file in sorted(path.name for path in (source / "older").glob("*.pt")):
        for length in (None, 0, 0.5, -1):
            shutil.copytree(source / "older", tmp_path / "older", dirs_exist_ok=True)
            path = tmp_path / "older" / file
            content = path.read_bytes()
            if length is None:
                path.unlink()
            else:
                path.write_bytes(content[: int(length * len(content)) if length >= 0 else length])
            refused(engine, tmp_path, str(tmp_path / "older"), tag="older")
    (tmp_path / "latest").write_text("newest")
    refused(engine, tmp_path, "newest does not exist")
    (tmp_path / "newest").mkdir()
    refused(engine, tmp_path, "newest holds no DeepSpeed checkpoint")


@pytest.mark.parametrize("stage", [1, 3])
def test_files_of_two_saves_under_one_tag_are_refused(stage: int, tmp_path: Path) -> None:
    """Catches the weights of one save with the masters and moments of another, after one that was killed."""
    case = plain(stage, "bf16")
    engine = load_cases.build(case, "source")
    load_cases.train(engine, 0)
    engine.save_checkpoint(str(tmp_path), tag="last")
    (shard,) = (tmp_path / "last").glob("*_optim_states.pt")
    before = shard.read_bytes()
    load_cases.train(engine, 1)
    engine.save_checkpoint(str(tmp_path), tag="last")
    newer = load_cases.snapshot(engine)
    shard.write_bytes(before)
    said = "two saves, after 1 and 2 updates.*tag of its own"
    other = load_cases.build(case, "target")
    for options in ({}, {"load_module_only": True}):
        refused(other, tmp_path, said, **options)
    for read in (
        lambda: export(tmp_path, tmp_path / "x.safetensors"),
        lambda: convert(tmp_path / "last", tmp_path / "universal"),
    ):
        with pytest.raises(ValueError, match=said):
            read()
    engine.save_checkpoint(str(tmp_path), tag="last")
    other.load_checkpoint(str(tmp_path))
    assert load_cases.differences(newer, load_cases.snapshot(other)) == []


def test_masters_of_another_optimizer_are_found_where_they_have_no_names(tmp_path: Path) -> None:
    """Catches weights rounded to half precision, or of another parameter, from what FusedAdam writes at stage 0: a
    group in one tensor."""
    case = dataclasses.replace(plain(0, "bf16", "tied"), source="Adam")
    source = by_one_rank(case)
    shutil.copytree(source / "older", tmp_path / "older")
    file = tmp_path / "older" / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    if content["optimizer"] is None:
        pytest.skip(f"DeepSpeed {deepspeed.__version__} saves no masters there")
    groups = content["optimizer"].pop("fp32_groups")
    # Of the first group the last parameter first, as other programs may order them; one that is not the module's.
    flat = [torch.cat([master.detach().flatten() for master in reversed(group)]) for group in groups]
    content["optimizer"]["fp32_groups_flat"] = [*flat, torch.full((3,), 1e6)]
    torch.save(content, file)
    engine = load_cases.build(case, "target")
    engine.load_checkpoint(str(tmp_path), tag="older", load_module_only=True)
    found, written = masters(load_cases.snapshot(engine)), masters(saved(source, "older"))
    assert load_cases.differences(written, found) == []
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in written.values())


def test_the_loss_scale_that_bf16_once_had_is_left_behind(tmp_path: Path) -> None:
    """Catches gradients divided by 65536: until 0.18.4 DeepSpeed scales losses in bf16 too, and saves that scale."""
    case = plain(0, "bf16")
    source = tmp_path / "source"
    shutil.copytree(by_one_rank(case), source)
    file = source / "older" / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    content["optimizer"] |= {
        "dynamic_loss_scale": True,
        "cur_scale": 65536,
        "last_overflow_iter": -1,
        "scale_factor": 2.0,
        "scale_window": 1000,
    }
    torch.save(content, file)
    assert load_cases.run(case, source) == []


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("pin_memory", [False, True])
def test_training_goes_on_after_states_were_offloaded(stage: int, pin_memory: bool) -> None:
    """Catches v̂ left behind, masters or moments of before, and a checkpoint saved meanwhile."""
    if pin_memory and stage < 3 and Version(deepspeed.__version__) < Version("0.19.6"):
        pytest.skip("DeepSpeed asks torch to pin memory there, which needs an accelerator")
    straight, other = (load_cases.build(plain(stage, "bf16"), "source") for _ in range(2))
    load_cases.train(straight, 0, 1, 2)
    load_cases.train(other, 0, 1)
    other.offload_states(pin_memory=pin_memory)
    with pytest.raises(ValueError, match=r"call engine\.reload_states"):
        other.save_checkpoint(str(directory() / "offloaded"))
    with pytest.raises(ValueError, match=r"call engine\.reload_states"):
        other.load_checkpoint(str(directory() / "offloaded"))
    other.reload_states()
    load_cases.train(other, 2)
    assert load_cases.differences(load_cases.snapshot(straight), load_cases.snapshot(other)) == []


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_gradient_of_an_update_that_was_not_made_is_gone(stage: int) -> None:
    """Catches a run that goes back to its last checkpoint after a bad loss, and takes that into its next update."""
    case = plain(stage)
    source = by_one_rank(case)
    engine = load_cases.build(case, "target")
    load_cases.train(engine, 0)
    expected = load_cases.expected_after(case, load_cases.snapshot(engine), saved(source, "older"))
    engine.backward(engine(torch.tensor([1000.0, 0.0]))[1])
    engine.load_checkpoint(str(source), tag="older")
    assert load_cases.after_one_update(engine, case, expected) == []


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_going_back_to_before_the_first_update_begins_again(stage: int) -> None:
    """Catches moments of the run that is left, which the checkpoint has nothing to put in the place of."""
    engine = load_cases.build(plain(stage), "source")
    engine.save_checkpoint(str(directory() / f"begun {stage}"), tag="one")
    begun = load_cases.snapshot(engine)
    load_cases.train(engine, 0, 1)
    once = load_cases.snapshot(engine)
    engine.load_checkpoint(str(directory() / f"begun {stage}"))
    assert load_cases.differences(begun, load_cases.snapshot(engine)) == []
    load_cases.train(engine, 0, 1)
    assert load_cases.differences(once, load_cases.snapshot(engine)) == []


@pytest.mark.parametrize(
    ("precision", "model"), [("fp32", "frozen"), ("bf16", "plain"), ("fp16", "tied"), ("fp32", "moe")]
)
def test_what_older_deepspeeds_leave_out_at_stage_0_is_loaded(
    precision: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a resume with DeepSpeed before 0.19.3 that begins the optimizer anew (bf16, whose state it saves as a
    shard), or asks the wrong file for that of experts."""
    monkeypatch.setattr(load_check, "resumes_stage_0", lambda: False)
    case = plain(0, precision, model)
    source = by_one_rank(case)
    if precision == "bf16":
        source = shutil.copytree(source, directory() / "as a shard")
        file = source / "older" / "mp_rank_00_model_states.pt"
        content = torch.load(file, weights_only=False)
        if content["optimizer"] is not None:
            shard = {"optimizer_state_dict": content.pop("optimizer")}
            torch.save(shard, file.with_name("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"))
            torch.save({**content, "optimizer": None}, file)
    assert load_cases.run(case, source) == []
    assert load_cases.run(dataclasses.replace(case, stepped=True), source) == []


@pytest.mark.parametrize("stage", [0, 2])
def test_a_mixture_of_experts_is_exported_whole(stage: int) -> None:
    """Catches experts left out, or rounded: the files of their own have the weights as they were computed with."""
    source = by_one_rank(plain(stage, "bf16", "moe"))
    engine = load_cases.build(plain(stage, "bf16", "moe"), "target")
    engine.load_checkpoint(str(source), tag="older")
    for exported in (source / "older", engine):
        path = directory() / "experts.safetensors"
        export(exported, path)
        tensors = load_file(path)
        assert tensors.keys() == engine.module.state_dict().keys()
        for name, master in masters(saved(source, "older")).items():
            assert torch.equal(tensors[name.removeprefix("master ")], master), name


def test_pipelines_that_cannot_resume_are_refused_before_they_train() -> None:
    """Catches a KeyError at the first resume, after days; the others are told what else will not work."""
    with pytest.raises(ValueError, match=r"cannot resume a pipeline in bf16 at ZeRO stage 0.*stage.: 1"):
        load_cases.build(plain(0, "bf16", "pipeline"), "source")
    engine = load_cases.build(plain(1, "bf16", "pipeline"), "source")
    assert any("base_iterate, universal checkpoints" in said for said in engine.warned)


def test_pipelines_train_with_an_older_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pipeline's gradients, which are reduced apart from the backward passes, taken for discarded ones."""
    after = []
    for older in (False, True):
        monkeypatch.setattr(update_checks, "fails_over_further_passes", lambda _, older=older: older)
        engine = load_cases.build(plain(1, "fp32", "pipeline"), "source")
        load_cases.train(engine, 0, 1)
        after.append(load_cases.weights(load_cases.snapshot(engine)))
    assert load_cases.differences(*after) == []


def test_loading_inside_an_update_is_refused() -> None:
    """Catches the gradients of its first micro-batches in the first update after the load."""
    source = by_one_rank(plain(1))
    engine = load_cases.build(plain(1), "target", gradient_accumulation_steps=2)
    load_cases.train(engine, 0)
    refused(engine, source, "after 1 of 2 micro-batches", tag="older")


@pytest.mark.ranks
def test_what_one_rank_finds_every_rank_says(by_two_ranks: Path) -> None:
    """Catches ranks that load different checkpoints, and ranks that wait for one that raised."""
    first, second = torch.load(by_two_ranks / "results.pt", weights_only=True)["refusals"]
    assert first == second
    assert first[0].startswith("ValueError: rank 0 would load the checkpoint 'older' and rank 1 'newest'")
    assert first[1].endswith("this file is damaged (not on every rank)")
    assert first[2] == "[]"


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [0, 2])
def test_experts_spread_over_ranks_come_back_and_what_they_cannot_is_said_first(
    stage: int, by_two_ranks: Path
) -> None:
    """Catches another rank's expert, masters of before, a part of a model exported as the whole, and a silence until
    the end of the training."""
    results = torch.load(by_two_ranks / "results.pt", weights_only=True)
    if f"spread {stage}" not in results:
        pytest.skip(f"refused at the save with DeepSpeed {deepspeed.__version__}")
    for rank, found in enumerate(results[f"spread {stage}"]):
        assert found["different before"]
        assert (found["loaded"], found["at the end"], found["weights"]) == ([], [], [])
        assert 0 < found["moved"] < 2
        assert len(found["refused"]) == 3
        assert all(
            said.startswith("ValueError: ") and "spread over ranks" in said for said in found["refused"]
        )
        named = [said for said in found["warned"] if "export and base_iterate" in said]
        assert len(named) == (rank == 0)


def test_the_documents_have_the_table() -> None:
    """Catches a rule of the tests that users do not know of, and one that no test holds to."""
    page = (REPOSITORY / "docs" / "deepspeed-checkpoints.md").read_text()
    table = page.partition("| load | what holds |\n|---|---|\n")[2].partition("\n\n")[0].splitlines()
    assert table == [f"| {rule.cell} | {rule.then} |" for rule in load_cases.RULES]
