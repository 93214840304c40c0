from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from arsg_dist import ARSG
from arsg_dist.deepspeed import register
from arsg_dist.deepspeed.patching import wrap_once

WRAPPED = [
    (DeepSpeedEngine, "_do_sanity_check"),
    (DeepSpeedEngine, "backward"),
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
