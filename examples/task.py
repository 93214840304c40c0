"""The small problem of all examples: your network and data take its place."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from arsg_dist import ARSG, RemoteObservation

UPDATES = 4
SETTINGS: dict[str, Any] = {"lr": 0.02, "mu": 0.2, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.01}


class Network(nn.Module):
    """Two layers; called with labels it returns the loss, too, as Hugging Face's Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(7, 9), nn.Linear(9, 3)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Compute logits, and the mean loss if there are labels."""
        logits = self.head(torch.tanh(self.hidden(inputs)))
        return {"logits": logits} if labels is None else {"loss": loss_of(logits, labels), "logits": logits}


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return nn.functional.cross_entropy(logits, labels)


def samples() -> tuple[Tensor, Tensor]:
    """Return inputs and labels of one global batch of 12, which every update takes."""
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(12, 7, generator=generator), torch.randint(3, (12,), generator=generator)


def share_of(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Return the part of the batch that a rank computes."""
    inputs, labels = samples()
    return inputs[rank::world_size], labels[rank::world_size]


def arsg(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Make the optimizer of the examples."""
    return ARSG(parameters, **SETTINGS)


def remote_observation(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Make another one: remote observation around AdamW without momentum of its own."""
    inner = torch.optim.AdamW(parameters, lr=0.004, betas=(0.0, 0.99), weight_decay=0.01)
    return RemoteObservation(inner, mu=0.2, beta1=0.9)


OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "arsg": arsg,
    "remote": remote_observation,
}


def options(**choices: list[str]) -> argparse.Namespace:
    """Read an example's arguments; the first of the choices is the default."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True, help="file for the weights, .safetensors")
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0])
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser.parse_args()


def save(weights: dict[str, Tensor], output: Path) -> None:
    """Save whole weights, on rank 0."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, output)


def train_alone(optimizer: str = "arsg", *, decay_biases: bool = True) -> dict[str, Tensor]:
    """Train in a single process: what every example must end with.

    Args:
        optimizer: of `OPTIMIZERS`.
        decay_biases: whether weight decay acts on them; in Hugging Face's Trainer it does not.
    """
    network = Network()
    parameters: list[Any] = [*network.parameters()]
    if not decay_biases:
        parameters = [
            {"params": [parameter], "weight_decay": SETTINGS["weight_decay"] if parameter.dim() > 1 else 0.0}
            for parameter in parameters
        ]
    made = OPTIMIZERS[optimizer](parameters)
    for _ in range(UPDATES):
        made.zero_grad()
        network(*samples())["loss"].backward()
        made.step()
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
