"""The lists of parameters in a sharded optimizer's `param_groups`, whose readers wait for what is on its way."""

import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from arsg_dist.horovod.shards import Shards


class WatchedList(list[Tensor]):
    """A group's parameters: whoever goes through them waits for those of the last update. A copy is a plain list.

    Args:
        parameters: of the group.
        optimizer: updates them.
    """

    def __init__(self, parameters: Iterable[Tensor], optimizer: "Shards") -> None:
        super().__init__(parameters)
        self._optimizer = weakref.ref(optimizer)

    def _wait(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer.synchronize_parameters()

    def __iter__(self) -> Iterator[Tensor]:
        self._wait()
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        self._wait()
        return super().__getitem__(index)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return list, (list(self),)


def watch(optimizer: "Shards") -> None:
    """Lets the readers of all groups wait."""
    for group in optimizer.param_groups:
        if not isinstance(group["params"], WatchedList):
            group["params"] = WatchedList(group["params"], optimizer)
