"""What ranks tell each other, on real ranks."""

import math
from typing import Any

import pytest
import torch

from arsg_dist.engine import Communicator, JobError


def check_messages(communicator: Communicator) -> None:
    """Messages of unequal length arrive in rank order; one that cannot be sent is an error of all, and no hang."""

    def of(rank: int) -> Any:
        return ["x" * 1000 * rank, {rank: (math.inf, None, torch.full((rank, 2), 0.1))}]

    last = communicator.world_size - 1
    arrived = communicator.all_gather_object(of(communicator.rank))
    assert repr(arrived) == repr([of(rank) for rank in range(communicator.world_size)])
    assert communicator.from_rank_0(of(communicator.rank + 7))[0] == of(7)[0]
    unsendable = object() if communicator.rank == last else None
    with pytest.raises(TypeError, match=rf"^rank {last} cannot send its value: builtins\.object"):
        communicator.all_gather_object(unsendable)
    with pytest.raises(JobError, match=rf"rank {last} cannot send its value"), communicator.fail_together():
        communicator.all_gather_object(unsendable)
