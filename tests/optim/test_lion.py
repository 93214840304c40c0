"""Lion against pytorch_optimizer's."""

import pytest
import torch
from pytorch_optimizer import Lion as Theirs
from torch import Tensor

from arsg_dist import Lion


def path(
    kind: type[torch.optim.Optimizer], shapes: list[tuple[int, ...]], **settings: object
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]
    optimizer = kind(params, **settings)
    for step in range(50):
        for index, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.grad = None if index == step % 3 else grad  # one of them has none
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("settings", [{}, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}])
def test_it_is_lion(settings: dict[str, object]) -> None:
    """Catches the two decay rates in each other's place, a decay of the moved weights, and a parameter without gradient
    that moves."""
    shapes: list[tuple[int, ...]] = [(4, 3), (), (0,), (5,)]
    for ours, theirs in zip(path(Lion, shapes, **settings), path(Theirs, shapes, **settings), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_maximize_goes_the_other_way() -> None:
    """Catches a sign that decay or momentum does not follow."""
    x = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    x.grad = torch.tensor([2.0, 3.0])
    optimizer = Lion([x], lr=0.5, weight_decay=0.1, maximize=True)
    optimizer.step()
    assert x.tolist() == pytest.approx([1.0 * 0.95 + 0.5, -1.0 * 0.95 + 0.5])
    assert optimizer.state[x]["exp_avg"].tolist() == pytest.approx([-0.02, -0.03])


def test_bad_settings_are_refused() -> None:
    """Catches a rate that makes the average grow, and AdamW's lr given as text."""
    x = [torch.nn.Parameter(torch.ones(1))]
    with pytest.raises(ValueError, match=r"betas\[1\]"):
        Lion(x, betas=(0.9, 1.5))
    with pytest.raises(TypeError, match="lr must be a number"):
        Lion(x, lr="1e-4")  # type: ignore[arg-type]
