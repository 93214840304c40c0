import json
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.ops.adam import FusedAdam
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from packaging.version import Version

from arsg_dist import ARSG
from arsg_dist.deepspeed import patching, register, repair
from arsg_dist.deepspeed.known_sources import KNOWN_SOURCES
from arsg_dist.deepspeed.patches import training_step
from arsg_dist.deepspeed.patching import check_known, digest, repair_once, sources, wrap_once
from arsg_dist.deepspeed.versions import taken_for_fused_adam
from tests.deepspeed.versions import BEGIN, DOCUMENT, RESULTS, SOURCES, renewed, table, text_of

WRAPPED = [
    (DeepSpeedEngine, "_do_sanity_check"),
    (DeepSpeedEngine, "_configure_fp16_optimizer"),
    (DeepSpeedEngine, "_configure_optimizer"),
    (DeepSpeedEngine, "_configure_zero_optimizer"),
    (FP16_UnfusedOptimizer, "initialize_optimizer_states"),
    (DeepSpeedZeroOptimizer, "reduce_gradients"),
    (DeepSpeedZeroOptimizer, "async_accumulate_grad_in_cpu_via_gpu"),
    (OptimizerSwapper, "_adjust_for_misaligned_lengths"),
    *(
        (owner, name)
        for owner in (FP16_UnfusedOptimizer, DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
        for name in ("_update_scale", "step")
    ),
    (DeepSpeedEngine, "backward")
    if Version(deepspeed.__version__) >= Version("0.18.3")
    else (DeepSpeedZeroOptimizer, "independent_gradient_partition_epilogue"),
]


def test_registering_again_wraps_nothing_twice() -> None:
    """Catches a loss scaled twice because two modules registered."""
    before = [getattr(owner, name) for owner, name in WRAPPED]
    assert all(hasattr(method, "_wrapped_for_arsg") for method in before)
    register()
    assert [getattr(owner, name) for owner, name in WRAPPED] == before


def test_a_deepspeed_without_the_method_is_refused() -> None:
    """Catches a repair that silently has no effect in another DeepSpeed."""
    with pytest.raises(RuntimeError, match=r"has no SimpleNamespace\.step; arsg_dist works with"):
        wrap_once(SimpleNamespace, "step", lambda method: method)


def test_this_deepspeed_is_known() -> None:
    """Catches a table of digests that is not of this code, and a digest of DeepSpeed's decorator in place of what it
    decorates: all decorated methods would look alike, and never change."""
    check_known()
    found = sources()
    assert (
        found["DeepSpeedZeroOptimizer_Stage3.step"] != found["DeepSpeedZeroOptimizer_Stage3.partition_grads"]
    )
    assert SOURCES.read_text() == text_of(KNOWN_SOURCES)


@pytest.mark.parametrize("optimizer_class", [ARSG, torch.optim.AdamW])
def test_sums_of_micro_batches_are_gone_on_with(optimizer_class: type[torch.optim.Optimizer]) -> None:
    """Catches sums that DeepSpeed before 0.18.3 begins anew in each micro-batch, a sum that goes on into the next
    update, and a repair of other optimizers."""

    def epilogue(zero: Any) -> None:
        if zero.averaged_gradients.get(0) is None:
            zero.all_grad_tensors[0] = [zero.gradient]
        else:
            zero.all_grad_tensors[0] = [zero.all_grad_tensors[0][0] + zero.gradient]
        if zero.is_gradient_accumulation_boundary:
            zero.averaged_gradients[0], zero.all_grad_tensors[0] = zero.all_grad_tensors[0], None

    zero = SimpleNamespace(
        optimizer=optimizer_class([torch.nn.Parameter(torch.ones(1))]),
        cpu_offload=False,
        all_grad_tensors={},
        averaged_gradients={},
    )
    for gradients, right in (([1.0, 2.0, 4.0], 7.0), ([8.0, 16.0], 24.0), ([32.0], 32.0)):
        for gradient in gradients:
            zero.gradient = gradient
            zero.is_gradient_accumulation_boundary = gradient == gradients[-1]
            training_step._with_sums_gone_on_with(epilogue)(zero)
        assert zero.averaged_gradients[0] == [right if optimizer_class is ARSG else gradients[-1]]
        zero.averaged_gradients[0] = None


def test_on_cpu_ranks_every_gather_is_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that are used while they are gathered, as DeepSpeed before 0.19.8 awaits the last gather only;
    and gathers one after the other on a GPU, where all are awaited at once."""
    begun, awaited = [], []

    def gather(init: Any, parameters: list[str], hierarchy: int, *, quantize: bool) -> None:
        assert (init, hierarchy, quantize) == ("init", 0, False)
        begun.append(parameters)
        awaited.append(parameters[-1])

    repaired = training_step._with_every_weight_awaited(gather)
    repaired("init", ["a", "b", "c"], 0, quantize=False)
    repaired("init", [], 0, quantize=False)
    assert (begun, awaited) == ([["a"], ["b"], ["c"]], ["a", "b", "c"])
    monkeypatch.setattr(training_step, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))
    repaired("init", ["a", "b"], 0, quantize=False)
    assert begun[3:] == [["a", "b"]]


def undone(call: Any) -> Any:
    """A decorator that does not say what it wraps, like DeepSpeed's."""

    def inner(*args: Any) -> Any:
        return call(*args)

    return inner


class Old:
    def step(self) -> str:
        return "old"


class Same:
    @undone
    def step(self) -> str:
        return "old"


class New:
    @undone
    def step(self) -> str:
        return "new"

    def other(self) -> None:
        """What a repair of `step` relies on."""


def test_a_digest_is_that_of_the_text_below_any_wrapper() -> None:
    """Catches a repair that takes a changed method for the known one, since somebody else has wrapped both."""
    assert digest(Same, "step") != digest(New, "step")
    known = digest(Old, "step")
    wrap_once(Old, "step", lambda method: lambda self: method(self) + "!")
    assert Old().step() == "old!"
    assert digest(Old, "step") == known


def test_a_method_that_a_release_has_changed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a repair around a text it was not made for, without a word, and one that cannot be tried on purpose."""
    monkeypatch.setattr(patching, "_sources", {})
    known = {"New.step": {digest(New, "step"): "0.18.0"}, "New.later": {"absent": "0.18.0"}}
    monkeypatch.setattr(patching, "KNOWN_SOURCES", known)
    repair_once(New, "step", lambda method: lambda self: method(self))
    check_known()
    repair_once(New, "step", lambda method: lambda self: method(self), relies_on=("later", "other", "gone"))
    with pytest.raises(
        ValueError, match=r"has changed New\.other, New\.gone, which arsg_dist corrects.*install one of these"
    ):
        check_known()
    with pytest.raises(ValueError, match=r"has changed New\.other"):
        repair(optimizers=(torch.optim.AdamW,))
    monkeypatch.setenv("ARSG_UNKNOWN_DEEPSPEED", "1")
    with pytest.warns(UserWarning, match=r"has changed New\.other"):
        check_known()


def test_versions_that_do_not_need_a_repair_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a gradient scaled twice in a version that scales it itself."""
    monkeypatch.setattr(patching, "_sources", {})
    monkeypatch.setattr(deepspeed, "__version__", "0.18.2+here")

    class Plain:
        def step(self) -> str:
            return "plain"

    repair_once(Plain, "step", lambda method: lambda self: "repaired", since="0.18.3")
    repair_once(Plain, "step", lambda method: lambda self: "repaired", until="0.18.1")
    assert (Plain().step(), sources()) == ("plain", {})
    repair_once(Plain, "step", lambda method: lambda self: "repaired", since="0.18.2", until="0.18.9")
    assert Plain().step() == "repaired"


@pytest.mark.parametrize(("version", "asked_for"), [("0.18.9", FusedAdam), ("0.19.0", ARSG)])
def test_the_optimizer_that_older_versions_ask_for_is_gone_afterwards(
    version: str, asked_for: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches `offload_states` refused before 0.19.0, and an engine that is left with an optimizer not its own."""
    monkeypatch.setattr(deepspeed, "__version__", version)
    own = ARSG([torch.ones(1, requires_grad=True)])
    zero = SimpleNamespace(optimizer=own)
    with taken_for_fused_adam(zero):
        assert type(zero.optimizer) is asked_for
    assert zero.optimizer is own


def test_known_digests_say_which_versions_have_them() -> None:
    """Catches a range that a renewal out of order shortens, and a digest that replaces an older one."""
    known = renewed({}, "0.19.8", {"a": "new"})
    for version in ("0.18.10", "0.18.0", "0.18.9"):
        known = renewed(known, version, {"a": "old"})
    assert known == {"a": {"new": "0.19.8", "old": "0.18.0 to 0.18.10"}}


def test_the_table_of_versions_is_that_of_the_results() -> None:
    """Catches a table written by hand."""
    assert BEGIN + table(json.loads(RESULTS.read_text())) in DOCUMENT.read_text()


@pytest.mark.parametrize("wrong", [(torch.optim.AdamW([torch.ones(1)]),), ("AdamW",), (torch.nn.Module,)])
def test_repair_takes_classes_of_optimizers_only(wrong: Any) -> None:
    """Catches a repair that does nothing, since nothing is an instance of what was given."""
    with pytest.raises(TypeError, match="repair takes classes of optimizers"):
        repair(optimizers=wrong)


@pytest.mark.parametrize("optimizer_class", [ARSG, torch.optim.AdamW])
def test_only_arsg_skips_the_warm_up_step(optimizer_class: type[torch.optim.Optimizer]) -> None:
    """Catches a repair that changes engines with other optimizers."""
    copy, master = (
        torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)
    )
    optimizer = optimizer_class([master], weight_decay=0.1)
    wrapper = SimpleNamespace(optimizer=optimizer, fp16_groups=[[copy]], fp32_groups=[[master]])
    FP16_UnfusedOptimizer.initialize_optimizer_states(wrapper)
    assert (len(optimizer.state) == 0) == (optimizer_class is ARSG)
    assert torch.equal(master, torch.ones(3)) == (optimizer_class is ARSG)
    assert copy.grad is None
    assert master.grad is None


@pytest.mark.parametrize("optimizer_class", [ARSG, torch.optim.AdamW])
@pytest.mark.parametrize(
    ("offset", "size"), [(0, 1000), (1, 1000), (255, 1000), (256, 512), (300, 10), (77, 1203)]
)
def test_gradients_in_files_begin_where_they_can_be_read_back(
    optimizer_class: type[torch.optim.Optimizer], offset: int, size: int
) -> None:
    """Catches a file that is read to an address no direct read can write to: nothing is read, and no error raised; and
    a few elements in memory that keep the whole gradient there."""

    def swappable(tensor: torch.Tensor) -> bool:
        return tensor.numel() >= 256

    swapper = SimpleNamespace(
        optimizer=optimizer_class([torch.nn.Parameter(torch.ones(1))]),
        numel_alignment=256,
        is_swappable_tensor=swappable,
    )
    gradient = torch.arange(float(size))
    pieces, starts = OptimizerSwapper._adjust_for_misaligned_lengths(swapper, [gradient], [offset])
    found = torch.full((offset + size,), -1.0)
    for piece, start in zip(pieces, starts, strict=True):
        found[start : start + piece.numel()] = piece
    assert torch.equal(found[offset:], gradient)
    aligned = all(
        start % 256 == 0 and piece.numel() % 256 == 0
        for piece, start in zip(pieces, starts, strict=True)
        if swappable(piece)
    )
    kept = [piece.untyped_storage().nbytes() == piece.nbytes for piece in pieces if not swappable(piece)]
    assert (aligned and all(kept)) or optimizer_class is not ARSG
