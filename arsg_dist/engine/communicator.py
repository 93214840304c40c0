"""Provide the few collectives that a training loop itself needs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from arsg_dist.engine.hosts import expected_hosts, missing_hosts, this_host
from arsg_dist.engine.job import JobError
from arsg_dist.engine.messages import check_sizes, decode, encode
from arsg_dist.engine.ranks import Ranks
from arsg_dist.engine.rendezvous import announce_to_torch, collective_timeout, end_mpi, init_method

T = TypeVar("T")

# Before 2.11 (seen in 2.6) a process group's destructor holds Python's lock while it waits for gloo's threads, and one
# of these may need the lock to let go of its last message: a job hung at its end. These groups end with the process.
_OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)
_kept: list[Any] = []


class Communicator(ABC):
    """Run collectives over all ranks, which make the same calls in one order."""

    rank: int
    world_size: int

    @abstractmethod
    def all_gather_object(self, value: T) -> list[T]:
        """Return every rank's `value`, in rank order, on every rank.

        Args:
            value: None, booleans, numbers, texts, tensors, and lists, tuples and dictionaries of them; see
                `messages.encode`. Nothing that a rank sends is run by another.

        Raises:
            TypeError: on every rank: a rank has a value of another kind.
        """

    @abstractmethod
    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of `tensor` over the ranks; shape and dtype are kept."""

    @abstractmethod
    def close(self) -> None:
        """End communication in an orderly way, once. Collective."""

    def start_any(self, flag: bool) -> Callable[[], bool]:
        """Start asking whether `flag` is true on any rank. Collective.

        Returns:
            What waits for the answer and returns it; every rank must call it before the next `start_any`.
        """
        answer = self.start_sum(torch.tensor([int(flag)]))
        return lambda: bool(answer())

    def start_sum(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start summing up a few numbers over the ranks. Collective.

        Args:
            tensor: on the CPU; must not be changed.

        Returns:
            What waits for the sum and returns it.
        """
        total = self.all_reduce_sum(tensor)
        return lambda: total

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self.all_gather_object(None)

    def from_rank_0(self, value: T) -> T:
        """Return rank 0's `value` on every rank."""
        return self.all_gather_object(value if self.rank == 0 else None)[0]  # type: ignore[return-value]

    @contextmanager
    def fail_together(self, *kinds: type[Exception]) -> Iterator[None]:
        """Run a block on every rank; if it failed on any, raise `JobError` on all.

        The alternative, one rank raising while the others wait for it in a collective, is a hang.

        Args:
            kinds: exceptions that mean bad input, default ValueError, TypeError, OSError and ImportError.

        Raises:
            JobError: on every rank, with each distinct message and the ranks that had it.
        """
        message = None
        kinds = kinds or (ValueError, TypeError, OSError, ImportError)
        try:
            yield
        except kinds as error:
            message = str(error) or repr(error)
        ranks_of: dict[str, list[int]] = {}
        for rank, text in enumerate(self.all_gather_object(message)):
            if text is not None:
                ranks_of.setdefault(text, []).append(rank)
        if ranks_of:
            raise JobError(
                "\n".join(
                    text
                    if len(ranks) == self.world_size
                    else f"{text} (on rank {', '.join(map(str, ranks))})"
                    for text, ranks in ranks_of.items()
                )
            )


class SingleProcessCommunicator(Communicator):
    """Answer for a job with one rank."""

    rank = 0
    world_size = 1

    def all_gather_object(self, value: T) -> list[T]:
        """Return `[value]`, as several ranks would send it."""
        return decode([encode(value)])

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor`."""
        return tensor

    def close(self) -> None:
        """Do nothing."""


class TorchCommunicator(Communicator):
    """Run collectives over a process group of torch.distributed.

    Args:
        device: where tensors must be for the group's backend (CPU for gloo, this rank's GPU for NCCL).
        group: default that of all ranks.
    """

    def __init__(self, device: torch.device, group: Any = None) -> None:
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._device, self._group = device, group
        # Small answers between hosts go past the GPU: reading one from it would wait for all work it has been given.
        self._host_group = group
        self._message_device = torch.device("cpu")
        if dist.get_backend(group) != "gloo":
            if self.world_size == dist.get_world_size():
                self._host_group = dist.new_group(backend="gloo", timeout=collective_timeout())
            else:  # all ranks would have to make one for every such group
                self._message_device = device

    def all_gather_object(self, value: T) -> list[T]:
        """Return every rank's `value`, past the GPU."""
        message, device = encode(value).to(self._message_device), self._message_device
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([message.numel()], device=device), group=self._host_group)
        numbers = [int(size) for size in sizes]
        check_sizes(numbers)
        messages = [torch.empty(max(numbers), dtype=torch.uint8, device=device) for _ in numbers]
        padded = torch.zeros_like(messages[0])
        padded[: message.numel()] = message
        dist.all_gather(messages, padded, group=self._host_group)
        return decode([received[:size].cpu() for received, size in zip(messages, numbers, strict=True)])

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks, on the device `tensor` was on."""
        total = tensor.detach().to(self._device, copy=True)
        dist.all_reduce(total, group=self._group)
        return total.to(tensor.device)

    def start_sum(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Sum up in main memory, while the caller goes on."""
        total = tensor.to(self._message_device, copy=True)
        work: Any = dist.all_reduce(total, group=self._host_group, async_op=True)

        def answer() -> torch.Tensor:
            work.wait()
            return total

        return answer

    def close(self) -> None:
        """Destroy the process group: gloo may hang when a process just ends."""
        self.barrier()
        if _OLD_TORCH:
            _kept.extend([dist.group.WORLD, self._host_group])
        dist.destroy_process_group()
        end_mpi()


def check_hosts(communicator: Communicator) -> None:
    """Close a job that came up on fewer hosts than it was started for, and stop every rank. Collective.

    Args:
        communicator: of all ranks of the job.

    Raises:
        JobError: on every rank, with the hosts that are there.
    """
    try:
        with communicator.fail_together():
            expected = expected_hosts()
        of_ranks = communicator.all_gather_object([str(expected), this_host()])
        # Some launchers lose variables on the way to other hosts: one rank that knows is enough.
        expected = max(int(number) for number, _ in of_ranks)
        if message := missing_hosts(expected, [host for _, host in of_ranks]):
            raise JobError(message)
    except JobError:
        communicator.close()
        raise


def device_of(ranks: Ranks) -> torch.device:
    """Return this rank's GPU, made the current one, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def connect_torch(ranks: Ranks) -> TorchCommunicator:
    """Join a job through torch.distributed: NCCL on GPUs, else Gloo. Collective.

    Args:
        ranks: from `discover_ranks`.

    Raises:
        ValueError: no launcher announced the ranks, or the job came up with another number of ranks.
        JobError: it came up on fewer hosts than it was started for.
    """
    if ranks.launcher in ("none", "horovodrun"):
        raise ValueError(
            "this process was not started by torchrun, srun or mpirun: "
            "start it with 'torchrun --nproc-per-node 2 SCRIPT ...'"
        )
    announce_to_torch(ranks)
    device = device_of(ranks)  # before the first collective, which would take device 0 on every rank
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = collective_timeout()
    options: dict[str, Any] = {"timeout": timeout} if timeout else {}
    dist.init_process_group(backend, init_method=init_method(), **options)
    return torch_communicator(ranks, device)


def require_backend(wanted: str) -> None:
    """Refuse a job whose ranks came up over another library than they were to.

    Args:
        wanted: "gloo", "nccl", or "auto" for whatever came up.

    Raises:
        ValueError: another came up, or none.
    """
    present = dist.get_backend() if dist.is_initialized() else "nothing"
    if wanted not in ("auto", present):
        why = "" if torch.cuda.is_available() else f": torch {torch.__version__} sees no GPU on this host"
        raise ValueError(
            f"engine_options.backend: {wanted} was asked for, and the ranks came up over {present}{why}; leave it out "
            "to take what there is"
        )


def torch_communicator(ranks: Ranks, device: torch.device) -> TorchCommunicator:
    """Make the communicator of a process group that has come up. Collective.

    Args:
        ranks: as the launcher announced them.
        device: see `TorchCommunicator`.

    Raises:
        ValueError: another number of ranks came up.
        JobError: they came up on fewer hosts than the job was started for.
    """
    communicator = TorchCommunicator(device)
    if communicator.world_size != ranks.world_size:
        raise ValueError(
            f"the launcher announced {ranks.world_size} ranks but {communicator.world_size} came up"
        )
    check_hosts(communicator)
    return communicator
