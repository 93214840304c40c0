"""Set every stack's timeouts so that it notices the silent loss of a host.

Without them: torch's gloo group waits 15 minutes, Open MPI's daemons were not seen to notice in two, pdsh never does.
The values were measured on rehearsal hosts whose network was cut (docs/clusters.md).
"""

import math


def torch_collectives(seconds: int) -> dict[str, str]:
    """Limit the time of collectives for torch's ranks, on gloo and NCCL alike.

    DeepSpeed reads whole minutes (deepspeed/constants.py), which is for scripts that do not connect through this
    package; the launchers take some ten seconds more to end the job.
    """
    return {
        "DEEPSPEED_TIMEOUT": str(max(1, math.ceil(seconds / 60))),
        "ARSG_COLLECTIVE_SECONDS": str(max(5, seconds - 20)),
    }


def horovod_ranks(seconds: int) -> dict[str, str]:
    """Set Gloo's timeout, and the stall check for a rank that is alive but behind."""
    return {
        "HOROVOD_GLOO_TIMEOUT_SECONDS": str(min(30, seconds)),
        "HOROVOD_STALL_CHECK_TIME_SECONDS": str(max(1, seconds // 2)),
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(seconds),
    }


def open_mpi_daemons(seconds: int) -> dict[str, str]:
    """Set keep-alive of TCP and ssh between the daemons of Open MPI 4, and 5 (PRTE)."""
    probes = 3
    interval = max(1, min(5, seconds // 12))
    keep_alive = {
        "oob_tcp_keepalive_time": str(max(1, min(10, seconds // 6))),
        "oob_tcp_keepalive_intvl": str(interval),
        "oob_tcp_keepalive_probes": str(probes),
    }
    return {
        f"{prefix}_MCA_{name}": value for prefix in ("OMPI", "PRTE") for name, value in keep_alive.items()
    } | {
        "OMPI_MCA_plm_rsh_args": ssh_options(seconds),
        "PRTE_MCA_plm_ssh_args": ssh_options(seconds),
    }


def ssh_options(seconds: int) -> str:
    """Return options of ssh that end a connection whose other side is silent."""
    count = 3  # a busy host may answer late
    return f"-o ServerAliveInterval={max(1, min(10, seconds // 6))} -o ServerAliveCountMax={count}"
