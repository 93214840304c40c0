"""Test collectives with known answers, over Horovod or torch.distributed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from arsg_dist.cli.doctor.findings import Finding

_ROUNDS = 3


@dataclass(frozen=True)
class Collectives:
    """The operations to test.

    Attributes:
        carrier: what runs them.
        operations: name → what takes and returns a flat float32 tensor, for those that are used. "allreduce" returns
            the sum over the ranks, "allgather" the ranks' tensors one after the other, "alltoall" part r of every
            rank's tensor, where r is this rank, "broadcast" rank 0's tensor, "reducescatter" its part of the sum.
        remarks: for the report.
    """

    carrier: str
    operations: dict[str, Callable[[Tensor], Tensor]]
    remarks: tuple[str, ...] = ()

    def notes(self, max_mib: float) -> list[Finding]:
        """Say what was tested, for the report."""
        tested = (
            f"{self.carrier}: {', '.join(self.operations)} tested with known answers up to {max_mib:g} MiB"
        )
        return [Finding("good", text) for text in (tested, *self.remarks)]


def torch_collectives() -> Collectives:
    """Return those of torch.distributed's default group, which DeepSpeed uses."""
    ranks = dist.get_world_size()

    def in_place(operation: Callable[..., Any], tensor: Tensor, *arguments: int) -> Tensor:
        operation(tensor, *arguments)
        return tensor

    def into(operation: Callable[..., Any], numel: int, tensor: Tensor) -> Tensor:
        result = tensor.new_empty(numel)
        operation(result, tensor)
        return result

    return Collectives(
        f"torch.distributed over {dist.get_backend()}",
        {
            "allreduce": lambda tensor: in_place(dist.all_reduce, tensor),
            "allgather": lambda tensor: into(dist.all_gather_into_tensor, tensor.numel() * ranks, tensor),
            "alltoall": lambda tensor: into(dist.all_to_all_single, tensor.numel(), tensor),
            "broadcast": lambda tensor: in_place(dist.broadcast, tensor, 0),
            "reducescatter": lambda tensor: into(dist.reduce_scatter_tensor, tensor.numel() // ranks, tensor),
        },
    )


def horovod_collectives() -> Collectives:
    """Return Horovod's; it must be initialised."""
    import horovod.torch as hvd

    operations: dict[str, Callable[[Tensor], Tensor]] = {
        "allreduce": lambda tensor: hvd.allreduce(tensor, op=hvd.Sum, name=f"doctor.r{tensor.numel()}"),
        "allgather": lambda tensor: hvd.allgather(tensor, name=f"doctor.g{tensor.numel()}"),
        "alltoall": lambda tensor: hvd.alltoall(tensor, name=f"doctor.a{tensor.numel()}"),
        "broadcast": lambda tensor: hvd.broadcast(tensor, 0, name=f"doctor.b{tensor.numel()}"),
    }
    # As the sharded optimizer decides: whatever Horovod has besides.
    if hvd.gloo_enabled():
        known = "reducescatter over Gloo is known to corrupt data in Horovod 0.28.1: it is neither tested nor used"
        return Collectives("Horovod over Gloo", operations, (known,))
    operations["reducescatter"] = lambda tensor: hvd.reducescatter(
        tensor, op=hvd.Sum, name=f"doctor.s{tensor.numel()}"
    )
    return Collectives("Horovod over MPI", operations)


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
            for name, operation in collectives.operations.items():
                returned, answer = operation(mine.clone()), expected[name]
                if not torch.equal(returned, answer):
                    errors.append(
                        f"{name} of {numel} float32 returned {int((returned != answer).sum())} wrong numbers"
                    )
    return errors
