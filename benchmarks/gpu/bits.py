"""Compare the bits of the GPU's kernel with those of the CPU's, or on a CPU of the CPU's with themselves."""

from __future__ import annotations

import argparse
import itertools
import warnings
from typing import Any

import torch

from arsg_dist import ARSG
from arsg_dist.optim.kernels.eight_bit import EightBit
from arsg_dist.optim.kernels.split_master import CORRECTION
from benchmarks.gpu.runner import say

SHAPES = [(2048,), (4500,), (131,), (7, 5), (1,), (), (513, 1029)]
STATES = ("float32", "bfloat16", "8bit")
MODES: dict[str, dict[str, Any]] = {
    "amsgrad": {"weight_decay": 0.1},
    "adam": {"preconditioner": "adam", "weight_decay": 0.1, "decoupled_weight_decay": True},
    "none": {"preconditioner": "none", "maximize": True},
    "laprop, cautious": {
        "preconditioner": "adam",
        "precondition_first": True,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
        "cautious_weight_decay": True,
    },
}


def trained(
    device: str, dtype: torch.dtype, state: str, settings: dict[str, Any], steps: int
) -> list[torch.Tensor]:
    """Return parameters and what is kept of them after some steps with noise for gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype).to(device)) for s in SHAPES]
    optimizer = ARSG(params, 0.01, fused=True, state_dtype=state, **settings)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype).to(device)
        optimizer.step()
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", CORRECTION)
    kept = [
        tensor
        for param in params
        for tensor in (param, *(optimizer.state[param][n] for n in names if n in optimizer.state[param]))
    ]
    return [
        part.detach().cpu()
        for tensor in kept
        for part in ((tensor.codes, tensor.exponents) if isinstance(tensor, EightBit) else (tensor,))
    ]


def main() -> None:
    """Print a result per kind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--short", action="store_true")
    arguments = parser.parse_args()
    kinds = list(itertools.product(MODES, (torch.float32, torch.bfloat16, torch.float16), STATES))
    shown = [*kinds[:2], kinds[2]] if arguments.short else kinds
    splits: list[Any] = [("amsgrad", "split", state) for state in (STATES[2:] if arguments.short else STATES)]
    for mode, dtype, state in [*shown, *splits]:
        split = dtype == "split"
        of = "bfloat16 parameters with split masters" if split else f"{str(dtype)[6:]} parameters"
        name = f"{mode}, {of}, {state} state"
        settings = MODES[mode] | ({"master": "split"} if split else {})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # a fall-back must not pass for the kernel
                pairs = [
                    trained(device, torch.bfloat16 if split else dtype, state, settings, 4)
                    for device in (arguments.device, "cpu")
                ]
            equal = [torch.equal(ours, theirs) for ours, theirs in zip(*pairs, strict=True)]
            say(kind="bits", case=name, ok=all(equal), equal=f"{sum(equal)} of {len(equal)} tensors")
        except Exception as error:
            say(kind="bits", case=name, ok=False, error=f"{type(error).__name__}: {error}"[:500])


if __name__ == "__main__":
    main()
