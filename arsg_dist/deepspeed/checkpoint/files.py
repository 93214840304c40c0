"""Find the files of DeepSpeed checkpoints, and take their contents apart."""

import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import BUFFER, PARAMETER, TensorSpec, in_order
from arsg_dist.safe_io.files import inside, read_text
from arsg_dist.safe_io.text import printable

ARSG_SECTION: Final = "arsg"
"""What every checkpoint of an engine with ARSG tells about itself, beside what DeepSpeed writes."""

SAVED_AT: Final = "arsg_global_steps"
"""In every shard of the optimizer the updates made when it was saved."""

COUNTERS: Final = ("global_steps", "global_samples", "skipped_steps")
"""Attributes of DeepSpeed's engine that its checkpoints keep."""

SCALER_STATE: Final = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Attributes of DeepSpeed's dynamic loss scalers, as far as each has them."""

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

OWN_KEYS: Final = _NOT_COMMON | {
    *COUNTERS,
    *("lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names"),
    *("dp_world_size", "mp_world_size", "ds_config", "ds_version"),
    *("num_experts", "ds_autoep_layers", "autoep_layers", "checkpoint_parallel_dimensions"),
}
"""What DeepSpeed's checkpoints have beside the client's state, in the same dict."""

_LATEST_LIMIT: Final = 4096
_MODEL: Final = re.compile(r"(?:zero_pp_rank_(\d{1,9})_)?mp_rank_00_model_states\.pt")


@dataclass
class ModuleTensors:
    """Hold what a model has beside trained parameters.

    Attributes:
        buffers: persistent ones, by name.
        frozen: parameters that the optimizer does not have, by name.
        aliases: further names of trained parameters → the name they are saved under.
        common: everything else that DeepSpeed wrote: counters, scheduler, the user's client state.
        absent: frozen parameters that the model has and the checkpoint has not (`exclude_frozen_parameters=True`).
    """

    buffers: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)

    @property
    def counters(self) -> dict[str, int]:
        """Return those of the engine that wrote it."""
        return {name: int(self.common[name]) for name in COUNTERS if name in self.common}


class SavedCheckpoint(SavedState):
    """Read a checkpoint directory of DeepSpeed, sharded or universal.

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
        """Read the whole trained parameter in fp32, in its shape."""

    @abstractmethod
    def state(self, name: str, key: str) -> Any:
        """Read an entry of a parameter's state: a tensor in its shape, or the step count."""

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
    """Count the updates that changed anything; 0 if the counters do not tell."""
    return int(counters.get("global_steps", 0)) - int(counters.get("skipped_steps", 0))


def check_state_is_there(where: Path, counters: Mapping[str, Any], *, found: bool) -> None:
    """Refuse a checkpoint whose optimizer has no state although it has made updates.

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


def check_one_save(where: Path, model: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> None:
    """Refuse files of two saves under one tag, of which the later one was broken off.

    Args:
        where: what messages call it.
        model: content of the first file of the model.
        others: further ones, and the shards of the optimizer.

    Raises:
        ValueError: they are.
    """
    after = model.get("global_steps")
    for other in others:
        then = other.get(SAVED_AT, other.get("global_steps", after))
        if after is not None and then != after:
            raise ValueError(
                f"{where} has files of two saves, after {then} and {after} updates, as when a save under the same tag "
                "was broken off: load another tag, and save each checkpoint under a tag of its own"
            )


@contextmanager
def reading(where: Path) -> Iterator[None]:
    """Name the directory in errors about content that is not as DeepSpeed writes it.

    Raises:
        ValueError: instead of KeyError, TypeError and their like; other ValueErrors than ours are completed.
    """
    try:
        yield
    except ValueError as error:
        if str(where) in str(error):
            raise
        raise ValueError(f"{where} is not as DeepSpeed writes it: {printable(error)}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, StopIteration) as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{where} is not as DeepSpeed writes it: {printable(said)}") from error


def steps_of(name: str, where: Path) -> list[str]:
    """Split a tag's or parameter's name from a file into names of directories.

    DeepSpeed makes "a/b" a directory in a directory, which is fine.

    Raises:
        ValueError: it would lead out of the directory.
    """
    steps = name.split("/")
    if any(step in ("", ".", "..") or "\0" in step for step in steps):
        raise ValueError(f"{where}: {printable(repr(name))} leads out of its directory")
    return steps


def check_tag(tag: str) -> None:
    """Check a tag before a checkpoint is saved under it.

    Raises:
        ValueError: the checkpoint would not be found by it, or by the file `latest` beside it.
    """
    first = tag.split("/")[0]
    if first in ("latest", "latest_universal"):
        raise ValueError(f"tag={tag!r} is the name of DeepSpeed's own file: choose another")
    try:
        steps_of(tag, Path("tag"))
    except ValueError:
        raise ValueError(f"tag={tag!r} leads out of the directory of checkpoints: choose another") from None
    if tag != tag.strip() or "\n" in tag:
        raise ValueError(
            f"tag={tag!r} would not be found by the file `latest`: leave out the space around it"
        )


def named_by(latest: Path, *, follow: bool = False) -> str | None:
    """Read the tag that a file `latest` holds; None if there is no such file.

    Args:
        latest: path of the file.
        follow: whether it may be a link.

    Raises:
        ValueError: it is no regular file, or what it holds leads out of its directory.
    """
    try:
        tag = read_text(latest, limit=_LATEST_LIMIT, follow=follow).strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    steps_of(tag, latest)
    return tag


def resolve_tag(directory: Path) -> Path:
    """Return the directory itself, or the one below that its file `latest` names.

    Raises:
        ValueError: it does not exist, or `latest` leads elsewhere.
    """
    tag = named_by(directory / "latest")
    if tag is not None:
        directory = inside(directory, *tag.split("/"))
        if directory.is_symlink():
            raise ValueError(f"{directory}, which `latest` names, is a link: name the directory it leads to")
    if not directory.is_dir():
        raise ValueError(f"checkpoint directory {directory} does not exist")
    return directory


def model_files(directory: Path) -> list[Path]:
    """List the files with the module's tensors, by rank: several for stage 3."""
    by_rank = {}
    for path in directory.glob("*mp_rank_00_model_states.pt"):
        if match := _MODEL.fullmatch(path.name):  # others have the experts of a mixture
            by_rank[int(match[1]) if match[1] else -1] = path
    if -1 in by_rank:  # a universal checkpoint has its one file under both names
        return [by_rank[-1]]
    return [by_rank[rank] for rank in sorted(by_rank)]


def module_tensors(models: list[dict[str, Any]], trained: Any) -> ModuleTensors:
    """Take buffers, frozen parameters and the rest out of the model files' contents."""
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
        absent=[name for name in section.get("frozen") or () if name not in frozen],
    )


def settings_of(
    groups: list[dict[str, Any]], directory: Path, *, of_arsg: bool = True
) -> list[dict[str, Any]]:
    """Return the settings of saved parameter groups.

    Raises:
        ValueError: of another optimizer, where it must be of ARSG.
    """
    settings = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in groups]
    if of_arsg and not all(
        "remote_mu" in group or {"mu", "preconditioner"} <= group.keys() for group in settings
    ):
        raise ValueError(
            f"{directory} was not written by ARSG or RemoteObservation: its parameter groups have "
            f"{sorted(settings[0])}. Load the weights only (load_checkpoint with load_module_only=True), or "
            "convert the optimizer with ARSG.from_adam outside DeepSpeed"
        )
    return settings


def scale_of(scaler: Any) -> dict[str, Any] | None:
    """Return the state of a dynamic loss scaler from a file; None for another scaler.

    Raises:
        ValueError: it has something else than numbers.
    """
    if scaler is None or not getattr(scaler, "dynamic", False):
        return None
    scale = {key: getattr(scaler, key) for key in SCALER_STATE if hasattr(scaler, key)}
    if not all(isinstance(value, int | float) for value in scale.values()):
        raise ValueError(f"the loss scale is {printable(scale)}")
    return scale
