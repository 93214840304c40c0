"""Stochastic rounding by an element's place in the whole parameter, whoever updates a part of it."""

from __future__ import annotations

import pytest
import torch

from arsg_dist import ARSG
from arsg_dist.optim.state import MOMENTS, set_places
from tests.optim.optim_paths import CAPTURABLE, FOREACH, FUSED, REFERENCE, Path, params_of

SIZES = (301, 57, 1024)


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(size, generator=generator) for size in SIZES]


def whole(**choice) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    params = [torch.nn.Parameter(torch.ones(size)) for size in SIZES]
    optimizer = ARSG(params, lr=0.1, state_dtype="bfloat16", **choice)
    for step in range(4):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad
        optimizer.step()
    names = MOMENTS[optimizer.param_groups[0]["preconditioner"]]
    return [p.detach() for p in params], [
        torch.cat([optimizer.state[param][name] for param in params]) for name in names
    ]


@pytest.mark.parametrize("mode", ["amsgrad", "adam"])
@pytest.mark.parametrize("path", params_of(REFERENCE, FOREACH, FUSED, CAPTURABLE))
@pytest.mark.parametrize("ranks", [1, 3])
def test_parts_of_a_flat_tensor_are_rounded_as_in_the_whole(path: Path, mode: str, ranks: int) -> None:
    """Catches random bits by the place in the flat tensor, a step counted once per part, and a part left out."""
    wanted, wanted_moments = whole(preconditioner=mode, **path.settings)
    total = sum(SIZES)
    part = -(-total // ranks)
    begins = [0, 301, 358]
    found, found_moments = [], []
    for rank in range(ranks):
        flat = torch.nn.Parameter(torch.ones(part))
        low, high = rank * part, min((rank + 1) * part, total)
        places = []
        for begin, size in zip(begins, SIZES, strict=True):
            first, last = max(begin, low), min(begin + size, high)
            if first < last:
                places.append((first - low, last - first, first - begin))
        set_places(flat, places)
        optimizer = ARSG([flat], lr=0.1, state_dtype="bfloat16", preconditioner=mode, **path.settings)
        for step in range(4):
            flat.grad = torch.zeros(part)
            flat.grad[: high - low] = torch.cat(gradients(step))[low:high]
            optimizer.step()
        assert int(optimizer.state[flat]["step"]) == 4
        found.append(flat.detach()[: high - low])
        found_moments.append([optimizer.state[flat][name][: high - low] for name in MOMENTS[mode]])
    assert torch.equal(torch.cat(found), torch.cat(wanted))
    for i, moment in enumerate(wanted_moments):
        assert torch.equal(torch.cat([moments[i] for moments in found_moments]), moment)
