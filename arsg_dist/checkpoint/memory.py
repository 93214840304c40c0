"""Keep the main memory into which the states that are saved in the background are copied."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from arsg_dist.engine.state import Piece


class Memory:
    """Keep one copy of each piece, and its memory for the next one.

    A system hands out memory when it is first written to, page by page, which takes several times as long as the
    copying. So it is kept, and `prepare` has a thread do that for the first copy while training goes on.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._preparing: threading.Thread | None = None

    def prepare(self, pieces: Sequence[Piece]) -> None:
        """Start to provide memory for pieces like these; returns at once."""
        self._wait()
        # Without the tensors themselves: a thread that held them would keep the training's memory.
        wanted = [(piece.key, piece.start, piece.numel, piece.dtype, _gpu_of(piece)) for piece in pieces]

        def touch() -> None:
            for key, start, numel, dtype, gpu in wanted:
                try:
                    self._kept[key, start] = _allocate(numel, dtype, gpu).zero_()
                except (RuntimeError, MemoryError):
                    return  # `copy` meets it again, in the thread that can report it

        self._preparing = threading.Thread(target=touch, name="checkpoint memory", daemon=True)
        self._preparing.start()

    def copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Copy pieces, over the copies made before.

        Raises:
            RuntimeError: there is not enough memory.
        """
        self._wait()
        copies = []
        for piece in pieces:
            values = piece.values()
            kept = self._kept.get((piece.key, piece.start))
            if kept is None or kept.shape != values.shape or kept.dtype != values.dtype:
                kept = _allocate(piece.numel, values.dtype, _gpu_of(piece))
                self._kept[piece.key, piece.start] = kept
            copies.append(Piece(piece.key, piece.start, piece.numel, kept.copy_(values, non_blocking=True)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _wait(self) -> None:
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None


def _gpu_of(piece: Piece) -> torch.device | None:
    return piece.source.device if piece.source.is_cuda else None


def _allocate(numel: int, dtype: torch.dtype, gpu: torch.device | None) -> Tensor:
    """Allocate main memory: page-locked if it is for copies from a GPU."""
    if gpu is None:
        return torch.empty(numel, dtype=dtype)
    with torch.cuda.device(gpu):  # a thread begins with the first GPU, where another rank may be
        return torch.empty(numel, dtype=dtype, pin_memory=True)
