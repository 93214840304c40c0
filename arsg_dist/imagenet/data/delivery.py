"""Get batches from loader processes, or the reason why none comes."""

import errno
import multiprocessing
import os
import shutil
import signal
import threading
import weakref
from collections.abc import Callable
from multiprocessing import connection
from typing import Any, Final

from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from arsg_dist.imagenet.config import DataConfig

SHARED_MEMORY: Final = "/dev/shm"
"""Where torch keeps what loader processes send to their rank."""

_PREFETCHED: Final = 2  # batches per loader process, torch's own default
_LOOK_EVERY: Final = 1.0  # seconds between two looks whether the loader processes live
_MIB: Final = 2**20
_REMEDY: Final = (
    "give it more room (docker --shm-size, in Kubernetes an emptyDir of medium Memory mounted there), or choose a "
    "lower data.workers (0 loads in the training process) or smaller batches"
)


class LoadingError(Exception):
    """Report that the loader processes of this rank deliver no more batches."""


def require_shared_memory(
    config: DataConfig, *, batch_size: int, val_batch_size: int, ranks_here: int, pinned: bool
) -> None:
    """Refuse loader processes whose batches do not fit into shared memory.

    Loader processes work ahead. A batch stays in shared memory until the rank takes it; with page-locked memory a
    thread of the rank takes it at once.

    Args:
        config: of the data.
        batch_size: images per rank and training batch; 0 where nothing is trained.
        val_batch_size: images per rank and validation batch; 0 where nothing is validated.
        ranks_here: ranks on this host.
        pinned: whether batches go into page-locked memory.

    Raises:
        ValueError: they do not fit, with what would help.
    """
    if not config.workers or config.loader == "dali" or not os.path.isdir(SHARED_MEMORY):
        return
    train = batch_size * 3 * config.full_train_size**2
    val = val_batch_size * 3 * config.image_size**2
    # While the rank validates, batches of training wait as well.
    of_a_rank = config.workers * (max(train, val) if pinned else _PREFETCHED * (train + val))
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < of_a_rank * ranks_here:
        batches = [
            f"{images} images of {size} × {size} {where}"
            for images, size, where in (
                (batch_size, config.full_train_size, "per rank"),
                (val_batch_size, config.image_size, "in validation"),
            )
            if images
        ]
        raise ValueError(
            f"{SHARED_MEMORY} has {free / _MIB:,.1f} MiB free, and the loader processes of {ranks_here} "
            f"{'ranks' if ranks_here > 1 else 'rank'} on this host need {of_a_rank * ranks_here / _MIB:,.1f} MiB "
            f"(data.workers={config.workers}, {', '.join(batches)}): {_REMEDY}"
        )


class Undelivered:
    """What a loader process sends in place of a batch that it cannot send.

    Args:
        reason: for the user.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason


class Shared:
    """Put the batches of `collate` into shared memory, in loader processes.

    Left to torch, a thread of the loader process does it after that: when there is no room, it prints a traceback, and
    the rank waits for ever.

    Args:
        collate: makes a batch of a list of samples; the batch has a method `share_memory_`.
    """

    def __init__(self, collate: Any) -> None:
        self._collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        """Return the batch, or `Undelivered`."""
        batch = self._collate(samples)
        if get_worker_info() is None:
            return batch
        try:
            return batch.share_memory_()
        except (RuntimeError, OSError) as error:
            return Undelivered(_no_room(error))


def _no_room(error: Exception) -> str:
    usage = shutil.disk_usage(SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else None
    room = f" ({usage.free / _MIB:,.1f} of {usage.total / _MIB:,.1f} MiB are free)" if usage else ""
    return f"no batch can be put into {SHARED_MEMORY}{room}: {error}; {_REMEDY}"


class WatchedLoader(DataLoader[Any]):
    """Load as a `DataLoader`; raise `LoadingError` where that one would wait for ever.

    Args:
        patience: seconds that a rank waits for a batch of its loader processes; 0 for ever.
        arguments: of the `DataLoader`.
    """

    def __init__(self, *arguments: Any, patience: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._patience = patience

    @property
    def patience(self) -> float:
        """Seconds that a rank waits for a batch of its loader processes; 0 for ever."""
        return self._patience

    def _get_iterator(self) -> _BaseDataLoaderIter:
        if not self.num_workers:
            return super()._get_iterator()
        try:
            return _WatchedIterator(self)
        except OSError as error:
            # The semaphores of queues are in shared memory too.
            reason = _no_room(error) if error.errno == errno.ENOSPC else str(error)
            raise LoadingError(f"loader processes cannot be started: {reason}") from error


class _WatchedIterator(_MultiProcessingDataLoaderIter):
    """Batches of loader processes that are asked, every few seconds, whether they live."""

    def __init__(self, loader: WatchedLoader) -> None:
        # First, since torch waits for the processes already.
        self._patience = loader.patience
        self._interval = min(_LOOK_EVERY, self._patience or _LOOK_EVERY)
        self._stuck = StuckCall(self, _WatchedIterator._end_processes, self._interval, self._patience)
        super().__init__(loader)

    def _get_data(self) -> Any:
        """Wait for the next answer of a loader process, which torch calls for batches and at each pass's start."""
        with self._stuck:
            while not self._stuck.ended:
                try:
                    # A batch that was announced is fetched from the process that made it, without a limit of time.
                    found, data = self._try_get_data(self._interval)  # type: ignore[no-untyped-call]
                except (RuntimeError, OSError, EOFError) as error:
                    if self._stuck.ended:
                        break
                    raise LoadingError(
                        self._fate() or f"loader processes cannot be heard: {error}"
                    ) from error
                if found:
                    if isinstance(answer := data[1], Undelivered):
                        raise LoadingError(answer.reason)
                    return data
                if self._pin_memory and not self._pin_memory_thread.is_alive():
                    raise LoadingError("the thread that puts batches into page-locked memory has ended")
        raise LoadingError(
            f"no batch came from the loader processes in {self._patience:g} s (data.timeout): the file system that "
            "they read from may hang, or be slower than that"
        )

    def _fate(self) -> str:
        """Say how loader processes have ended; empty if none has."""
        # A connection may break a moment before the process is known to be dead.
        connection.wait([process.sentinel for process in self._processes()], timeout=_LOOK_EVERY)
        dead = [process for process in self._processes() if not process.is_alive()]
        return "; ".join(
            f"loader process {process.pid} has ended: {_cause(process.exitcode)}" for process in dead
        )

    def _end_processes(self) -> None:
        """Kill loader processes: what hangs does not end with its rank."""
        for process in self._processes():
            process.kill()

    def _processes(self) -> list[multiprocessing.Process]:
        return self._workers


class StuckCall:
    """Watch the calls made inside its blocks, in a thread, and end one that has hung for too long.

    Args:
        owner: what makes the calls; the thread ends with it.
        end: ends the call that is under way, for the owner.
        interval: seconds between two looks. The limit is counted in looks: a job that was suspended has not waited.
        limit: seconds, to which less than an interval may be added; 0 for ever.
    """

    def __init__(self, owner: Any, end: Callable[[Any], None], interval: float, limit: float) -> None:
        self.ended = False
        self._calls = 0
        self._under_way = False
        if limit:
            threading.Thread(
                target=self._watch, args=(weakref.ref(owner), end, interval, limit), daemon=True
            ).start()

    def __enter__(self) -> None:
        self._calls += 1
        self._under_way = True

    def __exit__(self, *_: object) -> None:
        self._under_way = False

    def _watch(self, owner: Any, end: Callable[[Any], None], interval: float, limit: float) -> None:
        call, looks = 0, 0
        while owner() is not None:
            _PAUSE.wait(interval)
            looks = looks + 1 if self._under_way and self._calls == call else 0
            call = self._calls
            if looks * interval >= limit and (alive := owner()) is not None:
                self.ended = True
                end(alive)
                return


_PAUSE: Final = threading.Event()  # never set


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hints = {
        signal.SIGKILL: ", which the kernel sends where memory runs out (fewer data.workers need less)",
        signal.SIGBUS: f", which comes where {SHARED_MEMORY} is full: {_REMEDY}",
    }
    return f"killed by {name}{hints.get(-code, '')}"  # type: ignore[call-overload]
