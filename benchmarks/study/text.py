"""A small GPT on the characters of a text. The text is read, never downloaded."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.study.problem import Problem

TEXT = Path("text/tinyshakespeare.txt.gz")


@cache
def symbols(path: Path) -> tuple[Tensor, int]:
    """Return a text as numbers of the bytes that occur in it, and how many different ones do."""
    raw = torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8)
    present, numbers = raw.unique(return_inverse=True)
    return numbers, len(present)


class Block(nn.Module):
    """Pre-norm attention and MLP, without biases.

    Args:
        width: of the residual stream.
        heads: of the attention.
        causal: whether a place sees only those before it.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.before_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream behind the block."""
        batch, length, width = x.shape
        parts = self.query_key_value(self.before_attention(x))
        query, key, value = parts.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.attended(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.before_mlp(x))))


class GPT(nn.Module):
    """Pre-norm decoder with learned positions; width/32 heads, the output matrix is not tied to the embedding.

    Args:
        vocabulary: how many symbols.
        length: longest sequence.
        width: of the residual stream.
        layers: how many blocks.
    """

    def __init__(self, vocabulary: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*(Block(width, width // 32, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:
            for last in (block.attended, block.down):
                nn.init.normal_(last.weight, std=0.02 / (2 * layers) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of the next symbol at every place."""
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        return self.output(self.norm(self.blocks(x)))


class TextProblem(Problem):
    """Next symbol of Shakespeare: the first 90 % to train on, the rest to validate.

    Args:
        seed: of weights and batches.
        data: directory that holds `TEXT`.
        width: of the network.
        layers: of the network.
        length: symbols per sequence.
        sequences: per batch.

    Raises:
        ValueError: the text is not there.
    """

    def __init__(
        self, seed: int, data: Path | None, width: int, layers: int, length: int, sequences: int
    ) -> None:
        if data is None or not (data / TEXT).is_file():
            raise ValueError(f"--data: no {TEXT} in {data}")
        tokens, vocabulary = symbols(data / TEXT)
        cut = len(tokens) * 9 // 10
        self._train, self._val = tokens[:cut], tokens[cut:]
        self._length, self._sequences, self._seed = length, sequences, seed
        torch.manual_seed(seed)
        self.module = GPT(vocabulary, length, width, layers)

    def batch_loss(self, update: int) -> Tensor:
        """Return the mean cross entropy of sequences at random places."""
        generator = torch.Generator().manual_seed(100_000 * (self._seed + 1) + update)
        starts = torch.randint(len(self._train) - self._length, (self._sequences,), generator=generator)
        return self._loss(self._train, starts)

    def validation_loss(self, full: bool) -> float:
        """Return the mean cross entropy of evenly spaced sequences of the last tenth."""
        return self._mean(self._val, 256 if full else 64)

    def training_loss(self) -> float:
        """Return the same of the first nine tenths."""
        return self._mean(self._train, 256)

    def _loss(self, tokens: Tensor, starts: Tensor) -> Tensor:
        chosen = tokens[starts[:, None] + torch.arange(self._length + 1)]
        return functional.cross_entropy(self.module(chosen[:, :-1]).flatten(0, 1), chosen[:, 1:].flatten())

    @torch.no_grad()
    def _mean(self, tokens: Tensor, sequences: int) -> float:
        starts = torch.linspace(0, len(tokens) - self._length - 1, sequences).long()
        losses = [float(self._loss(tokens, part)) for part in starts.split(64)]
        return sum(losses) / len(losses)
