"""A small training problem that every engine and the single-process reference can run on the same data."""

import itertools

import torch
from torch import Tensor, nn

from arsg_dist import ARSG

BATCH = 24  # divides over 1, 2, 3 ranks × 1, 2 accumulation steps
UPDATES = 6
HYPERPARAMETERS = {"lr": 0.02, "eps": 1e-3, "mu": 0.1, "weight_decay": 1e-3}


def build_model(*hidden: int) -> nn.Module:
    """Three layers; the numbers of elements are not divisible by 2 or 3, so shards need padding.

    Args:
        hidden: sizes of hidden layers instead.
    """
    torch.manual_seed(0)
    sizes = (17, *(hidden or (101, 67)), 5)
    layers = [module for pair in itertools.pairwise(sizes) for module in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def batch(update: int) -> tuple[Tensor, Tensor]:
    """The whole batch of an update: inputs (24, 17) and targets (24, 5). Gradients have a norm well above 1."""
    generator = torch.Generator().manual_seed(1000 + update)
    return 3 * torch.randn(BATCH, 17, generator=generator), 5 * torch.randn(BATCH, 5, generator=generator)


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error over the batch."""
    return (outputs - targets).pow(2).sum(dim=1).mean()


def single_process_weights(updates: int = UPDATES, *, clip_grad_norm: float = 0.0) -> dict[str, Tensor]:
    """The oracle: one process, the whole batch, the reference path of the optimizer."""
    model = build_model()
    optimizer = ARSG(model.parameters(), **HYPERPARAMETERS, foreach=False, fused=False)
    for update in range(updates):
        optimizer.zero_grad()
        inputs, targets = batch(update)
        loss_of(model(inputs), targets).backward()
        if clip_grad_norm:
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad_norm) > clip_grad_norm
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
