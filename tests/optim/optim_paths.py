"""The implementations under test and small helpers shared by the optimizer's tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from arsg_dist.optim.kernels import cpu_library

torch.set_num_threads(1)


@dataclass(frozen=True)
class Path:
    name: str
    settings: dict[str, Any] = field(hash=False)
    devices: tuple[str, ...] = ("cpu", "cuda")


REFERENCE = Path("reference", {"foreach": False, "fused": False})
FOREACH = Path("foreach", {"foreach": True})
FUSED = Path("fused", {"fused": True})
CAPTURABLE = Path("capturable", {"foreach": False, "capturable": True})
FOREACH_CAPTURABLE = Path("foreach-capturable", {"foreach": True, "capturable": True})


def fused_missing(device: str = "cpu") -> str | None:
    """Why the fused path cannot run here on a kind of device, or None; on a GPU it is another kernel."""
    if device == "cpu" and not cpu_library.PATH.exists():
        return f"the compiled kernel {cpu_library.PATH} is not built"
    return None


def params_of(*paths: Path, device: str = "cpu") -> list[Any]:
    """Paths as pytest parameters, each skipped with a reason where it cannot run."""
    reasons = {FUSED.name: fused_missing(device)}
    return [
        pytest.param(path, id=path.name, marks=pytest.mark.skip(reason=reason) if reason else ())
        for path in paths
        for reason in [reasons.get(path.name)]
    ]


PATHS = params_of(REFERENCE, FOREACH, FUSED)
FAST_PATHS = params_of(FOREACH, FUSED)
ALL_PATHS = params_of(REFERENCE, FOREACH, FUSED, CAPTURABLE, FOREACH_CAPTURABLE)
CUDA_PATHS = params_of(REFERENCE, FOREACH, FUSED, CAPTURABLE, FOREACH_CAPTURABLE, device="cuda")
MODES = ("amsgrad", "adam", "none")


def gradients(
    shapes: list[tuple[int, ...]], steps: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
):
    """Reproducible noisy gradients around a fixed mean, one list of tensors per step."""
    generator = torch.Generator().manual_seed(seed)
    means = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [
        [
            (mean + torch.randn(mean.shape, generator=generator, dtype=torch.float64)).to(dtype)
            for mean in means
        ]
        for _ in range(steps)
    ]


def parameters(shapes: list[tuple[int, ...]], *, seed: int = 1, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def run(
    optimizer: torch.optim.Optimizer, params: list[torch.Tensor], grads: list[list[torch.Tensor]]
) -> None:
    """One step per entry of `grads`; every gradient is handed over as an own copy."""
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, relative: float, what: str = "") -> None:
    """Largest deviation relative to the largest expected entry."""
    if expected.numel() == 0:
        assert actual.shape == expected.shape
        return
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    error = ((actual.to(expected.dtype) - expected).abs().max() / scale).item()
    assert error <= relative, f"{what}: relative error {error:.3g} > {relative:.3g}"
