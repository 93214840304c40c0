"""The data and model of train.py, which finds this file because it lies beside it."""

import torch
from torch import nn

SAMPLES, UPDATES = 12, 5


def build_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(11, 23), nn.Tanh(), nn.Linear(23, 7))


class Samples(torch.utils.data.Dataset):
    """Every update sees the same samples, so the order does not matter."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.inputs = torch.randn(SAMPLES, 11, generator=generator)
        self.targets = torch.randn(SAMPLES, 7, generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index], self.targets[index]
