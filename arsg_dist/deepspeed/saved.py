"""DeepSpeed checkpoints of engines with ARSG, read without an engine and one parameter at a time."""

import re
from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    GROUP_PADDINGS,
    OPTIMIZER_STATE_DICT,
    PARAM_ALIGNMENT_PADDINGS,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from torch import Tensor

from arsg_dist.deepspeed.layout import (
    Piece,
    offsets_in_group,
    pieces_of_each,
    pieces_of_range,
    read_piece,
)
from arsg_dist.engine.state import BUFFER, PARAMETER, SavedState, TensorSpec, in_order

ARSG_SECTION: Final = "arsg"
"""What every checkpoint of an engine with ARSG tells about itself, beside what DeepSpeed writes."""

_MASTER: Final = "fp32"
_FP32_FLAT_GROUPS: Final = "fp32_flat_groups"
_SHARD: Final = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
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


@dataclass
class _Flat:
    """A flat tensor, cut over the ranks: what each rank wrote of it."""

    group: int
    masters: list[Tensor]
    states: list[dict[str, Any]]
    pieces: list[list[Piece]]


class ShardedCheckpoint(SavedCheckpoint):
    """What `engine.save_checkpoint` wrote under any ZeRO stage.

    Args:
        directory: with the tag, as ``checkpoints/global_step100``.

    Raises:
        ValueError: no such checkpoint, an incomplete one, one of another optimizer, or one of a kind not read here.
    """

    def __init__(self, directory: Path) -> None:
        self.where = directory
        shards = sorted(
            (int(match[1]), path)
            for path in directory.glob("*_optim_states.pt")
            if (match := _SHARD.match(path.name))
        )
        if any(not path.name.endswith("mp_rank_00_optim_states.pt") for _, path in shards):
            raise ValueError(
                f"{directory} is of a tensor- or pipeline-parallel model, which is not supported"
            )
        models = [load_lazily(path) for path in model_files(directory)]
        if not models:
            raise ValueError(f"{directory} holds no DeepSpeed checkpoint (no *_model_states.pt)")
        self._shapes: dict[str, torch.Size] = {}
        self._flats: list[_Flat] = []
        self.loss_scale = None
        if shards:
            optimizers = [load_lazily(path)[OPTIMIZER_STATE_DICT] for _, path in shards]
            written = models[0]["dp_world_size"]
            if [rank for rank, _ in shards] != list(range(written)):
                raise ValueError(
                    f"{directory} is incomplete, or of several runs: {written} ranks wrote it, and there are files of "
                    f"{[rank for rank, _ in shards]}"
                )
            self._read_zero(optimizers, models[0])
        else:
            self._read_unsharded(models[0])
        self.module = module_tensors(models, self._shapes)
        self.aliases = self.module.aliases
        group_of: dict[str, int] = {}
        self._parts: dict[str, list[tuple[_Flat, int, Piece]]] = {name: [] for name in self._shapes}
        for flat in self._flats:
            for rank, pieces in enumerate(flat.pieces):
                for piece in pieces:
                    self._parts[piece.name].append((flat, rank, piece))
                    group_of[piece.name] = flat.group
        self.group_of, self._trained = group_of, list(self._shapes)

    def entries(self, name: str) -> set[str]:
        """See `SavedState`."""
        if name not in self._parts:  # frozen
            return set()
        flat, rank, _ = self._parts[name][0]
        return set(flat.states[rank])

    def master(self, name: str) -> Tensor:
        """See `SavedCheckpoint`."""
        return self._whole(name, [flat.masters[rank] for flat, rank, _ in self._parts[name]])

    def state(self, name: str, key: str) -> Any:
        """See `SavedCheckpoint`."""
        values = [flat.states[rank][key] for flat, rank, _ in self._parts[name]]
        return int(values[0]) if key == "step" else self._whole(name, values)

    def _whole(self, name: str, tensors: list[Tensor]) -> Tensor:
        parts = zip(tensors, self._parts[name], strict=True)
        return torch.cat([read_piece(tensor, piece) for tensor, (_, _, piece) in parts]).view(
            self._shapes[name]
        )

    def _read_zero(self, optimizers: list[dict[str, Any]], model: dict[str, Any]) -> None:
        first = optimizers[0]
        inner: list[Any] = [
            saved.get(BASE_OPTIMIZER_STATE, saved.get(OPTIMIZER_STATE_DICT)) for saved in optimizers
        ]
        if not isinstance(inner[0], dict):
            raise ValueError(
                f"{self.where} was saved with zero_optimization.elastic_checkpoint, which is not read"
            )
        self.groups = settings_of(inner[0]["param_groups"], self.where)
        self.loss_scale = _scale_of(first.get("loss_scaler"))
        stage_3 = _FP32_FLAT_GROUPS in first
        world_size = len(optimizers)
        for index, shapes in enumerate(model["param_shapes"]):
            numels = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
            self._shapes |= {name: torch.Size(shape) for name, shape in shapes.items()}
            if stage_3:
                masters = [saved[_FP32_FLAT_GROUPS][index] for saved in optimizers]
                identity = index
                pieces = [pieces_of_each(numels.items(), rank, world_size) for rank in range(world_size)]
            else:
                masters = [saved[SINGLE_PARTITION_OF_FP32_GROUPS][index] for saved in optimizers]
                identity = inner[0]["param_groups"][index]["params"][0]
                paddings = (
                    first[PARAM_ALIGNMENT_PADDINGS][index] if PARAM_ALIGNMENT_PADDINGS in first else None
                )
                offsets = offsets_in_group(numels.values(), paddings or [0] * len(numels))
                listed = [
                    (name, numel, at) for (name, numel), at in zip(numels.items(), offsets, strict=True)
                ]
                # BF16_Optimizer writes its masters with the padding, the others without.
                stripped = first[GROUP_PADDINGS][index] if "loss_scaler" in first else 0
                size = masters[0].numel() + stripped
                pieces = [pieces_of_range(listed, rank, size) for rank in range(world_size)]
            group = next(i for i, g in enumerate(inner[0]["param_groups"]) if identity in g["params"])
            states = [saved["state"].get(identity, {}) for saved in inner]
            self._flats.append(_Flat(group, masters, states, pieces))

    def _read_unsharded(self, model: dict[str, Any]) -> None:
        saved, section = model["optimizer"], model.get(ARSG_SECTION)
        half = OPTIMIZER_STATE_DICT in saved
        inner = saved[OPTIMIZER_STATE_DICT] if half else saved
        self.groups = settings_of(inner["param_groups"], self.where)
        if section is None:
            raise ValueError(
                f"{self.where} does not tell the parameters' names (it was saved without arsg_dist.deepspeed)"
            )
        if half and saved["dynamic_loss_scale"]:
            self.loss_scale = {key: saved[key] for key in ("cur_scale", "cur_iter", "last_overflow_iter")}
        for index, names in enumerate(section["groups"]):
            for position, name in zip(section["positions"][index], names, strict=True):
                master = saved["fp32_groups"][index][position] if half else model["module"][name]
                identity = inner["param_groups"][index]["params"][position]
                state = inner["state"].get(identity, {})
                self._shapes[name] = master.shape
                self._flats.append(_Flat(index, [master], [state], [[Piece(name, 0, 0, master.numel())]]))


class UniversalCheckpoint(SavedCheckpoint):
    """A checkpoint that a converter to DeepSpeed's universal layout wrote, this package's or DeepSpeed's.

    Args:
        directory: with the tag.

    Raises:
        ValueError: not such a directory, or one of another optimizer.
    """

    def __init__(self, directory: Path) -> None:
        self.where = directory
        path = directory / "zero" / "optimizer_state.pt"
        if not path.is_file():
            raise ValueError(f"{directory} is not in the universal layout: {path} does not exist")
        saved = load_lazily(path)
        section = saved.get(ARSG_SECTION)
        self.groups = settings_of(saved["param_groups"], directory)
        self.group_of = None
        self.loss_scale = section["loss_scale"] if section else _scale_of(saved.get("loss_scaler"))
        models = [load_lazily(path) for path in model_files(directory)]
        if not models:
            raise ValueError(f"{directory} has no *_model_states.pt")
        trained: dict[str, None] = {}
        if section:
            self.group_of = {name: i for i, names in enumerate(section["groups"]) for name in names}
            trained = dict.fromkeys(self.group_of)
        for shapes in models[0].get("param_shapes") or []:
            trained |= dict.fromkeys(shapes)
        self._trained = list(trained)
        self.module = module_tensors(models, trained)
        self.aliases = self.module.aliases

    def entries(self, name: str) -> set[str]:
        """See `SavedState`."""
        return {path.stem for path in (self.where / "zero" / name).glob("*.pt")} - {_MASTER}

    def master(self, name: str) -> Tensor:
        """See `SavedCheckpoint`."""
        master: Tensor = self._read(name, _MASTER)
        return master

    def state(self, name: str, key: str) -> Any:
        """See `SavedCheckpoint`."""
        return self._read(name, key)

    def _read(self, name: str, key: str) -> Any:
        value = load_lazily(self.where / "zero" / name / f"{key}.pt")
        if key == "step":
            return int(value)
        # DeepSpeed's converter writes flat tensors for stage 3.
        return value["param"] if isinstance(value, dict) else value


def read_checkpoint(directory: str | Path) -> SavedCheckpoint:
    """Opens a checkpoint directory of either kind.

    Args:
        directory: with the tag; or the one above it, whose file `latest` names the tag.

    Raises:
        ValueError: no checkpoint of an engine with ARSG.
    """
    directory = resolve_tag(Path(directory))
    if (directory / "zero" / "optimizer_state.pt").is_file():
        return UniversalCheckpoint(directory)
    return ShardedCheckpoint(directory)


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


def _scale_of(scaler: Any) -> dict[str, Any] | None:
    if scaler is None or not getattr(scaler, "dynamic", False):
        return None
    return {
        key: getattr(scaler, key)
        for key in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        if hasattr(scaler, key)
    }
