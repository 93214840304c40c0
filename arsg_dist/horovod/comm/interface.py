"""The part of Horovod's optimizer interface that both forms share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import horovod.torch as hvd
from torch.optim import Optimizer


class HorovodOptimizer(Optimizer):
    """Know Horovod's idiom for gradients that are synchronized before `step()`."""

    _should_synchronize = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Declare, around `step()`, that `synchronize()` was called before."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True


def check_passes(passes: Any) -> None:
    """Refuse a number of backward passes that is not a positive integer.

    Raises:
        ValueError: it is not.
    """
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise ValueError(f"backward_passes_per_step must be a positive integer, got {passes!r}")


def check_predivide_factor(factor: float, op: Any) -> None:
    """Refuse a gradient_predivide_factor that is not positive, or without an average.

    Raises:
        ValueError: it is so.
    """
    if not factor > 0:
        raise ValueError(f"gradient_predivide_factor must be positive, got {factor}")
    if factor != 1.0 and op != hvd.Average:
        raise ValueError("gradient_predivide_factor needs op=hvd.Average")
