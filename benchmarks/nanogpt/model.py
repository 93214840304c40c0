"""The network of the track: a GPT of today, written anew after its description.

RMS norm with gains (one after the embedding, too), linear layers with biases, rotary embedding of half of each head,
normalised queries and keys, squared ReLU, logits capped smoothly at 15, untied embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

CAP = 15.0
ATTENTION_SCALE = 0.12
ROTARY_BASE = 1024.0


@dataclass(frozen=True)
class Size:
    """Of a network; the defaults are the track's.

    Attributes:
        vocabulary: tokens, padded to a multiple of 128 (GPT-2 has 50,257).
        layers: blocks.
        width: of the residual stream, a multiple of `head`.
        head: width of an attention head, a multiple of 4.
    """

    vocabulary: int = 50_304
    layers: int = 12
    width: int = 768
    head: int = 128


class Norm(nn.Module):
    """RMS norm with a gain per feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return functional.rms_norm(x, x.shape[-1:], self.gain.to(x.dtype))


class Affine(nn.Linear):
    """A linear layer that computes in the dtype of its input; its parameters are float32."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply it."""
        assert self.bias is not None
        return functional.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


def rotate(x: Tensor) -> Tensor:
    """Turn the features of heads by their position.

    Args:
        x: shape (batch, heads, time, features). Pairs are (i, i + features/2); their second half stands still.
    """
    half = x.shape[-1] // 2
    rates = ROTARY_BASE ** -torch.linspace(0, 1, half // 2, device=x.device)
    angles = torch.outer(torch.arange(x.shape[-2], device=x.device, dtype=torch.float32), rates)
    angles = functional.pad(angles, (0, half - half // 2))
    first, second = x.float().split(half, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.query, self.key, self.value, self.out = (Affine(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Attend to the positions up to each one's own."""

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, self.head)).transpose(1, 2)

        def turned(projected: Tensor) -> Tensor:
            return rotate(functional.rms_norm(heads(projected), (self.head,)))

        mixed = functional.scaled_dot_product_attention(
            turned(self.query(x)),
            turned(self.key(x)),
            heads(self.value(x)),
            scale=ATTENTION_SCALE,
            is_causal=True,
        )
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention, then two layers with a squared ReLU between, each added to the stream."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.before_attention, self.before_layers = Norm(width), Norm(width)
        self.attention = Attention(width, head)
        self.up, self.out = Affine(width, 4 * width), Affine(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        x = x + self.attention(self.before_attention(x))
        return x + self.out(self.up(self.before_layers(x)).relu().square())


class GPT(nn.Module):
    """The network; it returns the sum of the tokens' losses.

    Args:
        size: of it.
        dtype: of the embedding, and so of all that is computed; the other parameters are float32.
    """

    def __init__(self, size: Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width).to(dtype)
        self.blocks = nn.ModuleList(Block(size.width, size.head) for _ in range(size.layers))
        self.head = Affine(size.width, size.vocabulary)
        self.first_norm, self.last_norm = Norm(size.width), Norm(size.width)

    @torch.no_grad()
    def start(self, seed: int) -> None:
        """Fill the parameters as the track's baseline does: what ends a branch, and the head, with 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, param in self.named_parameters():
            if name.endswith("gain"):
                param.fill_(1)
            elif name.endswith("bias") or name.split(".")[-2] in ("out", "head"):
                param.zero_()
            else:
                spread = 1.0 if name.startswith("embedding") else (3 * param.shape[1]) ** -0.5
                param.copy_(spread * torch.randn(param.shape, generator=generator))

    def forward(self, tokens: Tensor, following: Tensor) -> Tensor:
        """Return the summed cross-entropy of the following tokens, both of shape (sequences, time)."""
        x = self.first_norm(self.embedding(tokens))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.last_norm(x)).float()
        logits = CAP * logits * (logits.square() + CAP**2).rsqrt()
        return functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum")
