from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from arsg_dist import ARSG
from arsg_dist.deepspeed import register
from arsg_dist.deepspeed.repairs import wrap_once

WRAPPED = [
    (DeepSpeedEngine, "_do_sanity_check"),
    (DeepSpeedEngine, "backward"),
    (FP16_UnfusedOptimizer, "initialize_optimizer_states"),
    (DeepSpeedZeroOptimizer_Stage3, "step"),
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
