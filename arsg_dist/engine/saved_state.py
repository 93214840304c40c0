"""Define how engines read a saved run, whatever files it lies in."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from arsg_dist.engine.state import TensorSpec, travelling


class SavedState(ABC):
    """Offer a saved run, of which any rank reads what it asks for.

    Attributes:
        where: what messages call it.
        groups: settings of the parameter groups.
        group_of: trained parameter → index in `groups`; None where the files do not tell.
        aliases: further names of parameters → the name they are saved under.
        loss_scale: as in `EngineState`.
        counters: as in `EngineState`.
    """

    where: Path
    groups: list[dict[str, Any]]
    group_of: dict[str, int] | None
    aliases: dict[str, str]
    loss_scale: dict[str, Any] | None
    counters: Mapping[str, int] = {}

    @property
    @abstractmethod
    def parameters(self) -> list[str]:
        """List all parameters, frozen ones too, without aliases."""

    @property
    @abstractmethod
    def trained(self) -> list[str]:
        """List the parameters that the optimizer has."""

    @property
    @abstractmethod
    def buffers(self) -> list[str]:
        """List persistent buffers."""

    @abstractmethod
    def entries(self, name: str) -> set[str]:
        """List a parameter's state entries, numbers too; none before its first step."""

    @abstractmethod
    def spec(self, entry: str, name: str) -> TensorSpec | None:
        """Describe a tensor; None if there is none, as for numbers."""

    @abstractmethod
    def number(self, name: str, entry: str) -> Any:
        """Return a number of a parameter: int, float, None, or a 0-dim tensor."""

    @abstractmethod
    def read(
        self, entry: str, name: str, start: int = 0, numel: int | None = None, order: tuple[int, ...] = ()
    ) -> Tensor:
        """Read elements of a tensor, 1-D, on the CPU.

        Args:
            entry: `PARAMETER`, `BUFFER` or an entry of the state.
            name: of the parameter or buffer.
            start: first element, counted in `order`.
            numel: how many; None for all.
            order: dimensions from the slowest to the fastest; empty for row by row.

        Raises:
            ValueError: there is none, or its file is damaged; the message names the file.
        """

    def whole(self, entry: str, name: str) -> Tensor:
        """Read a whole tensor in its shape, on the CPU; raise as `read`."""
        spec = self.spec(entry, name)
        if spec is None:
            raise ValueError(f"{self.where} has no {entry} of {name!r}")
        return self.read(entry, name).view(spec.shape)

    def check_shape(self, entry: str, name: str, shape: Iterable[int]) -> None:
        """Raise ValueError unless there is a tensor of this name and shape."""
        spec, wanted = self.spec(entry, name), tuple(shape)
        if spec is None:
            raise ValueError(f"{self.where} has no {entry} {name!r}: it is of another model")
        if spec.shape != wanted:
            raise ValueError(f"{self.where} has {name!r} in shape {spec.shape}, the model in {wanted}")

    def settings_for(self, names: Sequence[str], index: int, count: int) -> dict[str, Any]:
        """Find the saved settings for a group of these parameters.

        Args:
            names: of the group's parameters.
            index: of the group in the engine.
            count: of groups in the engine.

        Raises:
            ValueError: they were in groups of different settings, or in none.
        """
        if self.group_of is None:
            if len(self.groups) != count:
                raise ValueError(
                    f"{self.where} has {len(self.groups)} parameter groups and the engine has {count}"
                )
            return self.groups[index]
        absent = [name for name in names if name not in self.group_of]
        if absent:
            raise ValueError(
                f"{self.where} has no optimizer state for {absent[0]!r}: it is of another model, or the parameter "
                "was frozen then"
            )
        sources = sorted({self.group_of[name] for name in names})
        if not sources:
            return self.groups[index] if len(self.groups) == count else {}
        first, *others = (travelling(self.groups[source]) for source in sources)
        if any(other != first for other in others):
            raise ValueError(
                f"the engine's parameter group {index} has parameters of groups {sources} of {self.where}, whose "
                "settings differ: make the same groups"
            )
        return self.groups[sources[0]]
