"""What DeepSpeed would leave out or overwrite in an update of an ARSG, on one rank in this process.

The same happens to DeepSpeed's other optimizers, which `test_whose_it_is` shows with Adam: the table of limits in
docs/deepspeed.md says so.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from arsg_dist import ARSG
from arsg_dist.deepspeed import update_checks, versions
from arsg_dist.deepspeed.versions import leaves_out_frozen
from arsg_dist.engine import JobError
from tests.deepspeed.test_one_rank import _one_rank as _one_rank

STAGES = [0, 1, 2, 3]
LR = 0.125
OLD = Version(deepspeed.__version__) < Version("0.18.3")


class Pair(nn.Module):
    """Two parameters whose gradients are the inputs."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3), not frozen)

    def forward(self, first: float, last: float) -> Tensor:
        return first * self.first.sum() + last * self.last.sum()


def descent(parameters: Any) -> ARSG:
    """x ← x − 0.125 g: every update is worked out by hand."""
    return ARSG(parameters, lr=LR, betas=(0.0, 0.0), mu=0.0, preconditioner="none")


def build(
    stage: int,
    module: nn.Module | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] = descent,
    parameters: list[nn.Parameter] | None = None,
    scheduler: Callable[[Any], Any] | None = None,
    **config: Any,
) -> Any:
    module = module or Pair()
    zero = {"stage": stage, "reduce_bucket_size": 1000, **config.pop("zero", {})}
    micro_batches = config.pop("micro_batches", 1)
    complete = {
        "train_batch_size": micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **config,
    }
    return deepspeed.initialize(
        model=module,
        model_parameters=parameters or module.parameters(),
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=complete,
    )[0]


def backward(engine: Any, first: float, last: float) -> None:
    engine.backward(engine(first, last))


def update(engine: Any, first: float = 1.0, last: float = 2.0) -> None:
    backward(engine, first, last)
    engine.step()


def weights(engine: Any) -> list[float]:
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        values = [parameter.detach().float() for parameter in engine.module.parameters()]
        assert all(bool((value == value[0]).all()) for value in values)
        return [value[0].item() for value in values]


def write(engine: Any, value: float, how: str = "in place", element: int | None = None) -> None:
    with deepspeed.zero.GatheredParameters([engine.module.last], modifier_rank=0), torch.no_grad():
        target = engine.module.last.data if how == ".data" else engine.module.last
        target[slice(None) if element is None else element].fill_(value)


def refused(text: str) -> Any:
    return pytest.raises(JobError, match=text)


BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_two_backward_passes_add_up_or_are_refused(stage: int, micro_batches: int) -> None:
    """Catches a gradient of an earlier backward pass that is lost without a word, one that counts twice, and a refusal
    where all of them count."""
    engine = build(stage, micro_batches=micro_batches)
    if micro_batches == 2:
        update(engine, 8.0, 8.0)
    backward(engine, 1.0, 2.0)
    if stage in (1, 2):
        with refused(r"2 backward passes .*set_gradient_accumulation_boundary\(False\)"):
            backward(engine, 3.0, 4.0)  # refused already here before DeepSpeed 0.18.3
            engine.step()
        assert weights(engine) == [1.0, 1.0]
        return
    backward(engine, 3.0, 4.0)
    engine.step()
    more = 8.0 if micro_batches == 2 else 0.0
    assert weights(engine) == [1.0 - LR * (4 + more) / micro_batches, 1.0 - LR * (6 + more) / micro_batches]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "config",
    [OFFLOAD, {"zero": {"overlap_comm": True}}, BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}],
    ids=["offload", "overlap", "fp32 sums"],
)
def test_two_backward_passes_of_a_later_update(stage: int, config: dict[str, Any]) -> None:
    """Catches a count that begins with the engine instead of the update, and a refusal where DeepSpeed keeps sums of
    its own, in which both gradients are."""
    engine = build(stage, **config)
    update(engine)
    backward(engine, 1.0, 2.0)
    if "data_types" in config and (stage == 1 or Version(deepspeed.__version__) >= Version("0.19.8")):
        backward(engine, 3.0, 4.0)
        engine.step()
        assert weights(engine) == [1.0 - 5 * LR, 1.0 - 8 * LR]
        return
    with refused("2 backward passes"):
        backward(engine, 3.0, 4.0)
        engine.step()


@pytest.mark.parametrize("stage", [1, 2])
def test_two_backward_passes_with_an_older_deepspeed(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a TypeError of DeepSpeed's in the second pass (before 0.18.3), micro-batches refused, and passes that
    are not counted because DeepSpeed discards the gradients that it has taken (before 0.18.5)."""
    engine = build(stage, **OFFLOAD)
    reduce = engine.allreduce_gradients

    def allreduce_gradients(*args: Any, **kwargs: Any) -> None:
        reduce(*args, **kwargs)
        engine.optimizer.zero_grad()

    monkeypatch.setattr(engine, "allreduce_gradients", allreduce_gradients)
    update(engine)
    backward(engine, 1.0, 2.0)
    with refused("2 backward passes"):
        backward(engine, 3.0, 4.0)
        engine.step()
    monkeypatch.setattr(update_checks, "fails_over_further_passes", lambda _: True)
    engine = build(stage)
    update(engine)
    backward(engine, 1.0, 2.0)
    with refused("2 backward passes"):
        backward(engine, 3.0, 4.0)
    engine = build(stage, micro_batches=2)
    update(engine)
    update(engine, 3.0, 4.0)
    assert weights(engine) == [1.0 - 2 * LR, 1.0 - 3 * LR]


@pytest.mark.parametrize("stage", [1, 2])
def test_the_remedies_for_two_backward_passes_work(stage: int) -> None:
    """Catches a message that sends into the next error: what it recommends gives the sum."""
    engine = build(stage)
    engine.set_gradient_accumulation_boundary(False)
    backward(engine, 1.0, 2.0)
    engine.set_gradient_accumulation_boundary(True)
    backward(engine, 3.0, 4.0)
    engine.step()
    assert weights(engine) == [1.0 - 4 * LR, 1.0 - 6 * LR]
    for discard in (engine.zero_grad, engine.optimizer.zero_grad):
        backward(engine, 9.0, 9.0)
        discard()
        update(engine, 0.5, 0.25)
    assert weights(engine) == [1.0 - 5 * LR, 1.0 - 6.5 * LR]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("config", [{}, BF16], ids=["fp32", "bf16"])
def test_an_update_has_no_gradient_of_the_one_before(stage: int, config: dict[str, Any]) -> None:
    """Catches sums over all updates so far: DeepSpeed before 0.18.9 clears nothing at stage 0 in bf16."""
    engine = build(stage, **config)
    for first, last in ((1.0, 2.0), (0.5, 0.25), (-1.0, 1.0)):
        update(engine, first, last)
    assert weights(engine) == [1.0 - 0.5 * LR, 1.0 - 3.25 * LR]


@pytest.mark.skipif(Version(deepspeed.__version__) < Version("0.18.9"), reason="this one is older")
def test_an_older_deepspeed_forgets_to_clear_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the same where the tests have a newer one."""
    engine = build(0, **BF16)
    discard = engine.optimizer.zero_grad
    cleared: list[bool] = []
    monkeypatch.setattr(engine.optimizer, "zero_grad", lambda: cleared.append(True) or discard())
    update(engine)
    once = len(cleared)
    monkeypatch.setattr(versions, "_before", lambda version: version == "0.18.9")
    update(engine)
    assert len(cleared) == 2 * once + 1


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("config", [{}, OFFLOAD], ids=["", "offload"])
def test_gradients_are_within_reach_after_others_were_discarded(stage: int, config: dict[str, Any]) -> None:
    """Catches `safe_get_full_grad` that looks where the gradients of before were, or says that there are none."""
    engine = build(stage, **config)
    update(engine)
    for first, last in ((0.5, 0.25), (3.0, 4.0)):
        backward(engine, 9.0, 9.0)
        engine.zero_grad()
        backward(engine, first, last)
        seen = [safe_get_full_grad(parameter) for parameter in (engine.module.first, engine.module.last)]
        assert [gradient.tolist() for gradient in seen] == [[first] * 5, [last] * 3]
        engine.step()


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_discarded_by_the_engine(stage: int) -> None:
    """Catches the gradient of before in the next update, also of a parameter that this one does not reach, and an
    update with gradients that were thrown away."""
    for config in ({}, OFFLOAD if stage else BF16):
        engine = build(stage, **config)
        backward(engine, 9.0, 9.0)
        engine.zero_grad()
        engine.backward(0.5 * engine.module.first.sum() if stage < 3 else engine(0.5, 0.0))
        engine.step()
        assert weights(engine) == [1.0 - 0.5 * LR, 1.0]
        backward(engine, 9.0, 9.0)
        engine.zero_grad()
        if stage:
            with refused(r"step\(\) after zero_grad\(\) without a backward pass"):
                engine.step()
        else:
            engine.step()
        assert weights(engine) == [1.0 - 0.5 * LR, 1.0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "config", [{}, OFFLOAD, BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}], ids=str
)
def test_earlier_micro_batches_are_discarded_and_that_is_said(stage: int, config: dict[str, Any]) -> None:
    """Catches sums that DeepSpeed keeps beside the gradients (stages 2 and 3), and a program that loses micro-batches
    without knowing."""
    if not stage and config:
        pytest.skip("no offload and no sums of their own at stage 0")
    engine = build(stage, micro_batches=2, **config)
    update(engine, 8.0, 8.0)
    if stage:
        with pytest.warns(UserWarning, match="thrown away the gradients of 1 of 2 micro-batches"):
            engine.zero_grad()
    else:
        engine.zero_grad()
    update(engine, 1.0, 2.0)
    assert weights(engine) == [1.0 - LR / 2, 1.0 - LR]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="engine.zero_grad")
        engine.zero_grad()  # between updates nothing is lost
    update(engine, 2.0, 2.0)
    update(engine, 2.0, 4.0)
    assert weights(engine) == [1.0 - 2.5 * LR, 1.0 - 4 * LR]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_are_no_second_backward_pass(stage: int, reentrant: bool) -> None:
    """Catches a backward pass that is counted twice where parts of the model are computed again."""
    engine = build(stage)
    forward = engine.module.forward

    def recomputed(*values: float) -> Any:
        inputs = [torch.tensor(value, requires_grad=True) for value in values]
        return checkpoint(forward, *inputs, use_reentrant=reentrant)

    engine.module.forward = recomputed
    update(engine)
    if stage and not OLD:  # loss.backward() in place of engine.backward(loss)
        engine(1.0, 2.0).backward()
        engine.step()
    else:
        update(engine)
    assert weights(engine) == [1.0 - 2 * LR, 1.0 - 4 * LR]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
def test_a_parameter_unfrozen_later_trains_or_is_refused(stage: int, precision: dict[str, Any]) -> None:
    """Catches a parameter of the optimizer that never trains, without a word, and a refusal where it does."""
    engine = build(stage, Pair(frozen=True), **precision)
    update(engine)
    assert weights(engine) == [1.0 - LR, 1.0]
    engine.module.last.requires_grad_(True)
    backward(engine, 1.0, 2.0)
    if stage == 0 and not precision:
        engine.step()
        assert weights(engine) == [1.0 - 2 * LR, 1.0 - 2 * LR]
        return
    with refused("last had requires_grad=False at deepspeed.initialize.* lr 0"):
        engine.step()
    assert weights(engine) == [1.0 - LR, 1.0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("precision", "how"),
    [
        ({}, "in place"),
        (BF16, ".data"),
        (BF16, "one element"),
        ({}, "before the first update"),
        (BF16, "whole"),
    ],
    ids=str,
)
def test_weights_that_the_program_writes_count_or_are_refused(
    stage: int, precision: dict[str, Any], how: str
) -> None:
    """Catches a written weight that the next update takes back without a word; one element of it; and that the remedy
    in the message does not help."""
    engine = build(stage, **precision)
    if how != "before the first update":
        update(engine, 0.0, 0.0)
    if how == "whole" and stage == 3:  # a small one, of which stage 3 keeps all: not written back
        with torch.no_grad():
            engine.module.last.fill_(5.0)
    else:
        write(engine, 5.0, how, element=1 if how == "one element" else None)
    backward(engine, 1.0, 2.0)
    if stage == 0 and not precision:
        engine.step()
        assert engine.module.last[1].item() == 5.0 - 2 * LR
        return
    with refused(r"last was written since the last update.*refresh_fp32_params\(\) on every rank"):
        engine.step()
    if how == "whole" and stage == 3:
        return
    engine.zero_grad()
    engine.optimizer.refresh_fp32_params()
    update(engine)
    with deepspeed.zero.GatheredParameters([engine.module.last]):
        assert engine.module.last[1].item() == 5.0 - 2 * LR


@pytest.mark.parametrize("stage", STAGES)
def test_weights_that_come_back_or_reach_the_masters_are_no_edit(stage: int) -> None:
    """Catches a refusal of weights that were exchanged for an evaluation, of a master set by DeepSpeed's own function,
    of padding, and of NaN, which never equals itself."""
    engine = build(stage, **BF16)
    update(engine)
    before = weights(engine)[1]
    write(engine, 7.0)
    write(engine, before)
    update(engine)
    if stage:
        deepspeed.utils.safe_set_full_fp32_param(engine.module.last, torch.full((3,), 3.0))
        update(engine)
        assert weights(engine) == [1.0 - 3 * LR, 3.0 - 2 * LR]
    write(engine, float("nan"))
    engine.optimizer.refresh_fp32_params()
    update(engine)
    update(engine)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
def test_whose_it_is(stage: int, precision: dict[str, Any]) -> None:
    """Catches a refusal that is ours: with torch's Adam the values are as wrong as the messages say. Tells too when a
    later DeepSpeed needs the refusals no more."""

    def after(act: Callable[[Any], None], module: nn.Module | None = None, **options: Any) -> list[float]:
        engine = build(stage, module, options.pop("optimizer", adam), **precision, **options)
        act(engine)
        return weights(engine)

    def twice(engine: Any) -> None:
        backward(engine, -1.0, 1.0)
        backward(engine, 3.0, -0.5)
        engine.step()

    def discarded(engine: Any) -> None:
        backward(engine, -4.0, 1.0)
        engine.zero_grad()
        update(engine, 3.0, 1.0)

    def discarded_between(whose: str) -> Callable[[Any], None]:
        def act(engine: Any) -> None:
            update(engine, -4.0, 1.0)
            (engine if whose == "the engine's" else engine.optimizer).zero_grad()
            update(engine, 3.0, 1.0)

        return act

    def without_backward(engine: Any) -> None:
        backward(engine, -4.0, 1.0)
        engine.zero_grad()
        engine.step()

    def thawed(engine: Any) -> None:
        engine.module.last.requires_grad_(True)
        update(engine)

    def frozen(engine: Any) -> None:
        engine.module.last.requires_grad_(False)
        update(engine)

    def written(engine: Any) -> None:
        write(engine, 5.0)
        update(engine)

    down, up = 1.0 - LR, 1.0 + LR
    plain = stage == 0 and not precision
    if not (OLD and stage in (1, 2)):  # DeepSpeed's TypeError
        assert after(twice) == ([down, up] if stage in (1, 2) else [down, down])
        assert after(discarded) == ([up, down] if stage == 3 else [down, down])
    if not (OLD and stage == 2):  # loses the first of them, discarded or not
        assert after(discarded_between("the engine's"), micro_batches=2) == [up if stage >= 2 else down, down]
        assert after(discarded_between("the wrapper's"), micro_batches=2) == [
            up if stage == 2 else down,
            down,
        ]
    assert after(without_backward) == ([up, down] if stage else [1.0, 1.0])
    kept = plain or (stage == 0 and not leaves_out_frozen())
    assert after(thawed, Pair(frozen=True)) == ([down, down] if kept else [down, 1.0])
    outside = Pair(frozen=True)
    assert after(thawed, outside, parameters=[outside.first]) == [down, 1.0]
    # Stage 0 in half precision decays once more, before training: docs/deepspeed-defects.md.
    decay = 1.0 - LR * (2 if stage == 0 and precision else 1)
    assert after(frozen, optimizer=decayed) == [decay, 1.0 if plain else decay]
    assert after(written) == ([down, 5.0 - LR] if plain else [down, down])


def adam(parameters: Any) -> torch.optim.Optimizer:
    """Its first updates are ±lr, whatever the size of the gradient."""
    return torch.optim.Adam(parameters, lr=LR, betas=(0.0, 0.0), eps=1e-20)


def decayed(parameters: Any) -> torch.optim.Optimizer:
    """By weight decay alone a weight of 1 becomes 1 − lr, and a gradient of 1 beside it changes nothing."""
    return torch.optim.Adam(parameters, lr=LR, betas=(0.0, 0.0), eps=1e-20, weight_decay=1.0)


@pytest.mark.parametrize("stage", STAGES)
def test_whose_the_old_lr_is(stage: int, tmp_path: Path) -> None:
    """Catches the same of a schedule that is loaded without the optimizer; ARSG's groups get its lr."""

    def halved(inner: Any) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(inner, 0.5)

    for make, lr in ((adam, LR), (descent, LR / 4)):
        engine = build(stage, optimizer=make, scheduler=halved)
        update(engine)
        update(engine)
        engine.save_checkpoint(str(tmp_path / make.__name__))
        other = build(stage, optimizer=make, scheduler=halved)
        other.load_checkpoint(str(tmp_path / make.__name__), load_optimizer_states=False)
        assert other.lr_scheduler.get_last_lr() == [LR / 4]
        assert other.basic_optimizer.param_groups[0]["lr"] == lr
