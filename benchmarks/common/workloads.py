"""The two models that step-time benchmarks train, on random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


class Transformer(nn.Module):
    """A causal transformer with the sizes of GPT-2 small: 124.4 M parameters, the output layer is the embedding."""

    def __init__(
        self, vocabulary: int = 50257, width: int = 768, layers: int = 12, length: int = 1024
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, width // 64, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of int64 tokens (batch, length)."""
        length = tokens.shape[1]
        hidden = self.tokens(tokens) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(
            length, device=tokens.device, dtype=hidden.dtype
        )
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return functional.linear(self.norm(hidden), self.tokens.weight)


def resnet50() -> nn.Module:
    """torchvision's ResNet-50, 25.6 M parameters."""
    from arsg_dist.imagenet.torchvision_compat import torchvision

    model: nn.Module = torchvision.models.resnet50()
    return model


@dataclass(frozen=True)
class Workload:
    """A model with random data of its kind.

    Attributes:
        title: for tables.
        model: makes it, with random weights.
        inputs: (batch size, image side or sequence length) -> inputs; float ones are images.
        classes: number of labels.
    """

    title: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int, int], Tensor]
    classes: int

    def batch(self, size: int, side: int) -> tuple[Tensor, Tensor]:
        """Random inputs and labels; a sequence has one label per position."""
        inputs = self.inputs(size, side)
        shape = (size, side) if inputs.dtype == torch.int64 else (size,)
        return inputs, torch.randint(self.classes, shape)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over all labels, in fp32."""
    return functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


WORKLOADS = {
    "resnet50": Workload(
        "ResNet-50, 25.6 M parameters", resnet50, lambda size, side: torch.randn(size, 3, side, side), 1000
    ),
    "transformer": Workload(
        "transformer, 124.4 M parameters",
        Transformer,
        lambda size, side: torch.randint(50257, (size, side)),
        50257,
    ),
}
