"""A DeepSpeed job of one rank in the process of the tests."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups as rank_groups
from torch import nn


@contextmanager
def one_rank() -> Iterator[None]:
    """Make the job, and leave nothing of it behind."""
    kept = (str, int, list, dict, type(None))  # of groups; as modules, functions and classes are not
    made = {
        name: copy.copy(value)
        for name, value in vars(rank_groups).items()
        if isinstance(value, kept) and not name.startswith("__")
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        # Stage 3 puts a function of its own in the place, which is wrong for complex numbers, and leaves it there.
        patch.setattr(nn.functional, "linear", nn.functional.linear)
        # DeepSpeed asks oneDNN, which has fp16 on some CPUs only; torch itself computes in fp16 on every CPU.
        patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _: True)
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
        yield
        torch.distributed.destroy_process_group()
        deepspeed.comm.comm.cdb = None
        vars(rank_groups).update(
            made
        )  # DeepSpeed keeps groups of the job that has ended, and a pipeline's grid
