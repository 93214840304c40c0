"""Update this rank's pieces with the optimizer that was given."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor
from torch.optim import Optimizer

from arsg_dist.horovod.sharded.partition import Partition
from arsg_dist.optim import RemoteObservation

NUMBERS = frozenset({"step", "mu_product", "eta", "mu"})
"""State entries that are one number per parameter though they are tensors: torch.optim's."""


def is_per_element(parameter_name: str, name: str, value: Any, parameter: Tensor) -> bool:
    """Tell whether a state entry has one number per element, not per parameter.

    Raises:
        ValueError: neither.
    """
    if not isinstance(value, Tensor) or name in NUMBERS:
        return False
    if value.shape == parameter.shape:
        return True
    if value.dim() == 0:
        return False
    raise ValueError(
        f"state {name!r} of {parameter_name} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}: "
        "only state of the parameter's shape, or one number, can be sharded"
    )


def check_state(named: Iterable[tuple[str, Tensor]], optimizer: Optimizer) -> None:
    """Refuse an optimizer with state that cannot be partitioned.

    Raises:
        ValueError: it has such state.
    """
    for name, parameter in named:
        for entry, value in optimizer.state.get(parameter, {}).items():
            is_per_element(name, entry, value, parameter)


class InnerOptimizer:
    """Update pieces with an optimizer of the given one's class and settings.

    It has state of its own, and the `param_groups` of `outer`, the very dicts, so settings that schedulers change there
    count here. Only while it works (`on_pieces`) do they hold pieces in place of the parameters.

    Args:
        optimizer: loses its state and its hooks (the latter to `outer`, which calls them once).
        outer: the ShardedOptimizer, with the same groups; its `state` will say where the state is.
        pieces_of_group: what stands for a group's parameters.
    """

    def __init__(
        self, optimizer: Optimizer, outer: Optimizer, pieces_of_group: Callable[[int], list[Tensor]]
    ) -> None:
        self._given, self._pieces_of_group = optimizer, pieces_of_group
        self.groups = outer.param_groups
        self.whole_state: dict[Any, dict[str, Any]] = dict(optimizer.state)
        """Parameter → state, of parameters that are not partitioned: not yet, or frozen."""
        # Not a call of the class: that would want the parameters and set every setting to its default.
        self.optimizer: Optimizer = object.__new__(type(optimizer))
        # A scheduler made from the given optimizer has put a step of its own into the instance.
        self.optimizer.__dict__.update({key: v for key, v in optimizer.__dict__.items() if key != "step"})
        if isinstance(self.optimizer, RemoteObservation):  # which keeps groups and state in the one inside
            inside = self.optimizer.optimizer
            self.optimizer.optimizer = object.__new__(type(inside))
            self.optimizer.optimizer.__dict__.update(inside.__dict__)
        for name in list(self.optimizer.__dict__):
            if name.startswith("_optimizer_") and name.endswith("_hooks"):
                setattr(outer, name, getattr(optimizer, name))
                setattr(self.optimizer, name, OrderedDict())
        self.optimizer.param_groups = self.groups
        self.optimizer.state = defaultdict(dict)
        optimizer.state = _ShardedAway()
        outer.state = _ShardedAway()

    @property
    def state(self) -> Any:
        """Piece → its state."""
        return self.optimizer.state

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters, in the order in which a state_dict numbers them."""
        return [parameter for group in self.groups for parameter in group["params"]]

    def require(self, method: str) -> None:
        """Raise TypeError if the optimizer does not have a method."""
        if not hasattr(self.optimizer, method):
            raise TypeError(f"{type(self.optimizer).__name__} has no {method}()")

    @contextmanager
    def on_pieces(self) -> Iterator[Optimizer]:
        """Let the groups hold pieces, inside the context."""
        whole = [group["params"] for group in self.groups]
        try:
            for index, group in enumerate(self.groups):
                group["params"] = self._pieces_of_group(index)
            yield self.optimizer
        finally:
            for group, parameters in zip(self.groups, whole, strict=True):
                group["params"] = parameters

    def step(self) -> None:
        """Update the pieces that have a gradient."""
        step: Any = type(self.optimizer).step
        with self.on_pieces():
            # Without what torch puts around step, which would call hooks a second time.
            (step.__wrapped__ if hasattr(step, "hooked") else step)(self.optimizer)
        self._given._opt_called = True  # type: ignore[attr-defined]  # a scheduler made from it warns otherwise

    def adopt(self, partition: Partition) -> None:
        """Partition the state that the given optimizer had for a partition's parameters."""
        for segment, piece in partition.pieces:
            parameter = partition.parameters[segment.parameter]
            spec = partition.layout.parameters[segment.parameter]
            whole = self.whole_state.get(parameter)
            if whole:
                self.state[piece] = {
                    name: (
                        spec.flat(value).narrow(0, segment.parameter_start, segment.numel).clone()
                        if is_per_element(spec.name, name, value, parameter)
                        else copy.deepcopy(value)
                    )
                    for name, value in whole.items()
                }
        for parameter in partition.parameters:
            self.whole_state.pop(parameter, None)

    def forget_state(self) -> None:
        """Forget the state of pieces that are no more."""
        self.optimizer.state = defaultdict(dict)

    def load(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        whole_state: dict[Any, dict[str, Any]],
    ) -> None:
        """Load the settings of groups and all state, with the class's own ways of loading.

        Args:
            groups: one per group, without "params".
            state: of pieces; may be kept.
            whole_state: of parameters that are not partitioned; is kept.
        """
        self.whole_state = whole_state
        with self.on_pieces():
            pieces = [piece for group in self.groups for piece in group["params"]]
            number = {id(piece): place for place, piece in enumerate(pieces)}
            packed = [
                {**saved, "params": [number[id(piece)] for piece in group["params"]]}
                for saved, group in zip(groups, self.groups, strict=True)
            ]
            entries = {number[id(piece)]: entry for piece, entry in state.items() if entry}
            self.optimizer.load_state_dict({"state": entries, "param_groups": packed})
            loaded = self.optimizer.param_groups
        self.optimizer.param_groups = self.groups
        for group, settings in zip(self.groups, loaded, strict=True):
            group.update({key: value for key, value in settings.items() if key != "params"})


class _ShardedAway(defaultdict[Any, Any]):
    """Stand for the `state` of an optimizer whose state is elsewhere."""

    def __missing__(self, parameter: Any) -> NoReturn:
        raise KeyError("the state of this optimizer is sharded; ShardedOptimizer.state_dict() gathers it")
