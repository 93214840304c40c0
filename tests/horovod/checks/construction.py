"""What is refused, and what is tested, when an optimizer is made."""

from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor, nn

from arsg_dist import ARSG, RemoteObservation
from arsg_dist.engine import JobError
from arsg_dist.horovod import ShardedOptimizer
from arsg_dist.horovod.comm.collectives import (
    AllToAllReduceScatter,
    BufferPool,
    Started,
    choose_reduce_scatter,
)
from arsg_dist.horovod.comm.process_groups import Group
from arsg_dist.horovod.comm.verification import check_exchanges
from arsg_dist.horovod.sharded import optimizer as sharded_optimizer
from tests.horovod.checks.common import (
    OneWrongNumber,
    TwoDtypes,
    assert_equal,
    build,
    plain_after,
    refused,
    update,
)
from tests.support import toy


def check_refusals() -> None:
    model = toy.build_model()
    named = list(model.named_parameters())

    def make(optimizer: Any = None, names: Any = None, **arguments: Any) -> None:
        ShardedOptimizer(optimizer or ARSG(model.parameters()), names or named, **arguments)

    with refused(TypeError, "element_wise=True"):
        make(torch.optim.Adafactor(model.parameters()))
    with refused(TypeError, "element_wise=True"):
        make(torch.optim.LBFGS(model.parameters()))
    matrices = torch.optim.Muon([model[0].weight])
    with refused(TypeError, "Muon is not known to update every element"):
        make(RemoteObservation(matrices))
    with refused(TypeError, "must be a torch.optim.Optimizer"):
        make(model)
    with refused(TypeError, "already distributed"):
        make(hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), named))
    for text, arguments in {
        "backward_passes_per_step": {"backward_passes_per_step": 0},
        "Adasum": {"op": hvd.Adasum},
        "gradient_predivide_factor needs": {"gradient_predivide_factor": 2.0, "op": hvd.Sum},
        "groups and num_groups": {"groups": 2},
        "gather must be": {"gather": "later"},
        "reduce_scatter='ring'": {"reduce_scatter": "ring"},
        "shard_group must be": {"shard_group": "rack"},
    }.items():
        with refused(ValueError, text):
            make(**arguments)
    with refused(ValueError, "found twice: 0.weight"):
        make(names=[*named, named[0]])
    with refused(ValueError, "no name for 1"):
        make(names=named[1:])
    complex_model = nn.Linear(2, 2, dtype=torch.complex64)
    with refused(ValueError, "can be sharded"):
        ShardedOptimizer(ARSG(complex_model.parameters()), complex_model.named_parameters())
    factored = torch.optim.SGD(model.parameters(), lr=0.1)
    factored.state[model[0].weight]["row"] = torch.zeros(101)
    with refused(ValueError, "state 'row' of 0.weight has shape (101,)"):
        make(factored)
    if hvd.gloo_enabled():
        with refused(ValueError, "refused over Gloo"):
            make(reduce_scatter="reducescatter")
    _, optimizer = build(model)
    with refused(ValueError, "call its close() first"):
        build(model)
    optimizer.close()
    with refused(TypeError, "SGD has no base_iterate()"):
        sgd = ShardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), named)
        with sgd.base_iterate():
            pass
    sgd.close()


class MixedUp(AllToAllReduceScatter):
    """A reduce-scatter that takes one of two buckets under way for the other, on the last rank."""

    def start(self, wire: Tensor, decode: Any, name: str, pool: BufferPool) -> Started:
        if self.group.rank == self.group.size - 1:
            name = {"test0": "test1", "test1": "test0"}.get(name, name)
        return super().start(wire, decode, name, pool)


def check_construction_tests_the_exchange_it_will_use() -> None:
    model = toy.build_model()
    OneWrongNumber.count = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sharded_optimizer, "choose_reduce_scatter", lambda path, group, device: OneWrongNumber(group)
        )
        with refused(RuntimeError, f"1 wrong numbers on rank {hvd.size() - 1}"):
            build(model)
    build(model)[1].close()


def check_self_test_finds_one_wrong_number() -> None:
    sizes = [(16 * 3 * hvd.size(), dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16)]
    group = Group()
    check_exchanges(group, AllToAllReduceScatter(group), sizes)
    OneWrongNumber.count = 0
    with refused(RuntimeError, f"1 wrong numbers on rank {hvd.size() - 1}"):
        check_exchanges(group, OneWrongNumber(group), sizes)
    if hvd.size() > 1:
        with refused(RuntimeError, "wrong numbers on rank 0"):
            check_exchanges(group, MixedUp(group), sizes)
    assert isinstance(choose_reduce_scatter("auto", group, "cpu"), AllToAllReduceScatter)
    if not hvd.gloo_enabled():
        native = choose_reduce_scatter("reducescatter", group, "cpu")
        check_exchanges(group, native, sizes)
        model, optimizer = build(reduce_scatter="reducescatter")
        update(model, optimizer)
        assert_equal(model, plain_after(1)[0])
        optimizer.close()


def last_ranks() -> str:
    return ", ".join(map(str, range(1, hvd.size())))


def check_ranks_that_differ() -> None:
    if hvd.size() == 1:
        return  # nobody to differ from
    model = toy.build_model()
    with torch.no_grad():
        model[4].bias[2] += hvd.rank()
    model, optimizer = build(model)
    with refused(RuntimeError, "hvd.broadcast_parameters(model.state_dict(), root_rank=0)"):
        update(model, optimizer)
    optimizer.close()
    mixed = TwoDtypes()
    with torch.no_grad():
        mixed.head.bias[1] += hvd.rank()
    optimizer = ShardedOptimizer(torch.optim.SGD(mixed.parameters(), lr=0.1), mixed.named_parameters())
    with refused(RuntimeError, "hvd.broadcast_parameters(model.state_dict(), root_rank=0)"):
        update(mixed, optimizer)
    optimizer.close()
    other = nn.Linear(3, 2 + hvd.rank())
    with refused((ValueError, JobError), "differ from rank 0's"):
        build(other)
    with refused((ValueError, JobError), "bucket_mb"):
        build(bucket_mb=-1.0 if hvd.rank() else 1.0)
    for what, arguments in {
        "or bucket_mb of": {"bucket_mb": 0.02},
        "op, ": {"op": hvd.Sum},
        "backward_passes_per_step, ": {"backward_passes_per_step": 2},
        "gradient_predivide_factor, ": {"gradient_predivide_factor": 2.0},
        "compression or ": {"compression": hvd.Compression.fp16},
        "shard_group differs between the ranks": {"shard_group": 1},
    }.items():
        with refused(ValueError, what):
            build(**(arguments if hvd.rank() else {}))
    model, plain = plain_after(0, lr=toy.HYPERPARAMETERS["lr"] + 0.01 * hvd.rank())
    with refused(ValueError, f"settings of its groups (lr, ...) of rank {last_ranks()} differ from rank 0's"):
        ShardedOptimizer(plain, model.named_parameters())
    # The classic mistakes: rank 0 alone loads a file before wrapping, or a rank has another one.
    for updates in (0 if hvd.rank() else 2, 1 if hvd.rank() else 2):
        model, plain = plain_after(updates, preconditioner="adam")
        with refused(
            ValueError, f"after it by load_state_dict()) of rank {last_ranks()} differ from rank 0's"
        ):
            ShardedOptimizer(plain, model.named_parameters())
    model, plain = plain_after(1, state_dtype=torch.bfloat16 if hvd.rank() else None)
    with refused(ValueError, "optimizer state"):
        ShardedOptimizer(plain, model.named_parameters())
    build(toy.build_model())[1].close()  # the ranks still agree
