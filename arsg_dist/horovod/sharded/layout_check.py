"""Check that all ranks bring the same parameters, arguments, settings and state."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from arsg_dist.horovod.comm.process_groups import Group
from arsg_dist.horovod.sharded.buckets import Layout
from arsg_dist.horovod.sharded.gradients import Reduction
from arsg_dist.horovod.sharded.inner_optimizer import NUMBERS, InnerOptimizer


def compare_ranks(world: Group, mine: dict[str, Any]) -> None:
    """Compare what every rank brings. Collective.

    Args:
        world: the ranks.
        mine: what must be the same on every rank, by how it is called in messages.

    Raises:
        ValueError: on every rank: it differs; says in what.
    """
    with world.fail_together():
        others = world.all_gather_object(mine, "layout")
        differing = [rank for rank, other in enumerate(others) if other != others[0]]
        if differing:
            what = [key for key in mine if any(other[key] != others[0][key] for other in others)]
            raise ValueError(
                f"{'; '.join(what)} of rank {', '.join(map(str, differing))} differ from rank 0's: build the same "
                "model and optimizer on every rank"
            )


def described_layouts(
    layouts: Sequence[Layout], groups_of: Sequence[Sequence[int]], passes: int, reduction: Reduction
) -> dict[str, Any]:
    """Describe parameters and arguments for `compare_ranks`.

    Args:
        layouts: of the parameters.
        groups_of: per layout, each parameter's index in the optimizer's `param_groups`.
        passes: backward passes per update.
        reduction: of gradients.
    """
    return {
        "parameters (names, order, shapes, dtypes, groups, requires_grad) or bucket_mb": (
            [layout.fingerprint() for layout in layouts],
            groups_of,
        ),
        "backward_passes_per_step, op, gradient_predivide_factor, compression or reduce_scatter": (
            passes,
            (reduction.prescale, reduction.postscale),
            _named(reduction.compression),
            _named(type(reduction.reduce_scatter.exchange)),
        ),
    }


def described_optimizer(inner: InnerOptimizer) -> dict[str, Any]:
    """Describe an optimizer's class, settings and state for `compare_ranks`."""
    return {
        "class of the optimizer or settings of its groups (lr, ...)": (
            _named(type(inner.optimizer)),
            [
                {
                    name: _value(value)
                    for name, value in group.items()
                    if name not in ("params", "param_names")
                }
                for group in inner.groups
            ],
        ),
        "optimizer state (load it on every rank before wrapping, or after it by load_state_dict())": [
            {name: _kind(name, value) for name, value in inner.whole_state.get(parameter, {}).items()}
            for parameter in inner.parameters
        ],
    }


def _value(value: Any) -> str:
    """Write a setting as text, equal if the values are; else the type's name."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {value.tolist()}"
    if isinstance(value, (tuple, list)):
        return str([_value(item) for item in value])
    plain = isinstance(value, (bool, int, float, complex, str, type(None)))
    return repr(value) if plain else _named(type(value))


def _kind(name: str, value: Any) -> str:
    """Write state as text; of state with one number per element its form only."""
    per_element = isinstance(value, Tensor) and value.dim() and name not in NUMBERS
    return f"{value.dtype} {tuple(value.shape)}" if per_element else _value(value)


def _named(kind: Any) -> str:
    return f"{kind.__module__}.{getattr(kind, '__qualname__', type(kind).__qualname__)}"
