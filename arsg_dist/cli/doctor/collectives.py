"""Test collectives with known answers, over Horovod or torch.distributed."""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from arsg_dist.cli.doctor.findings import Finding

_ROUNDS = 3


class Collectives(ABC):
    """The operations to test; each takes and returns flat float32 tensors."""

    @abstractmethod
    def allreduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks."""

    @abstractmethod
    def allgather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' tensors one after the other."""

    @abstractmethod
    def alltoall(self, tensor: Tensor) -> Tensor:
        """Return part r of every rank's tensor, where r is this rank."""

    @abstractmethod
    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return rank 0's tensor."""

    @abstractmethod
    def reducescatter(self, tensor: Tensor) -> Tensor | None:
        """Return this rank's part of the sum; None where this is not used."""

    @abstractmethod
    def notes(self, max_mib: float) -> list[Finding]:
        """Say what was tested, for the report."""


class TorchCollectives(Collectives):
    """torch.distributed's default group, which DeepSpeed uses."""

    def allreduce(self, tensor: Tensor) -> Tensor:
        """Call `all_reduce`."""
        dist.all_reduce(tensor)
        return tensor

    def allgather(self, tensor: Tensor) -> Tensor:
        """Call `all_gather_into_tensor`."""
        gathered = tensor.new_empty(tensor.numel() * dist.get_world_size())
        dist.all_gather_into_tensor(gathered, tensor)
        return gathered

    def alltoall(self, tensor: Tensor) -> Tensor:
        """Call `all_to_all_single`."""
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor)
        return received

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Call `broadcast`."""
        dist.broadcast(tensor, 0)
        return tensor

    def reducescatter(self, tensor: Tensor) -> Tensor | None:
        """Call `reduce_scatter_tensor`."""
        part = tensor.new_empty(tensor.numel() // dist.get_world_size())
        dist.reduce_scatter_tensor(part, tensor)
        return part

    def notes(self, max_mib: float) -> list[Finding]:
        """Name the backend and what ran over it."""
        return [
            Finding(
                "good",
                f"torch.distributed over {dist.get_backend()}: allreduce, allgather, alltoall, broadcast, "
                f"reducescatter tested with known answers up to {max_mib:g} MiB",
            )
        ]


class HorovodCollectives(Collectives):
    """Horovod's; it must be initialised."""

    def __init__(self) -> None:
        import horovod.torch as hvd

        self._hvd: Any = hvd

    def allreduce(self, tensor: Tensor) -> Tensor:
        """Call `hvd.allreduce`."""
        total: Tensor = self._hvd.allreduce(tensor, op=self._hvd.Sum, name=f"doctor.r{tensor.numel()}")
        return total

    def allgather(self, tensor: Tensor) -> Tensor:
        """Call `hvd.allgather`."""
        gathered: Tensor = self._hvd.allgather(tensor, name=f"doctor.g{tensor.numel()}")
        return gathered

    def alltoall(self, tensor: Tensor) -> Tensor:
        """Call `hvd.alltoall`."""
        received: Tensor = self._hvd.alltoall(tensor, name=f"doctor.a{tensor.numel()}")
        return received

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Call `hvd.broadcast`."""
        received: Tensor = self._hvd.broadcast(tensor, 0, name=f"doctor.b{tensor.numel()}")
        return received

    def reducescatter(self, tensor: Tensor) -> Tensor | None:
        """Call `hvd.reducescatter`, except over Gloo."""
        if self._over_gloo():
            return None
        part: Tensor = self._hvd.reducescatter(tensor, op=self._hvd.Sum, name=f"doctor.s{tensor.numel()}")
        return part

    def _over_gloo(self) -> bool:
        # As the sharded optimizer decides: whatever Horovod has besides.
        return bool(self._hvd.gloo_enabled())

    def notes(self, max_mib: float) -> list[Finding]:
        """Name the controller and what ran over it."""
        controller = "Gloo" if self._hvd.gloo_enabled() else "MPI"
        tested = "allreduce, allgather, alltoall, broadcast"
        if not self._over_gloo():
            tested += ", reducescatter"
        notes = [
            Finding(
                "good", f"Horovod over {controller}: {tested} tested with known answers up to {max_mib:g} MiB"
            )
        ]
        if self._over_gloo():
            notes.append(
                Finding(
                    "good",
                    "reducescatter over Gloo is known to corrupt data in Horovod 0.28.1: it is neither tested nor used",
                )
            )
        return notes


def self_test(
    collectives: Collectives, device: torch.device, rank: int, world_size: int, max_mib: float
) -> list[str]:
    """Compare every collective's results with the known answers. Collective.

    At several sizes, bit by bit.

    Args:
        collectives: to test.
        device: of the tensors.
        rank: of this process.
        world_size: number of ranks.
        max_mib: the largest message is about that long, others 1/64 of it and a few numbers.

    Returns:
        What went wrong on this rank.
    """
    errors = []
    largest = max(1, int(max_mib * 2**18) // world_size)
    for rows in dict.fromkeys((1, max(1, largest // 64), largest)):
        numel = rows * world_size
        base = torch.arange(numel, device=device, dtype=torch.float32).remainder_(997.0)
        for turn in range(_ROUNDS):
            mine = base * (rank + 1) + turn  # whole numbers: sums are exact in any order
            part = slice(rank * rows, (rank + 1) * rows)
            total = base * (world_size * (world_size + 1) // 2) + turn * world_size
            expected = {
                "allreduce": total,
                "allgather": torch.cat([base * (r + 1) + turn for r in range(world_size)]),
                "alltoall": torch.cat([base[part] * (r + 1) + turn for r in range(world_size)]),
                "broadcast": base + turn,
                "reducescatter": total[part],
            }
            for name, answer in expected.items():
                returned = getattr(collectives, name)(mine.clone())
                if returned is not None and not torch.equal(returned, answer):
                    errors.append(
                        f"{name} of {numel} float32 returned {int((returned != answer).sum())} wrong numbers"
                    )
    return errors
