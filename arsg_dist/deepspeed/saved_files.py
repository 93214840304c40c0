"""What DeepSpeed checkpoints of any kind have in common, and the contents of their files."""

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from arsg_dist.deepspeed.engine_state import COUNTERS
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import BUFFER, PARAMETER, TensorSpec, in_order

ARSG_SECTION: Final = "arsg"
"""What every checkpoint of an engine with ARSG tells about itself, beside what DeepSpeed writes."""

_NOT_COMMON: Final = frozenset(
    {
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "frozen_param_fragments",
        "shared_params",
        ARSG_SECTION,
    }
)


@dataclass
class ModuleTensors:
    """What a model has beside trained parameters.

    Attributes:
        buffers: persistent ones, by name.
        frozen: parameters that the optimizer does not have, by name.
        aliases: further names of trained parameters → the name they are saved under.
        common: everything else that DeepSpeed wrote: counters, scheduler, the user's client state.
    """

    buffers: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)

    @property
    def counters(self) -> dict[str, int]:
        """Those of the engine that wrote it."""
        return {name: int(self.common[name]) for name in COUNTERS if name in self.common}


class SavedCheckpoint(SavedState):
    """A checkpoint directory that DeepSpeed wrote, or a converter to its universal layout.

    Attributes:
        where: the directory, with the tag.
        module: buffers, frozen parameters and the rest.
    """

    module: ModuleTensors
    _trained: list[str]

    @abstractmethod
    def entries(self, name: str) -> set[str]:
        """See `SavedState`."""

    @abstractmethod
    def master(self, name: str) -> Tensor:
        """The whole trained parameter in fp32, in its shape."""

    @abstractmethod
    def state(self, name: str, key: str) -> Any:
        """An entry of a parameter's state: the whole tensor in the parameter's shape, or the step count."""

    @property
    def trained(self) -> list[str]:
        """See `SavedState`."""
        return self._trained

    @property
    def parameters(self) -> list[str]:
        """See `SavedState`."""
        return [*self._trained, *self.module.frozen]

    @property
    def buffers(self) -> list[str]:
        """See `SavedState`."""
        return list(self.module.buffers)

    def spec(self, entry: str, name: str) -> TensorSpec | None:
        """See `SavedState`."""
        tensor = self._tensor(entry, name)
        return None if tensor is None else TensorSpec(tensor.dtype, tuple(tensor.shape))

    def number(self, name: str, entry: str) -> int:
        """See `SavedState`."""
        return int(self.state(name, entry))

    def read(
        self, entry: str, name: str, start: int = 0, numel: int | None = None, order: tuple[int, ...] = ()
    ) -> Tensor:
        """See `SavedState`."""
        tensor = self._tensor(entry, name)
        if tensor is None:
            raise ValueError(f"{self.where} has no {entry} of {name!r}")
        flat = in_order(tensor.detach(), order)
        return flat.narrow(0, start, flat.numel() - start if numel is None else numel)

    def _tensor(self, entry: str, name: str) -> Tensor | None:
        if entry == BUFFER:
            return self.module.buffers.get(name)
        if entry != PARAMETER:
            return self.state(name, entry) if entry != "step" and entry in self.entries(name) else None
        if name in self.module.frozen:
            return self.module.frozen[name]
        return self.master(name) if name in self._trained_set else None

    @cached_property
    def _trained_set(self) -> frozenset[str]:
        return frozenset(self._trained)


def updates_made(counters: Mapping[str, Any]) -> int:
    """How many updates an engine has made that changed anything; 0 if its counters do not tell."""
    return int(counters.get("global_steps", 0)) - int(counters.get("skipped_steps", 0))


def check_state_is_there(where: Path, counters: Mapping[str, Any], *, found: bool) -> None:
    """Refuses a checkpoint whose optimizer has no state although it has made updates.

    DeepSpeed 0.19.8 writes such ones with the optimizer on NVMe, for engines of other optimizers without a word.

    Args:
        where: what messages call it.
        counters: of the engine that wrote it.
        found: whether any parameter has state in it.

    Raises:
        ValueError: it is one.
    """
    if updates_made(counters) > 0 and not found:
        raise ValueError(
            f"{where} was written after {updates_made(counters)} updates and has no optimizer state, as DeepSpeed's "
            "checkpoints with the optimizer on NVMe: m, v and v̂ are lost. Load the weights only (load_checkpoint with "
            "load_module_only=True), or an older checkpoint"
        )


def resolve_tag(directory: Path) -> Path:
    """The directory itself, or where its file `latest` points.

    Raises:
        ValueError: it does not exist.
    """
    latest = directory / "latest"
    if latest.is_file():
        directory = directory / latest.read_text().strip()
    if not directory.is_dir():
        raise ValueError(f"checkpoint directory {directory} does not exist")
    return directory


def load_lazily(path: Path) -> Any:
    """A file of DeepSpeed's, its tensors mapped into memory and read when used.

    The files are pickles: open only those you trust.
    """
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def model_files(directory: Path) -> list[Path]:
    """The files with the module's tensors, by rank: several for stage 3."""
    by_rank = {}
    for path in directory.glob("*mp_rank_00_model_states.pt"):
        match = re.match(r"zero_pp_rank_(\d+)_", path.name)
        by_rank[int(match[1]) if match else -1] = path
    if -1 in by_rank:  # a universal checkpoint has its one file under both names
        return [by_rank[-1]]
    return [by_rank[rank] for rank in sorted(by_rank)]


def module_tensors(models: list[dict[str, Any]], trained: Any) -> ModuleTensors:
    """Buffers, frozen parameters and the rest from the contents of the model files."""
    first = models[0]
    section = first.get(ARSG_SECTION) or {}
    aliases = dict(section.get("aliases") or first.get("shared_params") or {})
    tensors, names = first["module"] or {}, set(first.get("buffer_names") or ())
    fragments = [part for model in models if (part := model.get("frozen_param_fragments"))]
    frozen = {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and name not in names | aliases.keys() and name not in trained
    }
    for name, shape in (first.get("frozen_param_shapes") or {}).items() if fragments else ():
        # Stage 3: the module has placeholders, and each rank a fragment, the last one padded.
        whole = torch.cat([part[name].reshape(-1) for part in fragments])
        frozen[name] = whole[: torch.Size(shape).numel()].view(torch.Size(shape))
    return ModuleTensors(
        buffers={name: tensors[name] for name in tensors if name in names},
        frozen=frozen,
        aliases=aliases,
        common={key: value for key, value in first.items() if key not in _NOT_COMMON},
    )


def settings_of(groups: list[dict[str, Any]], directory: Path) -> list[dict[str, Any]]:
    """Settings of saved parameter groups.

    Raises:
        ValueError: of another optimizer.
    """
    settings = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in groups]
    if any("mu" not in group or "preconditioner" not in group for group in settings):
        raise ValueError(
            f"{directory} was not written by ARSG: its parameter groups have {sorted(settings[0])}. Load the weights "
            "only (load_checkpoint with load_module_only=True), or convert the optimizer with ARSG.from_adam outside "
            "DeepSpeed"
        )
    return settings


def scale_of(scaler: Any) -> dict[str, Any] | None:
    """The state of a dynamic loss scale that DeepSpeed pickled; None for another."""
    if scaler is None or not getattr(scaler, "dynamic", False):
        return None
    return {
        key: getattr(scaler, key)
        for key in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        if hasattr(scaler, key)
    }
