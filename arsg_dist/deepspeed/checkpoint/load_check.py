"""Check a DeepSpeed checkpoint before anything of it is loaded."""

import warnings
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
from deepspeed.checkpoint.constants import BASE_OPTIMIZER_STATE, OPTIMIZER_STATE_DICT
from deepspeed.moe.layer import MoE
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import groups
from torch import Tensor

from arsg_dist.checkpoint.pickles import RefusedPickleError
from arsg_dist.deepspeed.checkpoint.engine_state import check_saved
from arsg_dist.deepspeed.checkpoint.files import (
    ARSG_SECTION,
    check_one_save,
    check_state_is_there,
    model_files,
    named_by,
    reading,
    settings_of,
)
from arsg_dist.deepspeed.checkpoint.pickles import look_into, trust_pickles
from arsg_dist.deepspeed.checkpoint.reader import ShardedCheckpoint, UniversalCheckpoint, unsharded_state
from arsg_dist.deepspeed.checkpoint.zero_state import (
    experts_apart,
    group_names,
    needed_state,
    swaps_to_nvme,
)
from arsg_dist.deepspeed.versions import expert_file, resumes_stage_0
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.safe_io.text import printable

NVME = (
    "with optimizer state or parameters on NVMe DeepSpeed 0.19.8 saves checkpoints from which it resumes without the "
    "optimizer state: offload to the CPU ('offload_optimizer': {'device': 'cpu'}), or train without checkpoints"
)
OFFLOADED = "the engine's states are offloaded (offload_states): call engine.reload_states() first"
_CONVERT = "python -m arsg_dist.deepspeed.universal INPUT OUTPUT"
_SHOWN = 5


class LoadCheck:
    """Check a checkpoint, on each rank what it can see.

    Args:
        engine: that will load it.
        with_optimizer: whether the optimizer's state will be loaded.
        with_schedule: whether the schedule's state will be loaded.
        strict: whether every weight must be there, and no other.
        own_loader: a function of the user's that loads the module, or None.

    Attributes:
        saved: what our own loader is to load from; None leaves loading to DeepSpeed.
    """

    def __init__(
        self, engine: Any, with_optimizer: bool, with_schedule: bool, strict: bool, own_loader: Any
    ) -> None:
        self._engine, self._with_optimizer, self._with_schedule = engine, with_optimizer, with_schedule
        self._strict, self._own_loader = strict, own_loader
        self._universal = engine.load_universal_checkpoint()
        self.saved: SavedState | None = None

    def tag(self, load_dir: Path, tag: Any) -> str | None:
        """Check, and return the tag; None where there is nothing to load, which DeepSpeed says."""
        if swaps_to_nvme(self._engine):
            raise ValueError(NVME)
        if getattr(self._engine.optimizer, "offloaded_states", None):
            raise ValueError(OFFLOADED)
        window = self._engine.gradient_accumulation_steps()
        done = self._engine.micro_steps % window
        if done and not isinstance(self._engine, PipelineEngine):
            raise ValueError(
                f"load_checkpoint after {done} of {window} micro-batches of an update, whose gradients would go into "
                "the first update after it: finish the update, then load"
            )
        latest = "latest_universal" if self._universal else "latest"
        if tag is None:
            tag = named_by(load_dir / latest, follow=True)
            if tag is None:
                self._look_for_others(load_dir, latest)
                return None
            if self._universal:
                _warn_if_older(load_dir, str(tag))
        directory = load_dir / str(tag)
        with reading(directory):
            self._check(directory)
        return str(tag)

    def _look_for_others(self, load_dir: Path, latest: str) -> None:
        """Refuse a directory that is a checkpoint itself; name those in it that nobody asked for."""
        if model_files(load_dir):
            raise ValueError(
                f"{load_dir} is a checkpoint itself: pass the directory above it, and tag={load_dir.name!r}"
            )
        tags = [path.name for path in sorted(load_dir.glob("*")) if path.is_dir() and model_files(path)]
        if self._universal:
            raise ValueError(
                f"{load_dir} has no file {latest}: convert a checkpoint by '{_CONVERT}', which writes it, or pass its "
                "tag"
            )
        if tags and deepspeed.comm.get_rank() == 0:
            shown = [printable(name, limit=100) for name in tags[:_SHOWN]]
            more = f" and {len(tags) - _SHOWN} more" if len(tags) > _SHOWN else ""
            warnings.warn(
                f"nothing is loaded: {load_dir} has no file {latest}, which is written when a checkpoint is complete. "
                f"There are {', '.join(shown)}{more}: pass tag=... to load one",
                stacklevel=2,
            )

    def _check(self, directory: Path) -> None:
        engine, trusting = self._engine, False
        if not directory.is_dir():
            raise ValueError(f"checkpoint directory {directory} does not exist")
        converted = (directory / "zero" / "optimizer_state.pt").is_file()
        if self._universal and not converted:
            raise ValueError(
                f"the DeepSpeed config has checkpoint.load_universal, and {directory} is not converted: run "
                f"'{_CONVERT}' with it as INPUT"
            )
        if converted and not self._universal:
            raise ValueError(
                f'{directory} is a universal checkpoint: set "checkpoint": {{"load_universal": true}} in the DeepSpeed '
                "config"
            )
        files = model_files(directory)
        if not files:
            raise ValueError(f"{directory} holds no DeepSpeed checkpoint (no *_model_states.pt)")
        try:
            model = look_into(files[0])
        except RefusedPickleError:
            # Objects that only DeepSpeed's own loading, which executes them, can make.
            model, trusting = {}, True
        if self._with_schedule:
            _check_schedule(engine, model, directory)
        by_layers = experts_apart(engine) or isinstance(engine, PipelineEngine)
        if self._own_loader is not None and (self._universal or isinstance(engine, PipelineEngine)):
            kind = (
                "universal checkpoints"
                if self._universal
                else "pipelines, whose layers have files of their own"
            )
            raise ValueError(f"custom_load_fn is not called for {kind}: leave it out")
        if self._universal:
            self.saved = UniversalCheckpoint(directory, look_into, weights_only=not self._with_optimizer)
            check_saved(engine, self.saved, self._with_optimizer, strict=self._strict)
            self._check_unknown(self.saved)
        elif self._with_optimizer:
            _check_sharded(engine, model, files, directory)
            self._check_module(model, files, directory)
            by_us = not engine.zero_optimization() and not by_layers and not resumes_stage_0()
            if by_us or (self._own_loader is not None and engine.zero_optimization_partition_weights()):
                self.saved = self._open(directory, trusting=trusting, weights_only=False)
        elif by_layers or (self._own_loader is not None and not engine.zero_optimization_partition_weights()):
            self._check_module(model, files, directory)
        else:
            self.saved = self._open(directory, trusting=trusting, weights_only=True)

    def _open(self, directory: Path, *, trusting: bool, weights_only: bool) -> SavedState:
        """Open a checkpoint for our own loader; for its weights one of any optimizer, ranks, stage and precision."""
        read = _load_trusting if trusting else look_into
        try:
            saved = ShardedCheckpoint(directory, read, weights_only=weights_only)
        except RefusedPickleError:
            saved = ShardedCheckpoint(directory, _load_trusting, weights_only=weights_only)
        if self._own_loader is not None and weights_only:
            return saved  # it knows what fits
        strict = self._strict and self._own_loader is None
        check_saved(self._engine, saved, with_optimizer=not weights_only, strict=strict)
        if self._own_loader is None:
            self._check_unknown(saved)
        return saved

    def _check_unknown(self, saved: SavedState) -> None:
        module = self._engine.module
        own = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        own |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
        unknown = [name for name in (*saved.parameters, *saved.buffers) if name not in own]
        if self._strict and unknown:
            raise ValueError(
                f"{saved.where} has {unknown[0]!r}, which the model has not: load_module_strict=False passes it over"
            )

    def _check_module(self, model: dict[str, Any], files: list[Path], directory: Path) -> None:
        """Compare names, and below stage 3 shapes, with the module's, for DeepSpeed would find out halfway."""
        engine = self._engine
        if isinstance(engine, PipelineEngine):
            _check_layers(engine, directory)
            return
        mine = Path(engine._get_ckpt_name(str(directory.parent), directory.name))
        if self._with_optimizer and mine in files and mine != files[0]:
            look_into(mine)  # damaged ones are found before the other ranks wait for this one
        experts = _expert_files(engine, directory)
        tensors, own = model.get("module"), engine.module.state_dict()
        if not tensors or self._own_loader is not None or _renames(engine.module):
            return
        parameters = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
        absent = [name for name in own if name not in tensors and not (experts and "expert" in name)]
        unknown = [name for name in tensors if name not in own]
        if self._strict and (absent or unknown):
            name, what = (absent[0], "lacks") if absent else (unknown[0], "has")
            who = "which the model has" if absent else "which the model has not"
            raise ValueError(
                f"{directory} {what} {name!r}, {who}: load_module_strict=False "
                f"{'keeps the value of the model' if absent else 'passes it over'}"
            )
        for name, tensor in tensors.items():
            other = own.get(name)
            if not (isinstance(tensor, Tensor) and isinstance(other, Tensor)):
                continue
            if tensor.shape != other.shape and not engine.zero_optimization_partition_weights():
                raise ValueError(
                    f"{directory} has {name!r} in shape {tuple(tensor.shape)}, the model in {tuple(other.shape)}"
                )
            if self._with_optimizer and name in parameters and tensor.dtype != other.dtype:
                _refuse_other_kind(
                    engine, directory, f"it was saved in {str(tensor.dtype).removeprefix('torch.')}"
                )


def _renames(module: torch.nn.Module) -> bool:
    """Tell whether a module may take other names than its own when it loads."""
    hooked = any(part._load_state_dict_pre_hooks for part in module.modules())
    return hooked or type(module).load_state_dict is not torch.nn.Module.load_state_dict


def _load_trusting(path: Path) -> Any:
    """Read a file as DeepSpeed does, which will execute what it names a moment later."""
    with trust_pickles():
        return look_into(path)


def _warn_if_older(load_dir: Path, tag: str) -> None:
    """Tell that the converted checkpoint is not that of the newest, from which a requeued run would go back."""
    newest = named_by(load_dir / "latest", follow=True)
    if newest is None or newest == tag or deepspeed.comm.get_rank() != 0:
        return
    try:
        steps = [look_into(model_files(load_dir / name)[0]).get("global_steps", 0) for name in (tag, newest)]
    except (ValueError, OSError, IndexError, AttributeError):
        return
    if steps[0] < steps[1]:
        warnings.warn(
            f"{load_dir}: latest_universal names {printable(tag, limit=100)} after {steps[0]} updates, and latest "
            f"{printable(newest, limit=100)} after {steps[1]}. The older one is loaded: to go on from the newer, "
            f"convert it by '{_CONVERT}', or take load_universal out of the DeepSpeed config",
            stacklevel=2,
        )


def _check_schedule(engine: Any, model: dict[str, Any], directory: Path) -> None:
    """Refuse a schedule's state that is not there, or of another kind, for DeepSpeed would find out halfway."""
    if engine.lr_scheduler is None or "lr_scheduler" not in model:
        return
    saved = model["lr_scheduler"]
    remedy = "load_lr_scheduler_states=False begins the schedule of this engine anew"
    if saved is None:
        raise ValueError(
            f"{directory} has no state of a learning rate schedule, and this engine has one: {remedy}"
        )
    own = engine.lr_scheduler.state_dict()
    if not isinstance(saved, dict) or not isinstance(own, dict):
        return
    lacks = sorted(str(key) for key in own.keys() - saved.keys() if not str(key).startswith("_"))
    if lacks:
        has = sorted(str(key) for key in saved if not str(key).startswith("_"))
        raise ValueError(
            f"{directory} has the state of another kind of schedule than this engine's "
            f"{type(engine.lr_scheduler).__name__}: it has {printable(has)} and lacks {lacks}; {remedy}"
        )


def _check_layers(engine: Any, directory: Path) -> None:
    for index, layer in enumerate(engine.module.forward_funcs):
        if hasattr(layer, "load_state_dict") and not engine.module.ckpt_layer_path_list(
            str(directory), index
        ):
            raise ValueError(
                f"{directory} has no file of layer {index}: it is of another pipeline, or incomplete"
            )


def _expert_files(engine: Any, directory: Path) -> list[Path]:
    """List this rank's files of experts.

    Raises:
        ValueError: one does not exist.
    """
    paths = []
    layers = [module for module in engine.module.modules() if isinstance(module, MoE)]
    for layer, module in enumerate(layers):
        rank = groups._get_expert_parallel_rank(module.expert_group_name)
        for expert in range(rank * module.num_local_experts, (rank + 1) * module.num_local_experts):
            path = expert_file(engine, directory, layer, expert)
            if not path.is_file():
                raise ValueError(
                    f"{directory} has no file {path.name}: it has other experts, or is incomplete"
                )
            look_into(path)
            paths.append(path)
    return paths


def _check_sharded(engine: Any, model: dict[str, Any], files: list[Path], directory: Path) -> None:
    """Check a checkpoint to be loaded by ranks and a stage like those that saved it."""
    sharded = engine.zero_optimization()
    if not model and not sharded:
        return  # the optimizer is in this file, with objects that only DeepSpeed's loading it makes
    above, tag = str(directory.parent), directory.name
    optimizers = list(directory.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"))
    written = model.get("dp_world_size", len(optimizers))
    if sharded and written != engine.seq_dp_world_size:
        _refuse_ranks(directory, written, engine)
    if sharded:
        path = Path(engine._get_zero_ckpt_name(above, tag))
    elif engine.has_moe_layers:  # each expert-parallel rank has an optimizer file of its own
        rank = groups._get_expert_parallel_rank(groups._get_max_expert_size_name())
        path = Path(engine._get_optimizer_ckpt_name(above, tag, rank))
    else:
        path = files[0]
    other_kind = "it was written under another ZeRO stage or precision"
    if path not in files and not path.is_file():
        _refuse_other_kind(engine, directory, other_kind)
    content = look_into(path)
    saved = content[OPTIMIZER_STATE_DICT] if sharded else content["optimizer"]
    if saved is None and not sharded and optimizers:
        saved = unsharded_state(look_into(optimizers[0]))
    if saved is None:
        _refuse_other_kind(engine, directory, other_kind)
    own = "fp32_flat_groups" if engine.zero_optimization_partition_weights() else BASE_OPTIMIZER_STATE
    if sharded and own not in saved:
        _refuse_other_kind(engine, directory, other_kind)
    check_one_save(directory, model, [saved])
    inner = saved.get(BASE_OPTIMIZER_STATE, saved.get(OPTIMIZER_STATE_DICT, saved))
    if not isinstance(inner, dict):
        return  # an elastic checkpoint, which DeepSpeed checks itself
    settings = settings_of(inner["param_groups"], directory)
    _check_places(engine, model, directory)
    check_state_is_there(directory, model, found=any(inner["state"].values()))
    for group, parameters in zip(settings, (group["params"] for group in inner["param_groups"]), strict=True):
        for parameter in parameters:
            state = inner["state"].get(parameter)
            lost = needed_state(group) - state.keys() if state else set()
            if lost:
                raise ValueError(
                    f"{directory} has lost {sorted(lost)} of the optimizer state and is not loaded"
                )


def _check_places(engine: Any, model: dict[str, Any], directory: Path) -> None:
    """Refuse parameters in other groups or another order, for DeepSpeed loads masters and state by their places."""
    section = model.get(ARSG_SECTION) or {}
    shapes = model.get("param_shapes")
    if engine.zero_optimization() and shapes:
        saved = [[(name, tuple(shape)) for name, shape in group.items()] for group in shapes]
        own = [
            [(name, tuple(shape)) for name, shape in group.items()]
            for group in engine._get_zero_param_shapes()
        ]
    elif section.get("groups") and not engine.zero_optimization():
        saved = [[(name, ()) for name in group] for group in section["groups"]]
        own = [[(name, ()) for name in group] for group in group_names(engine)]
    else:
        return
    if saved == own:
        return
    trained_then, trained_now = ({name for group in part for name, _ in group} for part in (saved, own))
    for names, said in (
        (trained_now - trained_then, "has no optimizer state of {}, which this engine trains"),
        (trained_then - trained_now, "has the optimizer state of {}, which this engine does not train"),
    ):
        if names:
            raise ValueError(
                f"{directory} {said.format(repr(min(names)))}: load the weights alone (load_optimizer_states=False; "
                "load_module_strict=False, too, where the models differ)"
            )
    for index, (there, here) in enumerate(zip(saved, own, strict=False)):
        if there != here:
            first = next(i for i in range(len(there) + 1) if there[i : i + 1] != here[i : i + 1])
            said = [
                f"{part[first][0]!r} {part[first][1] or ''}".strip() if first < len(part) else "nothing"
                for part in (there, here)
            ]
            _refuse_other_kind(
                engine,
                directory,
                f"its parameters lie in other groups or another order (group {index} has {said[0]} where this engine "
                f"has {said[1]})",
            )
    _refuse_other_kind(
        engine,
        directory,
        f"its parameters lie in {len(saved)} groups, and those of this engine in {len(own)}",
    )


def _remedy(engine: Any) -> str:
    if experts_apart(engine) or isinstance(engine, PipelineEngine):
        kind = "pipeline" if isinstance(engine, PipelineEngine) else "mixture of experts spread over ranks"
        return (
            f"take its weights alone, for a {kind} cannot be converted (load_module_only=True, or "
            "load_optimizer_states=False)"
        )
    return f'convert it by \'{_CONVERT}\' and set "checkpoint": {{"load_universal": true}}'


def _refuse_ranks(directory: Path, written: int, engine: Any) -> NoReturn:
    raise ValueError(
        f"{directory} was written by {written} ranks and this job has {engine.seq_dp_world_size}: resume on {written}, "
        f"or {_remedy(engine)}"
    )


def _refuse_other_kind(engine: Any, directory: Path, reason: str) -> NoReturn:
    raise ValueError(
        f"{directory} does not fit this engine, {reason}: use the ZeRO stage, precision and groups that wrote it, or "
        f"{_remedy(engine)}"
    )
