"""Tell whether a job came up on the hosts that its launcher asked for."""

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

EXPECTED_HOSTS = "ARSG_EXPECTED_HOSTS"
"""Number of hosts that a job was started for, set by `arsg-dist launch`."""


def expected_hosts(environ: Mapping[str, str] | None = None) -> int:
    """Return the number of hosts that the job was started for, 0 where nobody says.

    Args:
        environ: variables to read, default `os.environ`.

    Raises:
        ValueError: it is not a number.
    """
    text = (os.environ if environ is None else environ).get(EXPECTED_HOSTS) or "0"
    if not text.isdecimal():
        raise ValueError(f"{EXPECTED_HOSTS}={text!r} is not a number of hosts")
    return int(text)


def this_host() -> str:
    """Name this host unlike any other: containers differ in the first part, machines in the second."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def missing_hosts(expected: int, of_ranks: Sequence[str]) -> str:
    """Say that a job has fewer hosts than it was started for; "" if it has enough.

    Args:
        expected: number of hosts.
        of_ranks: `this_host` of every rank.
    """
    hosts = list(dict.fromkeys(of_ranks))
    if len(hosts) >= expected:
        return ""
    names = ", ".join(host.partition(" ")[0] for host in hosts[:8]) + (" ..." if len(hosts) > 8 else "")
    ranks = f"{len(of_ranks)} rank{'' if len(of_ranks) == 1 else 's'}"
    return (
        f"the job was started for {expected} hosts and its {ranks} came up on {len(hosts)}: {names}. "
        "The other hosts would do nothing. See which hosts the launcher was given and whether two of their names are "
        "one machine (Open MPI 5 reads --hostfile, not OMPI_MCA_orte_default_hostfile); "
        f"{EXPECTED_HOSTS}={len(hosts)} lets this job pass"
    )
