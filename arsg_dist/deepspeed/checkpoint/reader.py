"""Read DeepSpeed checkpoints of ARSG without an engine, one parameter at a time."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    GROUP_PADDINGS,
    OPTIMIZER_STATE_DICT,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from torch import Tensor

from arsg_dist.deepspeed.checkpoint.files import (
    ARSG_SECTION,
    SavedCheckpoint,
    check_one_save,
    model_files,
    module_tensors,
    reading,
    resolve_tag,
    scale_of,
    settings_of,
    steps_of,
)
from arsg_dist.deepspeed.checkpoint.partitioning import (
    Piece,
    offsets_in_group,
    pieces_of_each,
    pieces_of_range,
    read_piece,
)
from arsg_dist.deepspeed.checkpoint.pickles import Reader, load
from arsg_dist.deepspeed.versions import PARAM_ALIGNMENT_PADDINGS
from arsg_dist.safe_io.files import inside

_MASTER: Final = "fp32"
_FP32_FLAT_GROUPS: Final = "fp32_flat_groups"
_FIRST: Final = 64
_SHARD: Final = re.compile(r"(?:bf16_)?zero_pp_rank_(\d{1,9})_mp_rank_(\d+)_optim_states\.pt$")


@dataclass
class _Flat:
    """Hold what each rank wrote of a flat tensor that was cut over the ranks."""

    group: int
    masters: list[Tensor]
    states: list[dict[str, Any]]
    pieces: list[list[Piece]]


class ShardedCheckpoint(SavedCheckpoint):
    """Read what `engine.save_checkpoint` wrote under any ZeRO stage.

    Args:
        directory: with the tag, as ``checkpoints/global_step100``.
        read: of each file.
        weights_only: read parameters and buffers, whatever the optimizer was, and neither its settings nor its state.
        of_arsg: refuse checkpoints of other optimizers.

    Raises:
        ValueError: no such checkpoint, an incomplete one, one of another optimizer, or one of a kind not read here.
    """

    def __init__(
        self, directory: Path, read: Reader = load, *, weights_only: bool = False, of_arsg: bool = True
    ) -> None:
        self.where, self._weights_only, self._of_arsg = directory, weights_only, of_arsg
        shards = sorted(
            (int(match[1]), path)
            for path in directory.glob("*_optim_states.pt")
            if (match := _SHARD.match(path.name))
        )
        layers = next(directory.glob("layer_*-model_states.pt"), None)  # of a pipeline
        if layers or any(not path.name.endswith("mp_rank_00_optim_states.pt") for _, path in shards):
            raise ValueError(
                f"{directory} is of a tensor- or pipeline-parallel model, which is not supported"
            )
        models = [read(path) for path in model_files(directory)]
        if not models:
            raise ValueError(f"{directory} holds no DeepSpeed checkpoint (no *_model_states.pt)")
        check_one_save(directory, models[0], models[1:])
        experts = sorted(directory.glob("layer_*_expert_*_mp_rank_00_model_states.pt"))
        # Masters of ranks with different experts have the same names; the experts' weights have files of their own.
        apart = bool(experts) and (models[0].get(ARSG_SECTION) or {}).get("experts_apart", True)
        if apart and not weights_only:
            raise ValueError(
                f"{directory} is of a mixture of experts spread over ranks (ep_size > 1), which is not supported"
            )
        if experts:
            models = [_with_experts(directory, models[0], experts, read)]
        self._shapes: dict[str, torch.Size] = {}
        self._flats: list[_Flat] = []
        self.loss_scale = None
        self.groups = []
        if apart:
            if not shards:
                self._read_unnamed(models[0])
        elif shards and (whole := unsharded_state(read(shards[0][1]))) is not None:
            self._read_unsharded({**models[0], "optimizer": whole})
        elif shards:
            ranks, written = [rank for rank, _ in shards], models[0]["dp_world_size"]
            if len(ranks) == written and ranks == list(range(len(ranks))):
                optimizers = [read(path)[OPTIMIZER_STATE_DICT] for _, path in shards]
                check_one_save(directory, models[0], optimizers)
                self._read_zero(optimizers, models[0])
            # Weights are in the module of stages 0 to 2 as well, as they were computed with.
            elif not (weights_only and (directory / "mp_rank_00_model_states.pt").is_file()):
                raise ValueError(
                    f"{directory} is incomplete, or of several runs: {written} ranks wrote it, and there are files of "
                    f"{ranks}"
                )
        else:
            self._read_unsharded(models[0])
        self.module = module_tensors(models, self._shapes)
        self.aliases, self.counters = self.module.aliases, self.module.counters
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
            if self._weights_only and model["module"]:
                return
            raise ValueError(
                f"{self.where} was saved with zero_optimization.elastic_checkpoint, which is not read"
            )
        self.groups = self._settings(inner[0]["param_groups"])
        self.loss_scale = None if self._weights_only else scale_of(first.get("loss_scaler"))
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
            states = [{} if self._weights_only else saved["state"].get(identity, {}) for saved in inner]
            self._flats.append(_Flat(group, masters, states, pieces))

    def _settings(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [] if self._weights_only else settings_of(groups, self.where, of_arsg=self._of_arsg)

    def _read_unsharded(self, model: dict[str, Any]) -> None:
        saved, section = model["optimizer"], model.get(ARSG_SECTION)
        if self._weights_only and (saved is None or section is None):
            self._read_unnamed(model)
            return
        half = OPTIMIZER_STATE_DICT in saved
        inner = saved[OPTIMIZER_STATE_DICT] if half else saved
        self.groups = self._settings(inner["param_groups"])
        if section is None:
            raise ValueError(
                f"{self.where} does not tell the parameters' names (it was saved without arsg_dist.deepspeed)"
            )
        if half and saved["dynamic_loss_scale"] and not self._weights_only:
            self.loss_scale = {key: saved[key] for key in ("cur_scale", "cur_iter", "last_overflow_iter")}
        for index, names in enumerate(section["groups"]):
            for position, name in zip(section["positions"][index], names, strict=True):
                master = saved["fp32_groups"][index][position] if half else model["module"][name]
                identity = inner["param_groups"][index]["params"][position]
                state = {} if self._weights_only else inner["state"].get(identity, {})
                self._shapes[name] = master.shape
                self._flats.append(_Flat(index, [master], [state], [[Piece(name, 0, 0, master.numel())]]))

    def _read_unnamed(self, model: dict[str, Any]) -> None:
        """Find whose another optimizer's masters are, by their values: rounded, they are the weights.

        Weights of which none is found stay as the module has them.
        """
        saved = model.get("optimizer")
        if not isinstance(saved, dict):
            return
        without = {*(model.get("buffer_names") or ()), *(model.get("shared_params") or ())}
        weights = {
            name: tensor
            for name, tensor in model["module"].items()
            if isinstance(tensor, Tensor) and name not in without
        }
        masters: list[Tensor] = [master for group in saved.get("fp32_groups", ()) for master in group]
        found = [(master, _holders(master, weights, master.shape)) for master in masters]
        # Of FusedAdam: a group in one tensor.
        found += [(flat, _holders(flat, weights)) for flat in saved.get("fp32_groups_flat", ())]
        for master, pieces in found:
            self._shapes |= {piece.name: model["module"][piece.name].shape for piece in pieces}
            self._flats.append(_Flat(0, [master], [{}], [pieces]))


def _holders(master: Tensor, weights: dict[str, Tensor], shape: torch.Size | None = None) -> list[Piece]:
    """Find the weights that a master, or several one after another, round to; take them out of `weights`."""
    flat, at, pieces = master.detach().reshape(-1), 0, list[Piece]()
    while at < flat.numel():
        fitting = (
            name
            for name, weight in weights.items()
            if shape in (None, weight.shape) and _begins_with(flat[at:], weight)
        )
        name = next(fitting, None)
        if name is None:
            break
        pieces.append(Piece(name, 0, at, weights[name].numel()))
        at += weights.pop(name).numel()
    return pieces


def _begins_with(masters: Tensor, weight: Tensor) -> bool:
    """Tell whether the first masters round to a weight; look at few elements first, as most weights differ there."""
    flat = weight.detach().reshape(-1)
    numel = flat.numel()
    return 0 < numel <= masters.numel() and all(
        torch.equal(masters[:some].to(flat.dtype), flat[:some]) for some in (min(_FIRST, numel), numel)
    )


def unsharded_state(content: dict[str, Any]) -> dict[str, Any] | None:
    """Return the optimizer that stage 0 in bf16 puts into a shard's file (until 0.18.4); None for a shard."""
    saved: dict[str, Any] = content[OPTIMIZER_STATE_DICT]
    return saved if isinstance(saved, dict) and "fp32_groups" in saved else None


def _with_experts(
    directory: Path, model: dict[str, Any], experts: list[Path], read: Reader
) -> dict[str, Any]:
    """Put a mixture's experts, which have files of their own, with the rest of the model."""
    module = dict(model["module"])
    for path in experts:
        module |= read(path)
    optimizer = directory / "expp_rank_0_mp_rank_00_optim_states.pt"  # of stage 0
    if optimizer.is_file():
        model = {**model, "optimizer": read(optimizer)["optimizer"]}
    return {**model, "module": module}


class UniversalCheckpoint(SavedCheckpoint):
    """Read a universal checkpoint, of this package's converter or DeepSpeed's.

    Args:
        directory: with the tag.
        read: of each file.
        weights_only: read parameters and buffers, whatever the optimizer was, and neither its settings nor its state.
        of_arsg: refuse checkpoints of other optimizers.

    Raises:
        ValueError: not such a directory, or one of another optimizer.
    """

    def __init__(
        self, directory: Path, read: Reader = load, *, weights_only: bool = False, of_arsg: bool = True
    ) -> None:
        self.where, self._read_file = directory, read
        path = directory / "zero" / "optimizer_state.pt"
        if not path.is_file():
            raise ValueError(f"{directory} is not in the universal layout: {path} does not exist")
        saved = read(path)
        section = saved.get(ARSG_SECTION)
        self.groups = [] if weights_only else settings_of(saved["param_groups"], directory, of_arsg=of_arsg)
        self.group_of = None
        self.loss_scale = None
        if not weights_only:
            self.loss_scale = section["loss_scale"] if section else scale_of(saved.get("loss_scaler"))
        models = [read(path) for path in model_files(directory)]
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
        self.aliases, self.counters = self.module.aliases, self.module.counters

    def entries(self, name: str) -> set[str]:
        """See `SavedState`."""
        return {path.stem for path in self._file(name, _MASTER).parent.glob("*.pt")} - {_MASTER}

    def master(self, name: str) -> Tensor:
        """See `SavedCheckpoint`."""
        master: Tensor = self._read(name, _MASTER)
        return master

    def state(self, name: str, key: str) -> Any:
        """See `SavedCheckpoint`."""
        return self._read(name, key)

    def _file(self, name: str, key: str) -> Path:
        return inside(self.where, "zero", *steps_of(name, self.where), f"{key}.pt")

    def _read(self, name: str, key: str) -> Any:
        value = self._read_file(self._file(name, key))
        if key == "step":
            return int(value)
        # DeepSpeed's converter writes flat tensors for stage 3.
        return value["param"] if isinstance(value, dict) else value


def read_checkpoint(
    directory: str | Path, *, trust_pickle: bool = False, of_arsg: bool = True
) -> SavedCheckpoint:
    """Open a checkpoint directory of either kind.

    Its files are pickles, from which data alone is taken.

    Args:
        directory: with the tag; or the one above it, whose file `latest` names the tag.
        trust_pickle: execute what its files name besides data, which is refused otherwise: only where you trust their
            writer.
        of_arsg: refuse checkpoints of other optimizers.

    Raises:
        ValueError: no checkpoint of an engine with ARSG, or one that names something to execute.
    """
    directory = resolve_tag(Path(directory))
    read = partial(load, trust_pickle=trust_pickle)
    with reading(directory):
        if (directory / "zero" / "optimizer_state.pt").is_file():
            return UniversalCheckpoint(directory, read, of_arsg=of_arsg)
        return ShardedCheckpoint(directory, read, of_arsg=of_arsg)
