"""The state, gathered and loaded."""

import copy
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from arsg_dist import ARSG
from arsg_dist.horovod import ShardedOptimizer
from arsg_dist.horovod.comm import process_groups
from arsg_dist.horovod.comm.process_groups import Group
from tests.horovod.checks.common import assert_equal, build, plain_after, refused, update
from tests.support import toy


def check_pieces_of_a_parameter_count_their_own_steps() -> None:
    """Torch's step tensors, of an optimizer that was sharded after its first step, and loaded: one that all pieces of a
    parameter share is counted up by each of them."""

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-2)

    model, expected = toy.build_model(), toy.build_model()
    plain, stepped = adamw(expected), adamw(model)
    update(expected, plain, 0)
    update(model, stepped, 0)
    optimizer = ShardedOptimizer(stepped, model.named_parameters(), bucket_mb=0.002)
    for number in (1, 2):
        update(expected, plain, number)
        update(model, optimizer, number)
        state = optimizer.state_dict()
        if hvd.rank() == 0:
            assert [float(entry["step"]) for entry in state["state"].values()] == [number + 1.0] * 6
        for given in (state, hvd.broadcast_object(state, root_rank=0)):
            optimizer.load_state_dict(given)
    assert_equal(model, expected)
    optimizer.close()


def check_trained_optimizer_keeps_its_state() -> None:
    model, plain = plain_after(2, preconditioner="adam")
    optimizer = ShardedOptimizer(plain, model.named_parameters(), bucket_mb=0.01)
    with refused(KeyError, "state_dict() gathers it"):
        _ = plain.state[model[0].weight]
    update(model, optimizer, 2)
    expected, reference = plain_after(3, preconditioner="adam")
    assert_equal(model, expected)
    state = optimizer.state_dict()
    if hvd.rank() == 0:
        assert [entry["step"] for entry in state["state"].values()] == [3] * 6
    with refused(ValueError, "it is not the state of this model"):
        optimizer.load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})
    optimizer.load_state_dict(reference.state_dict() if hvd.rank() == 0 else None)
    update(model, optimizer, 3)
    assert_equal(model, plain_after(4, preconditioner="adam")[0])
    optimizer.load_state_dict(optimizer.state_dict())
    update(model, optimizer, 4)
    assert_equal(model, plain_after(5, preconditioner="adam")[0])
    if hvd.size() > 1:
        different = reference.state_dict()
        different["param_groups"][0]["lr"] = 0.1 + hvd.rank()
        with refused(ValueError, "given different states"):
            optimizer.load_state_dict(different)
        with refused(ValueError, "rank 0 was given no whole state"):
            optimizer.load_state_dict(None)
    optimizer.close()


def check_state_loads_into_a_plain_optimizer_and_back() -> None:
    model, optimizer = build()
    update(model, optimizer, 0, 1)
    state = optimizer.state_dict()
    optimizer.close()
    alone = toy.build_model()
    alone.load_state_dict(model.state_dict())
    plain = ARSG(alone.parameters(), **toy.HYPERPARAMETERS)
    if hvd.rank() == 0:
        plain.load_state_dict(state)
        update(alone, plain, 2)
        assert_equal(alone, plain_after(3)[0])
    hvd.broadcast_parameters(alone.state_dict(), root_rank=0)
    model, optimizer = build(alone)
    optimizer.load_state_dict(plain.state_dict() if hvd.rank() == 0 else None)
    update(model, optimizer, 3)
    assert_equal(model, plain_after(4)[0])
    optimizer.close()


def check_state_travels_one_bucket_at_a_time() -> None:
    """What rank 0 receives, or sends, is at most a bucket, and gone before the next; others get nothing whole."""
    model, optimizer = build()
    update(model, optimizer)
    buckets = [bucket for partition in optimizer.shards.partitions for bucket in partition.layout.buckets]
    assert len(buckets) > 2
    seen: list[StorageWeakRef] = []

    def held_by_horovod_no_more() -> None:
        # Its thread reports the end of an operation shortly before it lets go of the tensors.
        hvd.allreduce(torch.zeros(1), name="the operation before is over")

    def watch(tensor: Tensor | None) -> None:
        assert (tensor is not None) == (hvd.rank() == 0)
        held_by_horovod_no_more()
        assert all(storage.expired() for storage in seen), "the bucket before is still held"
        if tensor is not None:
            assert tensor.numel() <= max(bucket.numel for bucket in buckets)
            seen.append(StorageWeakRef(tensor.untyped_storage()))

    gather, scatter = Group.gather_to_first, Group.scatter_from_first

    def watched_gather(self: Group, shard: Tensor, what: str) -> Tensor | None:
        held_by_horovod_no_more()
        assert all(storage.expired() for storage in seen), "the bucket before is held while the next arrives"
        received = gather(self, shard, what)
        watch(received)
        return received

    def watched_scatter(self: Group, flat: Tensor | None, numel: int, *rest: Any) -> Tensor:
        watch(flat)
        return scatter(self, flat, numel, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Group, "gather_to_first", watched_gather)
        patch.setattr(Group, "scatter_from_first", watched_scatter)
        state = optimizer.state_dict()
        entries = 3  # exp_avg, exp_avg_sq, max_exp_avg_sq
        assert len(seen) == (entries * len(buckets) if hvd.rank() == 0 else 0)
        assert hvd.rank() == 0 or state["state"] == {}
        seen.clear()
        optimizer.load_state_dict(state)
        assert len(seen) == (entries * len(buckets) if hvd.rank() == 0 and hvd.size() > 1 else 0)
    optimizer.close()


def check_bf16_state() -> None:
    """Moments in bfloat16 (with their step count) survive the way through rank 0, and masters do."""
    model = toy.build_model().bfloat16()
    plain = ARSG(model.parameters(), **toy.HYPERPARAMETERS, state_dtype="bfloat16")
    optimizer = ShardedOptimizer(plain, model.named_parameters(), bucket_mb=0.01)
    update(model, optimizer, 0, 1)
    state = optimizer.state_dict()
    again = ShardedOptimizer(
        ARSG(
            copied := list(copy.deepcopy(model).parameters()), **toy.HYPERPARAMETERS, state_dtype="bfloat16"
        ),
        [(name, p) for (name, _), p in zip(model.named_parameters(), copied, strict=True)],
        bucket_mb=0.01,
    )
    again.load_state_dict(state)
    other = again.state_dict()
    if hvd.rank() == 0:
        assert state["master_params"].keys() == set(range(6))
        for place, entry in state["state"].items():
            assert entry["step"] == other["state"][place]["step"] == 2
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                assert entry[name].dtype == torch.bfloat16
                assert torch.equal(entry[name], other["state"][place][name])
            assert torch.equal(state["master_params"][place], other["master_params"][place])
            assert not torch.equal(
                state["master_params"][place], state["master_params"][place].bfloat16().float()
            )
    optimizer.close()
    again.close()


def check_state_is_collective() -> None:
    if hvd.size() == 1:
        return
    model, optimizer = build()
    update(model, optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_groups, "MEETING_TIMEOUT", 1.0)
        if hvd.rank() == 0:
            with refused(RuntimeError, "outside 'if hvd.rank() == 0'"):
                optimizer.state_dict()
    hvd.allgather_object(None, name="rank 0 has given up")
    if hvd.rank():
        optimizer.shards.groups.world.meet("state_dict()")  # what rank 0 still waits for
    hvd.allgather_object(None, name="all have come")
    with refused(RuntimeError, "leave it out"):
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer.close()


def check_masters_of_a_half_precision_run_leave_fp32_parameters_alone() -> None:
    """Loading them moves no parameter, and above all not this rank's part only."""
    half, optimizer = build(toy.build_model().to(torch.bfloat16))
    update(half, optimizer)
    state = optimizer.state_dict()
    optimizer.close()
    for given in (state, hvd.broadcast_object(state, root_rank=0)):
        model, optimizer = build()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer.load_state_dict(given)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        optimizer.close()
