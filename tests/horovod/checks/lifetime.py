"""Models that outlive their optimizer, and ranks that leave."""

import copy
import gc
import io
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch import mpi_ops
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from arsg_dist import ARSG
from arsg_dist.horovod import ShardedOptimizer
from tests.horovod.checks.common import (
    assert_equal,
    build,
    late_exchange,
    loss_of,
    plain_after,
    refused,
    update,
)
from tests.support import toy


def trained_in_a_function(**arguments: Any) -> nn.Module:
    """As everybody writes it: the optimizer ends its life with the function."""
    model, optimizer = build(**arguments)
    update(model, optimizer, 0, 1)
    return model


def hold_back_update(optimizer: ShardedOptimizer, until: Callable[[], Any]) -> None:
    """Makes this rank slow: it sends parameters only after a call has returned."""
    update = optimizer.inner.step

    def late() -> None:
        until()
        update()

    optimizer.inner.step = late  # type: ignore[method-assign]


def check_the_model_outlives_its_optimizer() -> None:
    """Readers wait for the last update's parameters when nobody holds the optimizer any more."""
    expected = plain_after(2)[0]
    readers: dict[str, Callable[[nn.Module], Any]] = {
        "state_dict": lambda m: list(m.state_dict().values()),
        "parameters": lambda m: [p.detach() for p in m.parameters()],
        "forward": lambda m: [m(toy.batch(7)[0]).detach()],
        "deepcopy": lambda m: list(copy.deepcopy(m).state_dict().values()),
        "attribute": lambda m: [m[0].weight.detach(), m[4].bias.detach()],
    }
    for name, read in readers.items():
        for gather in ("lazy", "eager"):
            with late_exchange():
                model = trained_in_a_function(gather=gather)
                gc.collect()
                for actual, right in zip(read(model), read(expected), strict=True):
                    assert torch.allclose(actual, right, rtol=1e-4, atol=1e-6), (name, gather)
    assert not mpi_ops._handle_map


def check_every_reader_waits_when_the_optimizer_is_gone() -> None:
    """Other ways to read a model than the above; after an exception, and when a second optimizer has come and gone."""
    expected = plain_after(2)[0]

    def saved(model: nn.Module) -> list[Any]:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        return list(torch.load(io.BytesIO(file.getvalue()), weights_only=True).values())

    def by_hook(model: nn.Module) -> list[Any]:
        seen: list[Any] = []
        hook = model[0].register_forward_pre_hook(
            lambda module, _: seen.append(module.weight.detach().clone())
        )
        model(toy.batch(7)[0])
        hook.remove()
        return seen

    def by_threads(model: nn.Module) -> list[Any]:
        """Two at once: Horovod answers the second of them before the exchange has ended."""
        found: list[Any] = [None, None]

        def read(place: int) -> None:
            found[place] = [value.clone() for value in model.state_dict().values()]

        threads = [threading.Thread(target=read, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [*found[0], *found[1]]

    readers: dict[str, Callable[[nn.Module], list[Any]]] = {
        "torch.save": saved,
        "named_parameters": lambda m: [p.detach() for _, p in m.named_parameters()],
        "a child's parameters": lambda m: [p.detach() for p in m[2].parameters()],
        "hook": by_hook,
        "threads": by_threads,
        "get_parameter": lambda m: [m.get_parameter("4.bias").detach()],
        "_parameters": lambda m: [m[0]._parameters["weight"].detach()],
        "vector": lambda m: [torch.nn.utils.parameters_to_vector(m.parameters()).detach()],
    }
    for name, read in readers.items():
        with late_exchange():
            model = trained_in_a_function()
            gc.collect()
            for actual, right in zip(read(model), read(expected), strict=True):
                assert torch.allclose(actual, right, rtol=1e-4, atol=1e-6), name

    def failing() -> None:
        model, optimizer = build()
        update(model, optimizer, 0, 1)
        kept.append(model)
        raise ValueError("the program's own")

    kept: list[nn.Module] = []
    with late_exchange():
        with suppress(ValueError):
            failing()
        gc.collect()
        assert_equal(kept[0], expected)
    with late_exchange():
        model = trained_in_a_function()
        update(*(second := build(model)))
        del second
        gc.collect()
        assert torch.isfinite(torch.cat([p.flatten() for p in model.parameters()])).all()
        gathered = hvd.allgather(torch.cat([p.detach().flatten() for p in model.parameters()])[None])
        assert all(torch.equal(gathered[0], other) for other in gathered)
    assert not mpi_ops._handle_map


def check_a_model_and_its_optimizer_free_everything() -> None:
    """Also on a rank that drops both while the others have not even begun to send the parameters, who get them all
    the same."""
    model, optimizer = build()
    update(model, optimizer)  # the first one is collective
    optimizer.zero_grad()
    alone = weakref.ref(optimizer)
    arenas = [StorageWeakRef(a.untyped_storage()) for p in optimizer.shards.partitions for a in p.arenas]
    pending = weakref.ref(optimizer.shards.pending)
    loss_of(model, 1).backward()
    if hvd.rank() == 0:
        optimizer.step()
        optimizer.zero_grad()
        assert hvd.size() == 1 or optimizer.shards.pending.started
        compiler_callbacks = len(torch._dynamo.callback.callback_handler.start_callbacks)
        del optimizer
        assert alone() is None, "an optimizer without a schedule is in no circle"
        assert pending() is not None, "it goes with the optimizer, and nobody waits"
        del model
        assert pending() is None, "not freed with the model"
        assert len(torch._dynamo.callback.callback_handler.start_callbacks) == compiler_callbacks - 1
        assert not mpi_ops._handle_map, "Horovod keeps the memory of an exchange that nobody waits for"
        hvd.allgather_object(None, name="rank 0 has dropped everything")
    else:
        hold_back_update(optimizer, lambda: hvd.allgather_object(None, name="rank 0 has dropped everything"))
        optimizer.step()
        assert_equal(model, plain_after(2)[0])
        optimizer.zero_grad()
        del model, optimizer
    gc.collect()  # an update held back is in a circle
    hvd.allgather_object(None, name="all have")
    assert all(arena.expired() for arena in arenas)


def check_a_new_optimizer_takes_over() -> None:
    """It starts from the parameters that were on their way, and the old one's hooks are gone."""
    model, expected = toy.build_model(), toy.build_model()
    parameters = list(model.parameters())  # read before: no module waits when the next optimizers are made
    for in_a_circle in (False, True):  # which only the garbage collector takes apart
        with late_exchange():
            optimizer = ShardedOptimizer(
                torch.optim.SGD(parameters, lr=1e-3), model.named_parameters(), bucket_mb=0.01
            )
            optimizer.__dict__["itself"] = optimizer if in_a_circle else None
            update(model, optimizer)
            assert optimizer.shards.pending.started
            del optimizer
            optimizer = ShardedOptimizer(torch.optim.SGD(parameters, lr=1e-3), bucket_mb=0.01)
            update(model, optimizer, 1)
        reference = torch.optim.SGD(expected.parameters(), lr=1e-3)
        update(expected, reference, 0, 1)
        assert_equal(model, expected)
        assert all(len(module._forward_pre_hooks) == 1 for module in model[::2])
        assert all(len(p._post_accumulate_grad_hooks) == 1 for p in parameters)
        optimizer.close()


def check_an_optimizer_dropped_in_the_middle_of_an_update() -> None:
    """Its gradients are refused as before, and cleared the model is as good as new."""
    model, optimizer = build()
    loss_of(model).backward()
    del optimizer
    gc.collect()
    assert not mpi_ops._handle_map
    plain = ARSG(model.parameters(), **toy.HYPERPARAMETERS)
    with refused(RuntimeError, "call optimizer.zero_grad()"):
        plain.step()
    update(model, plain, 0, 1)
    assert_equal(model, plain_after(2)[0])
    update(*(again := build(model)))
    again[1].close()
    hvd.barrier()


def check_join_is_refused() -> None:
    """With plain Horovod the rank that has joined dies of a segmentation fault at the next update of the others."""
    model, optimizer = build()
    with refused(RuntimeError, "give every rank as many batches"):
        hvd.join()
    update(model, optimizer)
    optimizer.close()
    assert hvd.join() in range(hvd.size())


def check_a_rank_that_leaves_lets_the_others_have_the_parameters() -> None:
    """Rank 0 updates last, when one of the others has ended its program and the rest have shut Horovod down."""
    torch._dynamo.utils.counters.clear()  # or else step() waits
    signs = Path(hvd.broadcast_object(tempfile.mkdtemp(), root_rank=0))
    model, optimizer = build()
    update(model, optimizer)  # the first one is collective
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    if hvd.rank() == 0:
        others = hvd.size() - 1

        def wait_for_signs() -> None:
            while len(list(signs.iterdir())) < others:
                pass

        hold_back_update(optimizer, wait_for_signs)
    optimizer.step()
    if hvd.rank():
        sign_when_waiting_or_gone(signs / str(hvd.rank()))
        del optimizer, model
        if hvd.rank() == hvd.size() - 1:
            sys.exit()
    hvd.shutdown()
    if "model" in locals():
        assert_equal(model, plain_after(2)[0])


def sign_when_waiting_or_gone(path: Path) -> None:
    """Touches a file once this rank waits for others, or has left them without."""
    horovod, sleep = mpi_ops._basics.MPI_LIB_CTYPES, time.sleep
    leave = horovod.horovod_shutdown

    def signing_sleep(seconds: float) -> None:
        path.touch()
        sleep(seconds)

    def signing_leave() -> None:
        leave()
        path.touch()

    time.sleep, horovod.horovod_shutdown = signing_sleep, signing_leave
