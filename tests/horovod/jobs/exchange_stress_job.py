"""Job for one rank: hundreds of exchanges at the sizes of real buckets, compared bit by bit.

usage: exchange_stress_job.py alltoall | reducescatter MEGABYTES SECONDS

"reducescatter" is Horovod's own: rounds until the self-test of construction has found it wrong, then rounds until the
comparison with a second sum has; each for SECONDS at most.
"""

import sys
import time

import torch

from arsg_dist.horovod.comm.collectives import AllToAllReduceScatter, BufferPool, NativeReduceScatter
from arsg_dist.horovod.comm.process_groups import Group
from arsg_dist.horovod.comm.verification import CheckedReduceScatter, check_exchanges
from tests.horovod.jobs import run_job

# By dtype and MB; two buckets are under way in each round. Large ones have fewer rounds, for their time.
ROUNDS = {
    (torch.float32, 1): 100,
    (torch.float32, 2): 100,
    (torch.float32, 4): 25,
    (torch.float32, 8): 20,
    (torch.bfloat16, 4): 15,
    (torch.float32, 16): 4,
    (torch.float32, 32): 2,
    (torch.float32, 64): 1,
}
ROUNDS_AT_ONCE = 10


def numel_of(megabytes: float, dtype: torch.dtype, group: Group) -> int:
    unit = 16 * group.size
    return int(megabytes * 2**20) // dtype.itemsize // unit * unit


def stress(group: Group) -> None:
    """The exchange that is used."""
    for (dtype, megabytes), rounds in ROUNDS.items():
        begun = time.monotonic()
        size = (numel_of(megabytes, dtype, group), dtype, torch.device("cpu"))
        check_exchanges(group, AllToAllReduceScatter(group), [size], rounds=rounds)
        if group.rank == 0:
            seconds = time.monotonic() - begun
            print(f"right: {rounds} rounds of {megabytes} MB {dtype} in {seconds:.1f} s", flush=True)


def hunt(group: Group, megabytes: float, seconds: float) -> None:
    """The exchange that must not be used over Gloo, under both ways of checking, until they have found it wrong."""
    numel = numel_of(megabytes, torch.float32, group)
    exchange = NativeReduceScatter(group)
    for name, some_rounds in {"self-test": _self_test, "second sums": _second_sums}.items():
        begun, rounds, found = time.monotonic(), 0, ""
        while not found and group.max(torch.tensor(time.monotonic() - begun), "time") < seconds:
            found = some_rounds(exchange, numel)
            rounds += ROUNDS_AT_ONCE
        if group.rank == 0:
            result = f"found in {rounds} rounds: {found}" if found else f"0 of {rounds} rounds"
            print(f"{name}: {result}", flush=True)


def _self_test(exchange: NativeReduceScatter, numel: int) -> str:
    size = (numel, torch.float32, torch.device("cpu"))
    try:
        check_exchanges(exchange.group, exchange, [size], rounds=ROUNDS_AT_ONCE)
    except RuntimeError as error:
        return str(error)
    return ""


def _second_sums(exchange: NativeReduceScatter, numel: int) -> str:
    group, pool = exchange.group, BufferPool()
    checked = CheckedReduceScatter(exchange)
    checked.checking = True
    base = torch.arange(numel, dtype=torch.float32).remainder_(997.0)
    right = (base * (group.size * (group.size + 1) // 2)).view(group.size, -1)[group.rank]
    wrong: set[str] = set()
    for turn in range(ROUNDS_AT_ONCE):
        names = [f"bucket{turn}.{number}" for number in range(2)]
        under_way = [checked.start(base * (group.rank + 1), lambda wire: wire, name, pool) for name in names]
        wrong |= {
            f"the sum of {name} that rank {group.rank} received"
            for name, started in zip(names, under_way, strict=True)
            if not torch.equal(started.finish(), right)
        }
    faults = checked.faults()
    for sums in group.all_gather_object(sorted(wrong), "wrong sums"):
        assert all(any(fault.startswith(start) for fault in faults) for start in sums), f"missed: {sums}"
    return "; ".join(faults)


def main() -> None:
    if sys.argv[1] == "alltoall":
        stress(Group())
    else:
        hunt(Group(), float(sys.argv[2]), float(sys.argv[3]))


if __name__ == "__main__":
    run_job(main)
