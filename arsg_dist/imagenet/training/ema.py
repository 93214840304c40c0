"""Keep a moving average of the weights beside the training."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class WeightAverage:
    """Exponential moving average of parameters and buffers, in float32, on every rank.

    After each update: average ← decay·average + (1 − decay)·weights. Under mixed precision of DeepSpeed the weights are
    the half-precision ones the network computes with. Batch norm's running statistics are averaged as the weights are.

    Args:
        model: float32, before an engine has cast or partitioned it; copied.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self._average.requires_grad_(False)
        self._average.eval()

    @property
    def module(self) -> nn.Module:
        """The network with the averaged weights, in evaluation mode."""
        module: nn.Module = self._average.module
        return module

    def to(self, device: torch.device) -> "WeightAverage":
        """Move the average to where the model is."""
        self._average.to(device)
        return self

    def update(self, model: nn.Module) -> None:
        """Take in the weights after an update.

        Args:
            model: as in the constructor, by now in any floating dtype; its parameters must be whole on this rank.
        """
        self._average.update_parameters(_Float32(model))  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the number of updates and the averaged parameters, by name.

        Buffers are not among them: they differ between ranks.
        """
        return {"updates": self._average.n_averaged, **dict(self.module.named_parameters())}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved state, which has every name and shape of `state_dict`."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


class _Float32:
    """A model as `AveragedModel` reads it, its half-precision tensors cast: torch averages equal dtypes only."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def parameters(self) -> Iterator[Tensor]:
        return map(_cast, self._model.parameters())

    def buffers(self) -> Iterator[Tensor]:
        return map(_cast, self._model.buffers())


def _cast(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
