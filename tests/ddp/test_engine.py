"""The engine `ddp` in one process; what several ranks do is in tests/engines, tests/imagenet and tests/checkpoint."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from arsg_dist import ARSG
from arsg_dist.ddp import DDPEngine, connect
from arsg_dist.engine import Communicator, Ranks, discover_ranks

ALONE = Ranks(rank=0, world_size=1, local_rank=0, launcher="deepspeed or torchrun")


@pytest.fixture
def communicator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Communicator]:
    """Of a job of one rank."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that what connect() sets is undone
        monkeypatch.delenv(name)
    connected = connect(ALONE)
    yield connected
    connected.close()


def test_gradients_travel_in_the_last_micro_batch_of_an_update_only(communicator: Communicator) -> None:
    """Catches an exchange in every backward pass, which costs as many times the network."""
    module = nn.Linear(3, 2)
    engine = DDPEngine(
        module, ARSG(module.parameters(), lr=0.1), communicator, accumulation_steps=3, bucket_cap_mb=1
    )
    exchanged_at, micro_batch = list[int](), 0

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        exchanged_at.append(micro_batch)
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    engine.module.register_comm_hook(None, hook)  # type: ignore[operator]
    for micro_batch in range(6):  # noqa: B007
        engine.backward(engine.module(torch.ones(4, 3)).sum())
        engine.step()
    assert exchanged_at == [2, 5]


def test_names_are_those_of_the_network(communicator: Communicator) -> None:
    """Catches 'module.' before the names in checkpoints and weight files, which no other engine would find."""
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    engine = DDPEngine(module, ARSG(module.parameters(), lr=0.1), communicator)
    engine.backward(engine.module(torch.randn(4, 3)).square().sum())
    engine.step()
    assert engine.whole_weights().keys() == module.state_dict().keys()
    assert {name for name, _ in engine.replicated_tensors()} >= {"0.weight", "0.weight's exp_avg"}
    assert {key.partition(":")[2] for key in engine.state().tensors} >= {"0.weight", "1.running_mean"}


def test_buffers_are_sent_at_the_start_only(
    communicator: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches batch norm's statistics of every rank that are replaced by rank 0's at every forward pass."""
    sent, broadcast = list[int](), dist._broadcast_coalesced

    def counted(group: Any, tensors: list[torch.Tensor], *rest: Any) -> None:
        sent.append(len(tensors))
        broadcast(group, tensors, *rest)

    monkeypatch.setattr(dist, "_broadcast_coalesced", counted)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    engine = DDPEngine(module, ARSG(module.parameters(), lr=0.1), communicator)
    assert sum(sent) == 4 + 3  # parameters, and batch norm's statistics
    engine.backward(engine.module(torch.randn(4, 3)).square().sum())
    engine.step()
    assert sum(sent) == 4 + 3


def test_the_base_iterate_is_reached_and_left(communicator: Communicator) -> None:
    """Catches an evaluation at x, or parameters that do not come back."""
    module = nn.Linear(3, 2)
    optimizer = ARSG(module.parameters(), lr=0.1)
    engine = DDPEngine(module, optimizer, communicator)
    engine.backward(engine.module(torch.ones(4, 3)).sum())
    engine.step()
    before = module.weight.detach().clone()
    with optimizer.base_iterate():
        expected = module.weight.detach().clone()
    with engine.base_iterate():
        assert torch.equal(module.weight, expected)
        assert engine.at_base_iterate
        with pytest.raises(RuntimeError, match="backward inside base_iterate"):
            engine.backward(torch.zeros((), requires_grad=True))
    assert torch.equal(module.weight, before)
    assert not torch.equal(expected, before)


@pytest.mark.parametrize("environment", [{}, {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}])
def test_a_start_without_a_launcher_that_fits_says_how(environment: dict[str, str]) -> None:
    """Catches a job that waits for ranks nobody starts, or N jobs of one rank."""
    with pytest.raises(ValueError, match="start it with 'torchrun --nproc-per-node 2"):
        connect(discover_ranks(environment))
