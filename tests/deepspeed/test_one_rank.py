"""DeepSpeed engines of a single rank, in this process: each is made, trained and compared in a moment.

What needs several ranks is in the matrices; this is for what a number worked out by hand can show on one.
"""

import importlib
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from safetensors.torch import load_file
from torch import Tensor, nn

from arsg_dist import ARSG, ObservationBoost, RemoteObservation, theory
from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.deepspeed import DeepSpeedEngine, base_iterate, export, restart_lost_maximum
from arsg_dist.deepspeed.checkpoint.engine_state import dynamic_scaler
from arsg_dist.deepspeed.checkpoint.partitioning import Piece, pieces_of_each, pieces_of_range
from arsg_dist.deepspeed.checkpoint.reader import read_checkpoint
from arsg_dist.deepspeed.config.rules import check_nvme
from arsg_dist.deepspeed.config.schedules import build_scheduler
from arsg_dist.deepspeed.universal import convert
from arsg_dist.engine import JobError, SingleProcessCommunicator, SingleProcessEngine
from arsg_dist.imagenet.models import weighted_logits
from arsg_dist.optim.kernels.eight_bit import EightBit
from arsg_dist.optim.state import MOMENTS
from tests.deepspeed.one_rank import one_rank

SETTINGS = {"lr": 0.1, "betas": [0.9, 0.5], "mu": 0.5, "eps": 1e-4}
STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    """A job of one rank, for the tests of this file."""
    with one_rank():
        yield


class Slopes(nn.Module):
    """Three parameters whose gradients are the inputs; one that is not asked for gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.first, self.last = (nn.Parameter(torch.ones(size)) for size in (3, 5, 2))

    def forward(self, first: float, last: float) -> Tensor:
        return first * self.first.sum() + last * self.last.sum()


def groups(module: Slopes) -> list[dict[str, Any]]:
    """The first group begins with a parameter without gradient; the second one has settings of its own."""
    return [
        {"params": [module.unused, module.first]},
        {"params": [module.last], "lr": 0.5, "betas": (0.5, 0.5)},
    ]


def sharded(stage: int, module: nn.Module | None = None, **config: Any) -> DeepSpeedEngine:
    module = module or Slopes()
    complete = {
        "train_batch_size": 1,
        "gradient_clipping": 0.0,
        # Stage 3 takes memory for a whole bucket at once; ours stays with the process, which must fork after it.
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000},
        "optimizer": {"type": "ARSG", "params": SETTINGS},
        **config,
    }
    parts = groups(module) if isinstance(module, Slopes) else None
    return DeepSpeedEngine(module, complete, SingleProcessCommunicator(), parameter_groups=parts)


def alone() -> SingleProcessEngine:
    module = Slopes()
    return SingleProcessEngine(module, ARSG(groups(module), **SETTINGS))  # type: ignore[arg-type]


def go(engine: Any, *inputs: tuple[float, float]) -> None:
    for values in inputs:
        engine.backward(engine.module(*values))
        engine.step()


def weights(engine: Any) -> list[float]:
    """One element of each parameter; all of its elements are alike."""
    module = getattr(engine.module, "module", engine.module)
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        values = [parameter.detach().flatten() for parameter in module.parameters()]
        assert all(bool((value == value[0]).all()) for value in values)
        return [value[0].item() for value in values]


def saved(engine: Any, directory: Path, kind: type[SavedRun] = SavedRun) -> SavedRun:
    store = CheckpointStore(directory, engine.communicator)
    return kind(save_run(store, 1, engine.state(), {}, engine.communicator))


def by_hand(*gradients: float, lr: float, beta1: float, restart_after: int = 0) -> tuple[float, float]:
    """x after updates with these gradients from 1, and its base iterate."""
    x, m, v, v_hat = 1.0, 0.0, 0.0, SETTINGS["eps"]
    assert isinstance(v_hat, float)
    for update, gradient in enumerate(gradients):
        if restart_after and update == restart_after:
            v_hat = v
        m = beta1 * m + (1 - beta1) * gradient
        v = 0.5 * v + 0.5 * gradient**2
        v_hat = max(v_hat, v)
        x -= lr * (0.5 * m + 0.5 * gradient) / v_hat**0.5
    return x, x + lr * 0.5 * beta1 / (1 - beta1) * m / v_hat**0.5


@pytest.mark.parametrize("stage", STAGES)
def test_a_dynamic_loss_scale_grows_and_falls(stage: int) -> None:
    """Catches a scale that never grows, and one that a growth long past is written over again after an overflow."""
    fp16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 1}
    engine = sharded(stage, fp16=fp16)
    scales = []
    for value in (1.0, 1.0, 1.0, 1.0, float("inf"), 1.0, 1.0, 1.0):
        go(engine, (value, 1.0))
        scales.append(dynamic_scaler(engine.engine.optimizer).cur_scale)
    assert scales[:3] == [16, 16, 32], scales
    assert scales[4] == scales[3] / 2, scales
    assert scales[7] == scales[4] * 2, scales
    assert engine.skipped_updates == 1


@pytest.mark.parametrize(
    ("stage", "sections"),
    [
        *((stage, {}) for stage in (1, 2, 3)),
        (1, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    ],
    ids=str,
)
def test_state_that_is_not_there_is_named(stage: int, sections: dict[str, Any]) -> None:
    """Catches DeepSpeed's KeyError of the name alone (stage 3), its TypeError before the first update (stage 1 in bf16
    with fp32 gradients), and a refusal that does not say what there is."""
    engine = sharded(stage, **sections)
    parameter = engine.engine.module.first
    if isinstance(engine.engine.optimizer, FP16_UnfusedOptimizer):
        pytest.skip(f"DeepSpeed {deepspeed.__version__} shards nothing in bf16 with fp32 gradients")
    with pytest.raises(ValueError, match=r"no optimizer state 'exp_avg'.*appears with the first update"):
        deepspeed.utils.safe_get_full_optimizer_state(parameter, "exp_avg")
    go(engine, (1.0, 2.0))
    deepspeed.utils.safe_get_full_optimizer_state(parameter, "exp_avg")
    for key in ("momentum", "step"):
        with pytest.raises(
            ValueError, match=rf"no optimizer state '{key}'.*there is \['exp_avg', 'exp_avg_sq'"
        ):
            deepspeed.utils.safe_set_full_optimizer_state(parameter, torch.ones(5), key)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_of_one_process_goes_on_under_every_stage(stage: int, tmp_path: Path) -> None:
    """Catches moments lost where a group's first parameter never had a gradient, a second group with the first one's
    settings, a piece read from another place, and a network that computes with the weights of before: seen at once or
    by one more update, with numbers worked out by hand."""
    first = alone()
    go(first, (1.0, 2.0))
    run = saved(first, tmp_path)
    assert run.entries("unused") == set()
    engine = sharded(stage)
    go(engine, (-7.0, 5.0))
    engine.load_state(run)
    loaded = [1.0, by_hand(1.0, lr=0.1, beta1=0.9)[0], by_hand(2.0, lr=0.5, beta1=0.5)[0]]
    assert weights(engine) == pytest.approx(loaded, rel=1e-5)
    go(engine, (0.25, 0.0))
    expected = [1.0, by_hand(1.0, 0.25, lr=0.1, beta1=0.9)[0], by_hand(2.0, 0.0, lr=0.5, beta1=0.5)[0]]
    assert weights(engine) == pytest.approx(expected, rel=1e-5)


class LostMaximum(SavedRun):
    """As DeepSpeed's own converter leaves it."""

    def entries(self, name: str) -> set[str]:
        return super().entries(name) - {"max_exp_avg_sq"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_lost_maximum_restarts_at_v_and_is_kept_from_then_on(stage: int, tmp_path: Path) -> None:
    """Catches v̂ that is the same tensor as v and falls with it, seen only after another update."""
    first = alone()
    go(first, (2.0, 1.0), (1.0, 1.0))
    run = saved(first, tmp_path, LostMaximum)
    engine = sharded(stage)
    with pytest.raises(JobError, match=r"has lost \['max_exp_avg_sq'\]"):
        engine.load_state(run)
    with restart_lost_maximum(), pytest.warns(UserWarning, match="it restarts at v"):
        engine.load_state(run)
    go(engine, (0.0, 0.0), (0.0, 0.0))
    expected = [
        1.0,
        by_hand(2.0, 1.0, 0.0, 0.0, lr=0.1, beta1=0.9, restart_after=2)[0],
        by_hand(1.0, 1.0, 0.0, 0.0, lr=0.5, beta1=0.5, restart_after=2)[0],
    ]
    assert weights(engine) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_loss_scale_goes_on_as_it_would_have(stage: int, tmp_path: Path) -> None:
    """Catches a scale without its counts of updates: it would grow at another update than in the uninterrupted run."""
    fp16 = {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 3, "hysteresis": 1}
    first = sharded(stage, fp16=fp16)
    go(first, (1.0, 1.0), (float("inf"), 1.0), (1.0, 1.0))
    second = sharded(stage, fp16=fp16)
    second.load_state(saved(first, tmp_path))
    scales: list[list[float]] = [[], []]
    for engine, seen in zip((first, second), scales, strict=True):
        for _ in range(4):
            go(engine, (1.0, 1.0))
            seen.append(dynamic_scaler(engine.engine.optimizer).cur_scale)
    assert scales[0] == scales[1]
    assert scales[0][0] == 32
    assert scales[0][-1] == 64


@pytest.mark.parametrize("stage", STAGES)
def test_theta_of_every_group_comes_in_chunks_and_x_returns(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches chunks of masters and moments that do not belong together, the first group's α·η for all, and a rest that
    stays at x."""
    monkeypatch.setattr(importlib.import_module("arsg_dist.deepspeed.base_iterate"), "_CHUNK", 3)
    engine = sharded(stage)
    go(engine, (1.0, 2.0), (0.5, 1.0))
    before = weights(engine)
    with base_iterate(engine.engine):
        thetas = weights(engine)
    by_formula = [
        by_hand(1.0, 0.5, lr=0.1, beta1=0.9),
        by_hand(2.0, 1.0, lr=0.5, beta1=0.5),
    ]
    assert thetas == pytest.approx([1.0, *(theta for _, theta in by_formula)], rel=1e-5)
    assert weights(engine) == before == pytest.approx([1.0, *(x for x, _ in by_formula)], rel=1e-5)


@pytest.mark.parametrize("place", ["first", "last"])
def test_stage_0_leaves_an_update_out_whichever_gradient_is_bad(place: str) -> None:
    """Catches a look at the first gradient only, an update that is not counted, and a check before the last
    micro-batch."""
    module = Slopes()
    config = {
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "ARSG", "params": SETTINGS},
    }
    engine = DeepSpeedEngine(
        module, config, SingleProcessCommunicator(), parameter_groups=groups(module), skip_nonfinite=True
    )
    bad = float("nan")
    go(engine, (bad, 1.0) if place == "first" else (1.0, bad), (1.0, 1.0))
    assert (weights(engine), engine.skipped_updates) == ([1.0, 1.0, 1.0], 1)
    go(engine, (0.5, 2.0), (1.5, 2.0))
    assert engine.skipped_updates == 1
    expected = [1.0, by_hand(1.0, lr=0.1, beta1=0.9)[0], by_hand(2.0, lr=0.5, beta1=0.5)[0]]
    assert weights(engine) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("boost_first", [False, True])
def test_a_boost_scales_deepspeeds_schedule_by_each_groups_ratio(boost_first: bool) -> None:
    """Catches the first group's ratio for all, and a schedule that writes the unboosted learning rate back, also where
    it comes after the boost."""
    optimizer = ARSG(groups(Slopes()), mu=0.05, lr=0.1)
    warmup = {
        "type": "WarmupLR",
        "params": {"warmup_max_lr": [0.1, 0.5], "warmup_num_steps": 4, "warmup_type": "linear"},
    }
    boost = {"type": "ObservationBoost", "params": {"milestones": [5]}}
    members = [boost, warmup] if boost_first else [warmup, boost]
    schedule = build_scheduler({"type": "ChainedScheduler", "params": {"schedulers": members}}, optimizer)
    for _ in range(8):
        optimizer.step()
        schedule.step()
    ratios = [theory.boost_ratio(beta1, 0.05, 0.1) for beta1 in (0.999, 0.5)]
    expected = [0.1 * ratios[0], 0.5 * ratios[1]]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)


def test_a_plateau_is_observed_every_so_many_updates() -> None:
    """Catches observations of single updates, or one update early: the mean of the losses would be another."""
    optimizer = ARSG(groups(Slopes()), mu=0.05, lr=0.1)
    section = {
        "type": "ObservationBoost",
        "params": {"observe_every": 2, "plateau": {"smoothing": 0.0, "patience": 0, "threshold": 0.0}},
    }
    boost = build_scheduler(section, optimizer)
    # Means of 2 and 1.5, then of 1.5 again: flat with the sixth update.
    seen = []
    for loss in (1.0, 3.0, 2.5, 0.5, 1.0, 2.0, 9.0, 9.0):
        boost.record(loss)
        optimizer.step()
        boost.step()
        seen.append(optimizer.param_groups[0]["mu"])
    assert seen == [0.05] * 5 + [0.1] * 3


def test_nvme_buffers_are_for_the_group_with_the_most_state() -> None:
    """Catches buffers counted for the last group only."""
    offload = {"device": "nvme", "buffer_count": 4, "pipeline_read": True}
    many, few = {"preconditioner": "amsgrad"}, {"preconditioner": "none"}
    for listed in ([many, few], [few, many]):
        with pytest.raises(ValueError, match="buffer_count of at least 10 for NVMe"):
            check_nvme({"offload_optimizer": offload}, listed, "ds.json")
    with pytest.raises(ValueError, match="of at least 6"):
        check_nvme({"offload_optimizer": offload}, [few], "ds.json")


def test_a_piece_is_named_once_and_padding_never() -> None:
    """Catches pieces without elements, an element on two ranks or on none, and a place in another rank's part."""
    # a: 3 elements, b: 5, c: 1, one after another; 3 ranks of 4, the last three of which are padding.
    listed = [("a", 3, 0), ("b", 5, 3), ("c", 1, 8)]
    assert [pieces_of_range(listed, rank, 4) for rank in range(3)] == [
        [Piece("a", 0, 0, 3), Piece("b", 0, 3, 1)],
        [Piece("b", 1, 0, 4)],
        [Piece("c", 0, 0, 1)],
    ]
    # Every rank has ⌈1/3⌉, ⌈3/3⌉ and ⌈5/3⌉ places; those of c are padding on all ranks but the first.
    assert [pieces_of_each([("c", 1), ("a", 3), ("b", 5)], rank, 3) for rank in range(3)] == [
        [Piece("c", 0, 0, 1), Piece("a", 0, 1, 1), Piece("b", 0, 2, 2)],
        [Piece("a", 1, 1, 1), Piece("b", 2, 2, 2)],
        [Piece("a", 2, 1, 1), Piece("b", 4, 2, 1)],
    ]


def test_parameters_of_one_group_with_different_counts_of_steps_are_refused(tmp_path: Path) -> None:
    """Catches the first parameter's count given to all: DeepSpeed steps a group as a whole."""
    module = Slopes()
    optimizer = ARSG([{"params": [module.first, module.last]}], preconditioner="adam")
    first = SingleProcessEngine(module, optimizer)
    for parameter in (module.first, module.last):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    module.last.grad = None
    optimizer.step()
    other = Slopes()
    config = {
        "train_batch_size": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "ARSG", "params": {"preconditioner": "adam"}},
    }
    engine = DeepSpeedEngine(
        other,
        config,
        SingleProcessCommunicator(),
        parameter_groups=[{"params": [other.first, other.last]}],
    )
    with pytest.raises(JobError, match="'first' and 'last' of group 0 have made different numbers of steps"):
        engine.load_state(saved(first, tmp_path))


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_of_every_stage_goes_on_in_one_process(stage: int, tmp_path: Path) -> None:
    """Catches a piece saved with another parameter's elements or another group's settings, seen by one more update."""
    first = sharded(stage)
    go(first, (1.0, 2.0))
    engine = alone()
    go(engine, (-7.0, 5.0))
    engine.load_state(saved(first, tmp_path))
    go(engine, (0.25, 0.0))
    expected = [1.0, by_hand(1.0, 0.25, lr=0.1, beta1=0.9)[0], by_hand(2.0, 0.0, lr=0.5, beta1=0.5)[0]]
    assert weights(engine) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_buffers_of_a_module_with_two_names_come_back(stage: int, tmp_path: Path) -> None:
    """Catches a second name that other engines miss in a saved run, or that is asked of DeepSpeed's own files, which
    have the first only."""

    def build() -> DeepSpeedEngine:
        norm = nn.BatchNorm1d(2)
        return sharded(stage, nn.Sequential(norm, nn.Tanh(), norm))

    engine = build()
    engine.backward(engine.module(torch.arange(6.0).view(3, 2)).square().sum())
    engine.step()
    mean = engine.engine.module[0].running_mean.clone()
    run = saved(engine, tmp_path / "run")
    assert {"0.running_mean", "2.running_mean"} <= set(run.buffers)
    engine.engine.save_checkpoint(str(tmp_path / "own"))
    for source in (run, read_checkpoint(tmp_path / "own")):
        other = build()
        other.load_state(source)
        assert torch.equal(other.engine.module[0].running_mean, mean)
        assert mean.any()


class Kept(Slopes):
    """Has a frozen parameter beside the three."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.full((4,), value), requires_grad=False)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [{"load_module_only": True}, {"load_optimizer_states": False}], ids=str)
def test_weights_alone_are_those_of_the_tag_and_in_the_masters_too(
    stage: int, precision: str, options: dict[str, bool], tmp_path: Path
) -> None:
    """Catches what DeepSpeed does by itself: nothing at stage 3, the weights of `latest` for an older tag, and masters
    at stage 0 in half precision from which the next update makes the random start again."""
    half = {precision: {"enabled": True}} if precision != "fp32" else {}
    source = sharded(stage, **half)
    go(source, (1.0, 2.0))
    source.engine.save_checkpoint(tmp_path, tag="early")
    early = weights(source)
    go(source, (3.0, 1.0), (0.5, -1.0))
    source.engine.save_checkpoint(tmp_path, tag="late")
    for stepped in (False, True):
        module = Slopes()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(7.0)
        target = sharded(stage, module, **half)
        if stepped:
            go(target, (1.0, 1.0))
        lr = target.engine.optimizer.param_groups[0]["lr"]
        path, _ = target.engine.load_checkpoint(tmp_path, tag="early", **options)
        assert path is not None
        assert weights(target) == early
        go(target, (0.1, 0.1))
        moved = [abs(now - then) for now, then in zip(weights(target), early, strict=True)]
        assert max(moved) < 1.0, "the update went on from the random start"
        assert any(moved)
        assert target.engine.optimizer.param_groups[0]["lr"] == lr


@pytest.mark.parametrize("stage", STAGES)
def test_a_schedule_loaded_without_the_optimizer_sets_the_learning_rate(stage: int, tmp_path: Path) -> None:
    """Catches a group that trains at its first lr while the schedule tells of another."""
    schedule = {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}}
    source = sharded(stage, scheduler=schedule)
    go(source, (1.0, 2.0), (1.0, 2.0))
    source.engine.save_checkpoint(tmp_path, tag="one")
    target = sharded(stage, scheduler=schedule)
    target.engine.load_checkpoint(tmp_path, tag="one", load_optimizer_states=False)
    expected = [group["lr"] for group in source.engine.basic_optimizer.param_groups]
    assert [group["lr"] for group in target.engine.basic_optimizer.param_groups] == expected


@pytest.mark.parametrize("stage", [1, 2])
def test_a_checkpoint_without_its_frozen_parameters_says_so(stage: int, tmp_path: Path) -> None:
    """Catches an export that silently writes a part of the model, and a universal checkpoint nobody can load."""
    source = sharded(stage, Kept(2.0))
    go(source, (1.0, 2.0))
    source.engine.save_checkpoint(tmp_path, tag="part", exclude_frozen_parameters=True)
    with pytest.raises(ValueError, match="exclude_frozen_parameters=True and lacks 1 parameters"):
        export(tmp_path / "part", tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()
    convert(tmp_path / "part", tmp_path / "universal")
    target = sharded(stage, Kept(5.0), checkpoint={"load_universal": True})
    with pytest.raises(ValueError, match="load it with load_module_strict=False"):
        target.engine.load_checkpoint(tmp_path, tag="universal")
    target.engine.load_checkpoint(tmp_path, tag="universal", load_module_strict=False)
    expected = {name: value for name, value in source.whole_weights().items() if name != "kept"}
    loaded = target.whole_weights()
    assert loaded.pop("kept").tolist() == [5.0] * 4
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stage", STAGES)
def test_a_frozen_parameter_in_a_group_with_others_stays(stage: int) -> None:
    """Catches a master of it, which older DeepSpeeds make at stage 0 in half precision: weight decay moves it."""
    module = Slopes()
    module.unused.requires_grad_(False)
    params = {**SETTINGS, "weight_decay": 0.5}
    engine = sharded(stage, module, bf16={"enabled": True}, optimizer={"type": "ARSG", "params": params})
    go(engine, (0.0, 1.0))
    after = {name: value[0].item() for name, value in engine.whole_weights().items()}
    assert after["unused"] == 1.0
    assert after["first"] < 1.0


class Named(Slopes):
    """Returns what it computes by name, as torchvision's networks with further classifiers do."""

    def forward(self, first: float, last: float) -> Any:
        outputs: Any = namedtuple("Outputs", "logits aux_logits")
        return outputs(first * self.first.sum(), last * self.last.sum())


@pytest.mark.parametrize("stage", STAGES)
def test_outputs_by_name_arrive_with_their_names(stage: int) -> None:
    """Catches a plain tuple from an engine, of which nobody knows what is the main output; and gradients that do not
    reach what only a further output depends on."""
    engine = sharded(stage, Named())
    outputs = engine.module(3.0, 5.0)
    assert (float(outputs.logits), float(outputs.aux_logits)) == (15.0, 10.0)
    before = engine.whole_weights()
    engine.backward(sum(share * logits for share, logits in weighted_logits(outputs)))  # type: ignore[arg-type]
    engine.step()
    moved = {name: bool((tensor != before[name]).all()) for name, tensor in engine.whole_weights().items()}
    assert moved == {"unused": False, "first": True, "last": True}


class AllUsed(Slopes):
    """Without a parameter that has no gradient: preconditioner adam counts the steps of a group."""

    def forward(self, first: float, last: float) -> Tensor:
        return super().forward(first, last) + first * self.unused.sum()


@pytest.mark.parametrize("stage", STAGES)
def test_modes_of_the_update_come_from_json_and_go_on_from_one_process(stage: int, tmp_path: Path) -> None:
    """Catches a setting of a config that ARSG has and a stage refuses or drops, and a state gone on with without it:
    cautious decay that decays where x is moved away from 0, m of plain gradients, m that is corrected, θ that divides
    twice."""
    modes = {
        "preconditioner": "adam", "bias_correction": "second", "precondition_first": True, "weight_decay": 0.5,
        "decoupled_weight_decay": True, "cautious_weight_decay": True,
    }  # fmt: skip
    module = AllUsed()
    first = SingleProcessEngine(module, ARSG(groups(module), **{**SETTINGS, **modes}))  # type: ignore[arg-type]
    go(first, (1.0, -2.0))
    engine = sharded(stage, AllUsed(), optimizer={"type": "ARSG", "params": {**SETTINGS, **modes}})
    engine.load_state(saved(first, tmp_path))
    go(engine, (0.25, -1.0))

    def worked_out(*gradients: float, lr: float, beta1: float) -> tuple[float, float]:
        x, m, v = 1.0, 0.0, 0.0
        for t, gradient in enumerate(gradients, 1):
            v = 0.5 * v + 0.5 * gradient**2
            n = gradient / ((v / (1 - 0.5**t)) ** 0.5 + 1e-4)
            m = beta1 * m + (1 - beta1) * n
            update = 0.5 * m + 0.5 * n
            x -= lr * (update + (0.5 * x if update * x >= 0 else 0.0))
        return x, x + lr * 0.5 * beta1 / (1 - beta1) * m

    first_group = worked_out(1.0, 0.25, lr=0.1, beta1=0.9)
    expected = [first_group, first_group, worked_out(-2.0, -1.0, lr=0.5, beta1=0.5)]
    assert weights(engine) == pytest.approx([x for x, _ in expected], rel=1e-5)
    with base_iterate(engine.engine):
        assert weights(engine) == pytest.approx([theta for _, theta in expected], rel=1e-5)


CPU = {"offload_optimizer": {"device": "cpu"}}
REMOTE: dict[str, Any] = {
    "type": "RemoteObservation",
    "params": {"inner": "SGD", "lr": 0.1, "remote_mu": 0.5, "remote_beta1": 0.75},
}


def remote_by_hand(*gradients: float, lr: float, boosted_after: int = 0) -> tuple[float, float]:
    """x after updates with these gradients from 1, and its base iterate."""
    x, d, mu, beta1 = 1.0, 0.0, 0.5, 0.75
    for update, gradient in enumerate(gradients, 1):
        step = -lr * gradient
        d = beta1 * d + (1 - beta1) / mu * step
        x += step + (1 - mu) * d
        if update == boosted_after:  # lr is αμ; the movement is that of the old α
            ratio = theory.boost_ratio(beta1, mu, 1.5 * mu)
            lr, mu, d = lr * ratio * 1.5, mu * 1.5, d * ratio
    return x, x - (1 - mu) * d


@pytest.mark.parametrize("stage", STAGES)
def test_remote_observation_goes_through_deepspeeds_own_checkpoints(stage: int, tmp_path: Path) -> None:
    """Catches a movement that DeepSpeed's loaders or the universal layout leave out, a θ without it, and state of an
    inner optimizer made before the first batch."""
    engine = sharded(stage, AllUsed(), optimizer=REMOTE)
    assert not engine.optimizer.state
    go(engine, (1.0, -2.0), (0.5, 1.0))
    engine.engine.save_checkpoint(str(tmp_path), tag="two")
    _, theta = remote_by_hand(1.0, 0.5, lr=0.1)
    _, theta_of_last = remote_by_hand(-2.0, 1.0, lr=0.5)
    for source in (engine.engine, tmp_path / "two"):
        export(source, tmp_path / "theta.safetensors", at="theta")
        exported = load_file(tmp_path / "theta.safetensors")
        assert exported["first"][0].item() == pytest.approx(theta, rel=1e-5)
        assert exported["last"][0].item() == pytest.approx(theta_of_last, rel=1e-5)
    with base_iterate(engine.engine):
        assert weights(engine) == pytest.approx([theta, theta, theta_of_last], rel=1e-5)
    convert(tmp_path / "two", tmp_path / "universal")
    first, last = remote_by_hand(1.0, 0.5, 2.0, lr=0.1)[0], remote_by_hand(-2.0, 1.0, 3.0, lr=0.5)[0]
    for other, more in ((stage, {}), ((stage + 1) % 4, {"checkpoint": {"load_universal": True}})):
        again = sharded(other, AllUsed(), optimizer=REMOTE, **more)
        again.engine.load_checkpoint(str(tmp_path), tag="universal" if more else "two")
        go(again, (2.0, 3.0))
        assert weights(again) == pytest.approx([first, first, last], rel=1e-5)


@pytest.mark.parametrize(("stage", "offload"), [*((stage, {}) for stage in STAGES), (2, CPU), (3, CPU)])
def test_remote_observation_in_bf16_moves_the_masters(
    stage: int, offload: dict[str, Any], tmp_path: Path
) -> None:
    """Catches a movement of rounded weights, or one in bf16, which small steps do not change; and a first update before
    the first batch, which stage 0 makes for other optimizers."""
    zero = {"stage": stage, "reduce_bucket_size": 1000, **offload}
    engine = sharded(stage, AllUsed(), optimizer=REMOTE, bf16={"enabled": True}, zero_optimization=zero)
    go(engine, (1.0, -2.0), (0.5, 1.0), (2.0, 3.0))
    for at, place in (("x", 0), ("theta", 1)):
        export(engine.engine, tmp_path / "weights.safetensors", at=at)  # type: ignore[arg-type]
        exported = load_file(tmp_path / "weights.safetensors")
        expected = [remote_by_hand(1.0, 0.5, 2.0, lr=0.1), remote_by_hand(-2.0, 1.0, 3.0, lr=0.5)]
        found = [exported[name][0].item() for name in ("first", "last")]
        assert found == pytest.approx([both[place] for both in expected], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_boost_of_remote_observation_reaches_every_movement(stage: int, tmp_path: Path) -> None:
    """Catches movements of before the boost that keep their size where an engine keeps them out of the groups, as stage
    3 does between updates; and a boost that a checkpoint forgets."""
    engine = sharded(stage, AllUsed(), optimizer=REMOTE)
    boost = ObservationBoost(engine.optimizer, milestones=[1], factor=1.5)
    go(engine, (1.0, -2.0))
    boost.step()
    state = saved(engine, tmp_path)
    go(engine, (2.0, 3.0))
    first = remote_by_hand(1.0, 2.0, lr=0.1, boosted_after=1)[0]
    expected = [first, first, remote_by_hand(-2.0, 3.0, lr=0.5, boosted_after=1)[0]]
    assert weights(engine) == pytest.approx(expected, rel=1e-5)
    again = sharded((stage + 1) % 4, AllUsed(), optimizer=REMOTE)
    again.load_state(state)
    go(again, (2.0, 3.0))
    assert weights(again) == pytest.approx(expected, rel=1e-5)


def test_a_matrix_method_is_refused_on_flat_partitions_whoever_makes_it() -> None:
    """Catches a Muon that is handed to DeepSpeed as a callable and orthogonalises a flat vector; and one at stage 0,
    which has whole tensors, that is refused."""

    def make(parameters: Any) -> RemoteObservation:
        return RemoteObservation(torch.optim.Muon(parameters, lr=0.1), mu=0.5, beta1=0.75)

    for stage in STAGES:
        config = {
            "train_batch_size": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000},
        }
        module = nn.Linear(3, 2, bias=False)
        if stage:
            with pytest.raises(ValueError, match=r"Muon needs whole tensors.*use stage 0"):
                deepspeed.initialize(
                    model=module, model_parameters=[*module.parameters()], optimizer=make, config=config
                )
        else:
            deepspeed.initialize(
                model=module, model_parameters=[*module.parameters()], optimizer=make, config=config
            )


def test_a_lost_movement_is_refused(tmp_path: Path) -> None:
    """Catches a run that goes on from θ, and calls it x."""
    adam = {"type": "RemoteObservation", "params": {"inner": "Adam", "remote_mu": 0.5, "remote_beta1": 0.75}}
    engine = sharded(1, AllUsed(), optimizer=adam)
    go(engine, (1.0, -2.0))
    for state in engine.optimizer.state.values():
        del state["movement"]
    with pytest.raises(RuntimeError, match=r"lacks \['movement'\]"), base_iterate(engine.engine):
        pass
    kept, again = saved(engine, tmp_path), sharded(1, AllUsed(), optimizer=adam)
    with pytest.raises(JobError, match=r"has lost \['movement'\]"):
        again.load_state(kept)


class Wide(nn.Module):
    """Enough elements for state in 8 bits, with gradients of many sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.small = nn.Parameter(torch.ones(6000)), nn.Parameter(torch.ones(7))
        self.register_buffer("slopes", torch.logspace(-3, 0, 6000))

    def forward(self, first: float, last: float) -> Tensor:
        return first * (self.slopes * self.wide).sum() + last * self.small.sum()


@pytest.mark.parametrize("stage", STAGES)
def test_state_in_8_bits_goes_through_deepspeeds_own_checkpoints(stage: int, tmp_path: Path) -> None:
    """Catches codes saved for values, float32 moments kept after a load or beside the codes by DeepSpeed's links, and a
    part of a block that is handed out or written by name."""
    optimizer = {"type": "ARSG", "params": {**SETTINGS, "state_dtype": "8bit"}}
    first, second = (sharded(stage, Wide(), optimizer=optimizer) for _ in range(2))
    go(first, (1.0, 1.0), (-2.0, 0.5), (0.25, 1.0))
    first.engine.save_checkpoint(str(tmp_path), tag="one")
    second.engine.load_checkpoint(str(tmp_path))
    for engine in (first, second):
        go(engine, (1.0, -1.0), (0.5, 1.0))
        kept = [state[name] for state in engine.optimizer.state.values() for name in MOMENTS["amsgrad"]]
        assert any(isinstance(moment, EightBit) for moment in kept)
    assert torch.equal(*(whole_of(engine.engine.module.wide) for engine in (first, second)))
    if stage:
        for function in (safe_get_full_optimizer_state, safe_set_full_optimizer_state):
            value = [torch.ones(6000)] if function is safe_set_full_optimizer_state else []
            with pytest.raises(ValueError, match="8 bits"):
                function(first.engine.module.wide, *value, "exp_avg")
    if stage == 3:
        with pytest.raises(ValueError, match="8bit"):
            first.engine.offload_states()


def whole_of(parameter: nn.Parameter) -> Tensor:
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def test_split_masters_are_refused_by_name() -> None:
    """Catches a setting that DeepSpeed's own masters would make void: given in JSON, or by an optimizer."""
    with pytest.raises(ValueError, match="master='split'"):
        sharded(1, optimizer={"type": "ARSG", "params": {**SETTINGS, "master": "split"}})
    model = Wide().bfloat16()
    with pytest.raises(ValueError, match="master='split'"):
        deepspeed.initialize(
            model=model,
            optimizer=ARSG(model.parameters(), master="split"),
            config={"train_batch_size": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
        )
