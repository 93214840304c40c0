"""Rank 1 dies while rank 0 asks for one operation after the other, of whole tensors or views, and waits for none."""

import os
import signal
import sys
import time

import horovod.torch as hvd
import torch

import arsg_dist.horovod  # noqa: F401  what is tested

hvd.init()
hvd.allreduce(torch.zeros(1), name="both are there")
if hvd.rank() == 1:
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
try:
    for number in range(10**7):
        whole = torch.zeros(2)
        hvd.allreduce_async_(whole[1:] if "views" in sys.argv else whole, name=f"tensor {number}")
except hvd.mpi_ops.HorovodInternalError as error:
    print("raised:", error, flush=True)
    sys.exit(3)
