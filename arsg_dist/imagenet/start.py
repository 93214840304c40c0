"""What the ranks settle among themselves about the machines they share."""

import os
import socket

import torch

from arsg_dist.engine import Communicator


def share_cores(communicator: Communicator) -> list[str]:
    """Ranks on one host share its cores evenly; each would otherwise start as many threads as there are cores.

    Returns:
        The host name of every rank.
    """
    hosts = communicator.all_gather_object(socket.gethostname())
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // hosts.count(socket.gethostname())))
    return hosts
