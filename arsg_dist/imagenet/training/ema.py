"""Keep a moving average of the weights beside the training."""

import copy
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from arsg_dist.optim.state import local


class WeightAverage:
    """Exponential moving average of parameters and buffers, in float32; a rank holds what it holds of the weights.

    After each update: average ← decay·average + (1 − decay)·weights. Under mixed precision of DeepSpeed the weights are
    the half-precision ones the network computes with. Batch norm's running statistics are averaged as the weights are.

    Args:
        model: float32, before an engine has cast or partitioned it; copied.
        decay: in [0, 1).

    Attributes:
        module: the network with the averaged weights, in evaluation mode; to be given to `Engine.hold`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self._updates = torch.tensor(0)
        self._average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after an update.

        Args:
            model: as in the constructor, by now in any floating dtype; this rank holds of it what it holds of `module`.
        """
        of_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for average, current in zip(_tensors(self.module), _tensors(model), strict=True):
            averages, weights = of_dtype.setdefault(average.dtype, ([], []))
            averages.append(average)
            weights.append(current.float() if current.is_floating_point() else current)
        for averages, weights in of_dtype.values():
            if not self._updates:
                torch._foreach_copy_(averages, weights)
            else:
                self._average(averages, weights, self._updates)
        self._updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return the number of updates and the averaged parameters, by name.

        Buffers are not among them: they differ between ranks.
        """
        return {"updates": self._updates, **dict(self.module.named_parameters())}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state, which has every name and shape of `state_dict`."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield what this rank holds of parameters and buffers."""
    return (local(tensor.detach()) for tensor in chain(module.parameters(), module.buffers()))
