"""The optimizer that a ShardedOptimizer was made from, turned to this rank's pieces."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor
from torch.optim import Optimizer


class InnerOptimizer:
    """An optimizer of the given one's class and settings, with state of its own, that updates pieces.

    It has the `param_groups` of `outer`, the very dicts, so settings that schedulers change there count here. Only
    while it works (`on_pieces`) do they hold pieces in place of the parameters.

    Args:
        optimizer: loses its state and its hooks (the latter to `outer`, which calls them once).
        outer: the ShardedOptimizer, with the same groups; its `state` will say where the state is.
    """

    def __init__(self, optimizer: Optimizer, outer: Optimizer) -> None:
        self._given, self._groups = optimizer, outer.param_groups
        self.pieces_of_group: Callable[[int], list[Tensor]] = lambda group: []
        """What stands for a group's parameters."""
        # Not a call of the class: that would want the parameters and set every setting to its default.
        self.optimizer: Optimizer = object.__new__(type(optimizer))
        # A scheduler made from the given optimizer has put a step of its own into the instance.
        self.optimizer.__dict__.update({key: v for key, v in optimizer.__dict__.items() if key != "step"})
        for name in list(self.optimizer.__dict__):
            if name.startswith("_optimizer_") and name.endswith("_hooks"):
                setattr(outer, name, getattr(optimizer, name))
                setattr(self.optimizer, name, OrderedDict())
        self.optimizer.param_groups = self._groups
        self.optimizer.state = defaultdict(dict)
        optimizer.state = _ShardedAway()
        outer.state = _ShardedAway()

    @property
    def state(self) -> Any:
        """Piece → its state."""
        return self.optimizer.state

    def require(self, method: str) -> None:
        """Raises TypeError if the optimizer does not have a method."""
        if not hasattr(self.optimizer, method):
            raise TypeError(f"{type(self.optimizer).__name__} has no {method}()")

    @contextmanager
    def on_pieces(self) -> Iterator[Optimizer]:
        """Inside, the groups hold pieces."""
        whole = [group["params"] for group in self._groups]
        try:
            for index, group in enumerate(self._groups):
                group["params"] = self.pieces_of_group(index)
            yield self.optimizer
        finally:
            for group, parameters in zip(self._groups, whole, strict=True):
                group["params"] = parameters

    def step(self) -> None:
        """Updates the pieces that have a gradient."""
        step: Any = type(self.optimizer).step
        with self.on_pieces():
            # Without what torch puts around step, which would call hooks a second time.
            (step.__wrapped__ if hasattr(step, "hooked") else step)(self.optimizer)
        self._given._opt_called = True  # type: ignore[attr-defined]  # a scheduler made from it warns otherwise

    def forget_state(self) -> None:
        """For pieces that are no more."""
        self.optimizer.state = defaultdict(dict)

    def load(self, groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]) -> None:
        """Loads the settings of groups and the state of pieces, with the class's own ways of loading.

        Args:
            groups: one per group, without "params".
            state: of pieces; may be kept.
        """
        with self.on_pieces():
            pieces = [piece for group in self._groups for piece in group["params"]]
            number = {id(piece): place for place, piece in enumerate(pieces)}
            packed = [
                {**saved, "params": [number[id(piece)] for piece in group["params"]]}
                for saved, group in zip(groups, self._groups, strict=True)
            ]
            entries = {number[id(piece)]: entry for piece, entry in state.items() if entry}
            self.optimizer.load_state_dict({"state": entries, "param_groups": packed})
            loaded = self.optimizer.param_groups
        self.optimizer.param_groups = self._groups
        for group, settings in zip(self._groups, loaded, strict=True):
            group.update({key: value for key, value in settings.items() if key != "params"})


class _ShardedAway(defaultdict[Any, Any]):
    """The `state` of an optimizer whose state is elsewhere."""

    def __missing__(self, parameter: Any) -> NoReturn:
        raise KeyError("the state of this optimizer is sharded; ShardedOptimizer.state_dict() gathers it")
