"""The liberties that sharding engines and wrappers take with an optimizer."""

from __future__ import annotations

import pytest
import torch

from arsg_dist import ARSG
from tests.optim.optim_paths import ALL_PATHS, MODES, PATHS, Path, gradients, parameters, run

SHAPES = [(3, 4), (5,), (2, 2)]


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize("lookahead_k", [0, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ALL_PATHS)
def test_stepping_sub_group_by_sub_group_equals_one_step(path: Path, mode: str, lookahead_k: int) -> None:
    """Catches counters on groups or optimizer (over-counted), cached lists, and `params[0]` of empty groups.

    As ZeRO does: flat tensors replace the parameters after construction, and step() is called once per
    sub-group with only that sub-group's flat tensor in its group and all other groups empty.
    """
    settings = {
        "preconditioner": mode, "lr": 0.05, "betas": (0.9, 0.9), "lookahead_k": lookahead_k, **path.settings,
    }  # fmt: skip
    whole = parameters(SHAPES)
    straight = ARSG([{"params": whole[:2]}, {"params": whole[2:], "lr": 0.1}], **settings)
    originals = parameters(SHAPES)
    sharded = ARSG([{"params": originals[:2]}, {"params": originals[2:], "lr": 0.1}], **settings)
    sub_groups = [(0, originals[:1]), (0, originals[1:2]), (1, originals[2:])]
    flats = [torch.nn.Parameter(flat(members)) for _, members in sub_groups]
    for group in sharded.param_groups:
        group["params"] = []
    for grads in gradients(SHAPES, 7):
        run(straight, whole, [grads])
        for (group_index, _), master, grad in zip(sub_groups, flats, grads, strict=True):
            master.grad = grad.flatten().clone()
            sharded.param_groups[group_index]["params"] = [master]
            sharded.step()
            master.grad = None
            sharded.param_groups[group_index]["params"] = []
    torch.testing.assert_close(flat(flats), flat(whole), rtol=1e-12, atol=1e-14)
    for master in flats:
        assert int(sharded.state[master].get("step", 7)) == 7


@pytest.mark.parametrize("path", ALL_PATHS)
def test_state_is_made_at_once_and_kept_in_place(path: Path) -> None:
    """Catches state rebound by a step or made after the first one: swapped-out and mapped copies go stale."""
    for mode in MODES:
        x = parameters([(6,)])[0]
        settings = {"preconditioner": mode, "lookahead_k": 2, "betas": (0.9, 0.9), "state_dtype": "bfloat16"}
        optimizer = ARSG([x], **settings, **path.settings)
        assert len(optimizer.state) == 0, (
            "state before the first step goes stale when parameters are replaced"
        )
        address = x.data_ptr()
        run(optimizer, [x], gradients([(6,)], 1))
        before = {k: v for k, v in optimizer.state[x].items() if isinstance(v, torch.Tensor)}
        names = list(optimizer.state[x])
        run(optimizer, [x], gradients([(6,)], 4))
        assert list(optimizer.state[x]) == names
        assert all(optimizer.state[x][name] is tensor for name, tensor in before.items())
        assert x.data_ptr() == address


@pytest.mark.parametrize("path", PATHS)
def test_empty_groups_zero_size_shards_and_missing_gradients_are_fine(path: Path) -> None:
    """Catches `params[0]`, and multi-tensor kernels called with nothing."""
    used, unused, empty = parameters([(3,), (3,), (0,)])
    optimizer = ARSG([{"params": [used, unused, empty]}, {"params": []}], **path.settings)
    optimizer.step()
    assert len(optimizer.state) == 0
    used.grad, empty.grad = torch.ones_like(used), torch.ones_like(empty)
    optimizer.step()
    assert unused not in optimizer.state
    assert optimizer.state[empty]["exp_avg"].shape == (0,)


@pytest.mark.parametrize("path", PATHS)
def test_step_count_is_per_parameter(path: Path) -> None:
    """Catches one count for all: a parameter unused for a while needs its own bias correction."""
    params, alone = parameters([(3,), (3,)]), parameters([(3,), (3,)])[1:]
    optimizer = ARSG(params, preconditioner="adam", **path.settings)
    single = ARSG(alone, preconditioner="adam", **path.settings)
    for t, grads in enumerate(gradients([(3,), (3,)], 6)):
        params[0].grad = grads[0].clone()
        params[1].grad = grads[1].clone() if t % 2 else None
        optimizer.step()
        if t % 2:
            run(single, alone, [grads[1:]])
    assert [optimizer.state[x]["step"] for x in params] == [6, 3]
    assert torch.equal(params[1], alone[0])


@pytest.mark.parametrize("foreign", [torch.tensor, float, int])
@pytest.mark.parametrize("path", ALL_PATHS)
def test_a_step_count_restored_in_another_form_counts_on(path: Path, foreign) -> None:
    """Catches a count that stands still or mixes kinds: engines restore it as they like."""
    params, others = parameters(SHAPES), parameters(SHAPES)
    grads = gradients(SHAPES, 5)
    optimizer = ARSG(params, preconditioner="adam", **path.settings)
    straight = ARSG(others, preconditioner="adam", **path.settings)
    run(optimizer, params, grads[:3])
    optimizer.state[params[1]]["step"] = foreign(3)
    run(optimizer, params, grads[3:])
    run(straight, others, grads)
    assert [int(optimizer.state[x]["step"]) for x in params] == [5, 5, 5]
    assert all(torch.equal(x, y) for x, y in zip(params, others, strict=True))


def test_a_wrapper_that_subclasses_dynamically_keeps_everything() -> None:
    """Catches behaviour tied to the exact class or to __init__'s arguments: Horovod rebuilds from groups."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, params):
            super(self.__class__, self).__init__(params)

        def step(self, closure=None):
            return super(self.__class__, self).step(closure)

    params, others = parameters(SHAPES), parameters(SHAPES)
    plain = ARSG(others, lr=0.1, preconditioner="adam", mu=0.3)
    inner = ARSG(params, lr=0.1, preconditioner="adam", mu=0.3)
    wrapped_class = type("ARSG", (ARSG,), dict(Wrapper.__dict__))
    wrapped = wrapped_class(inner.param_groups)
    grads = gradients(SHAPES, 4)
    run(plain, others, grads)
    run(wrapped, params, grads)
    assert all(torch.equal(x, y) for x, y in zip(params, others, strict=True))
    with wrapped.base_iterate():
        pass
    wrapped.load_state_dict(wrapped.state_dict())
    run(wrapped, params, grads)


def test_memory_does_not_grow_over_steps() -> None:
    """Catches tensors kept from step to step beyond the state."""
    import gc

    params = parameters([(50,)])
    optimizer = ARSG(params, lr=torch.tensor(0.1), lookahead_k=2, betas=(0.9, 0.9), capturable=True)
    counts = []
    for _ in range(4):
        run(optimizer, params, gradients([(50,)], 3))
        gc.collect()
        counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert counts[1] == counts[-1]
