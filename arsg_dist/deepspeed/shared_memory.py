"""Releases the memory that DeepSpeed's CPU operator leaves in /dev/shm."""

import os
from pathlib import Path

import deepspeed


def release_shared_memory() -> None:
    """Lets the memory that DeepSpeed's CPU operator shares between ranks go with the job.

    DeepSpeed 0.19.8 leaves 66 MiB of memory per rank in /dev/shm for ever, under a name with the job's master port.
    Every rank has to call this, after `deepspeed.init_distributed` (`connect` does): the ranks have mapped each other's
    memory by then and need its name no more. Elsewhere than on CPU ranks of one host there is nothing to release.
    """
    deepspeed.comm.barrier()
    forget_name(deepspeed.comm.get_rank())


def forget_name(rank: int | str) -> None:
    """Removes the name of one rank's shared memory; for when no rank will look for it any more."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    (Path("/dev/shm") / name).unlink(missing_ok=True)
