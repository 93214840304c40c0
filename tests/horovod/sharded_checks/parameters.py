"""Parameters that others write, and ranks that differ."""

import horovod.torch as hvd
import torch
from torch import nn

from arsg_dist.engine import JobError
from arsg_dist.horovod import ShardedOptimizer
from tests.horovod.sharded_checks.common import SETTINGS, build, plain_after, refused, update
from tests.support import toy


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


def check_written_parameters_are_kept() -> None:
    """Loaded, broadcast and clamped parameters are trained on; the rest keeps its master's precision."""
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = build(toy.build_model().to(dtype))
        update(model, optimizer)
        loaded = {name: tensor.clone() + 0.5 for name, tensor in model.state_dict().items()}
        model.load_state_dict(loaded)
        with optimizer.base_iterate():
            pass
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
        for master in (m for p in optimizer.shards.partitions for m in p.masters):
            assert master.dtype == torch.float32
        if hvd.rank():
            with torch.no_grad():
                model[0].weight.fill_(3.0)
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        with optimizer.base_iterate():
            pass
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
        with torch.no_grad():
            model[0].bias.clamp_(0.0, 0.1)
        clamped = model[0].bias.detach().clone()
        for settings in optimizer.param_groups:
            settings["lr"] = 0.0
        update(model, optimizer)
        assert torch.equal(model[0].bias, clamped)
        optimizer.close()


def check_memory_replaced() -> None:
    model, optimizer = build()
    model[2].weight.data = model[2].weight.data.clone()
    with refused(RuntimeError, "the memory of 2.weight was replaced"):
        update(model, optimizer)
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
    model, plain = plain_after(0, lr=SETTINGS["lr"] + 0.01 * hvd.rank())
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
