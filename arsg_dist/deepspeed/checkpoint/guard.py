"""Guard DeepSpeed's checkpoints against what they lose or get wrong under ARSG.

Wraps `save_checkpoint` and `load_checkpoint` of DeepSpeed's engine, with checks on every rank alike; engines with other
optimizers are left alone.

Loading stays DeepSpeed's own, which executes what the pickles of a checkpoint name: programs keep objects of their own
classes in its client state and would lose them. The checks come before that and execute nothing.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
from deepspeed.checkpoint.constants import BASE_OPTIMIZER_STATE, OPTIMIZER_STATE_DICT
from deepspeed.runtime.engine import DeepSpeedEngine as _Engine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import groups

from arsg_dist.deepspeed.checkpoint.engine_state import (
    check_saved,
    fill,
    link_fragments,
    publish,
)
from arsg_dist.deepspeed.checkpoint.files import (
    ARSG_SECTION,
    check_state_is_there,
    model_files,
    named_by,
    reading,
    settings_of,
)
from arsg_dist.deepspeed.checkpoint.pickles import RefusedPickleError, look_into
from arsg_dist.deepspeed.checkpoint.reader import ShardedCheckpoint, UniversalCheckpoint
from arsg_dist.deepspeed.checkpoint.zero_state import (
    group_names,
    group_positions,
    needed_state,
    shapes_of,
    swaps_to_nvme,
    trained_names,
)
from arsg_dist.deepspeed.patching import Method, wrap_once
from arsg_dist.engine import TorchCommunicator
from arsg_dist.engine.replicated_state import aliases_of
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import restore_settings
from arsg_dist.optim import ARSG

_CONVERT = "python -m arsg_dist.deepspeed.universal INPUT OUTPUT"
_NVME = (
    "with optimizer state or parameters on NVMe DeepSpeed 0.19.8 saves checkpoints from which it resumes without the "
    "optimizer state: offload to the CPU ('offload_optimizer': {'device': 'cpu'}), or train without checkpoints"
)


def guard_checkpoints() -> None:
    """Wrap DeepSpeed's engine; calling this again changes nothing.

    Raises:
        RuntimeError: this DeepSpeed is built differently.
    """
    wrap_once(_Engine, "save_checkpoint", _guarded_save)
    wrap_once(_Engine, "load_checkpoint", _guarded_load)
    wrap_once(_Engine, "_load_zero_checkpoint", _with_own_universal_loader)
    if hasattr(_Engine, "_common_checkpoint_state"):
        wrap_once(_Engine, "_common_checkpoint_state", _with_arsg_section)
    else:  # until 0.19.2
        wrap_once(_Engine, "_save_checkpoint", _with_arsg_section_among_the_clients)
        wrap_once(_Engine, "_save_moe_checkpoint", _with_arsg_section_among_the_clients)


def _has_arsg(engine: Any) -> bool:
    return isinstance(getattr(engine, "basic_optimizer", None), ARSG)


def _with_arsg_section(method: Method) -> Method:
    def _common_checkpoint_state(engine: Any, *args: Any, **kwargs: Any) -> Any:
        state = method(engine, *args, **kwargs)
        if _has_arsg(engine):
            state[ARSG_SECTION] = _arsg_section(engine)
        return state

    return _common_checkpoint_state


def _with_arsg_section_among_the_clients(method: Method) -> Method:
    """Save the section as part of the client's state, which DeepSpeed puts into the same file."""

    def _save_checkpoint(
        engine: Any, save_dir: Any, tag: Any, client_state: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        client_state = dict(client_state or {})
        if _has_arsg(engine):
            client_state[ARSG_SECTION] = _arsg_section(engine)
        return method(engine, save_dir, tag, client_state, *args, **kwargs)

    return _save_checkpoint


def _arsg_section(engine: Any) -> dict[str, Any]:
    """Return what a checkpoint says of the parameters, beside what DeepSpeed says."""
    trained = trained_names(engine)
    return {
        "groups": group_names(engine),
        "frozen": [name for name in shapes_of(engine) if name not in trained],
        "positions": group_positions(engine),
        "aliases": aliases_of(engine.module, engine.param_names),
    }


def _guarded_save(method: Method) -> Method:
    def save_checkpoint(engine: Any, save_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if _has_arsg(engine):
            if swaps_to_nvme(engine):
                raise ValueError(_NVME)
            window = engine.gradient_accumulation_steps()
            done = engine.micro_steps % window
            if done and deepspeed.comm.get_rank() == 0:
                warnings.warn(
                    f"save_checkpoint after {done} of {window} micro-batches of an update: their gradients are not "
                    "saved; a resumed run starts the update again",
                    stacklevel=2,
                )
        return method(engine, save_dir, *args, **kwargs)

    return save_checkpoint


def _guarded_load(method: Method) -> Method:
    def load_checkpoint(
        engine: Any,
        load_dir: Any,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> Any:
        options = {
            "load_module_strict": load_module_strict,
            "load_optimizer_states": load_optimizer_states,
            "load_lr_scheduler_states": load_lr_scheduler_states,
            "load_module_only": load_module_only,
            "custom_load_fn": custom_load_fn,
        }
        if not _has_arsg(engine):
            return method(engine, load_dir, tag, **options)
        universal = engine.load_universal_checkpoint()
        with_optimizer = load_optimizer_states and not load_module_only
        check = _Check(engine, universal, with_optimizer, load_module_strict, own=custom_load_fn is None)
        found = _agree(engine, lambda: check.tag(Path(load_dir), tag))
        if universal and found is not None and not engine.zero_optimization():
            # DeepSpeed has no universal checkpoints under stage 0: it reads the counters, and we the rest.
            options["load_optimizer_states"] = False
            path, client_state = engine._load_checkpoint(load_dir, found, **options)
            fill(engine, UniversalCheckpoint(Path(load_dir) / found, look_into), with_optimizer)
            publish(engine)
        elif check.weights is not None:
            path, client_state = _load_weights(engine, load_dir, found, options, check.weights)
        else:
            path, client_state = method(engine, load_dir, found, **options)
        if path is not None:
            if load_lr_scheduler_states and not load_module_only and not with_optimizer:
                _take_rates(engine)
            link_fragments(engine)
            client_state.pop(ARSG_SECTION, None)
        return path, client_state

    return load_checkpoint


def _with_own_universal_loader(method: Method) -> Method:
    def _load_zero_checkpoint(
        engine: Any, load_dir: Any, tag: Any, load_optimizer_states: bool = True
    ) -> Any:
        if not (_has_arsg(engine) and engine.load_universal_checkpoint()):
            return method(engine, load_dir, tag, load_optimizer_states=load_optimizer_states)
        fill(engine, UniversalCheckpoint(Path(load_dir) / str(tag), look_into), load_optimizer_states)
        publish(engine)
        return True

    return _load_zero_checkpoint


def _agree(engine: Any, check: Callable[[], str | None]) -> str | None:
    """Run a check; raise ValueError on every rank if it did on any. Collective."""
    message = found = None
    try:
        found = check()
    except (ValueError, OSError) as error:
        message = str(error)
    messages = TorchCommunicator(engine.device).all_gather_object(message)
    said = next((text for text in messages if text is not None), None)
    if said is not None:
        raise ValueError(said if None not in messages else f"{said} (not on every rank)")
    return found


def _load_weights(
    engine: Any, load_dir: Any, tag: Any, options: dict[str, Any], weights: SavedState
) -> tuple[Any, Any]:
    """Load weights without the optimizer's state, at every stage into the masters too.

    DeepSpeed itself loads nothing then at stage 3, or what `latest` names, and at stage 0 in half precision leaves the
    masters, from which the next update makes the weights again. It reads the counters, the scheduler and the client's
    state, and we the rest.
    """
    optimizer = engine.optimizer
    if engine._optimizer_has_ckpt_event_prologue():
        optimizer.checkpoint_event_prologue()
    # With True it would read no optimizer's state under ZeRO, and with False at stage 3 all of another checkpoint.
    options = {
        **options,
        "load_optimizer_states": engine.zero_optimization(),
        "custom_load_fn": _leave_module,
    }
    path, client_state = engine._load_checkpoint(load_dir, tag, **options)
    fill(engine, weights, with_optimizer=False)
    publish(engine)
    if engine._optimizer_has_ckpt_event_epilogue():
        optimizer.checkpoint_event_epilogue()
    return path, client_state


def _leave_module(src: Any, dst: Any) -> None:
    """Take the place of DeepSpeed's loading of the module."""


def _take_rates(engine: Any) -> None:
    """Give the groups the learning rates of a schedule that was loaded without them."""
    rates, groups_ = getattr(engine.lr_scheduler, "_last_lr", None), engine.basic_optimizer.param_groups
    if rates is not None and len(rates) == len(groups_):
        for group, rate in zip(groups_, rates, strict=True):
            restore_settings(group, {"lr": rate})


class _Check:
    """Check a checkpoint before anything of it is loaded.

    Args:
        engine: that will load it.
        universal: whether it is to be a universal one.
        with_optimizer: whether the optimizer's state will be loaded.
        strict: whether every weight must be there.
        own: whether no function of the user's loads the module.

    Attributes:
        weights: what the weights will be loaded from; None leaves them to DeepSpeed.
    """

    def __init__(
        self, engine: Any, universal: bool, with_optimizer: bool, strict: bool, *, own: bool
    ) -> None:
        self._engine, self._universal, self._with_optimizer = engine, universal, with_optimizer
        self._strict, self._own = strict, own
        self.weights: SavedState | None = None

    def tag(self, load_dir: Path, tag: Any) -> str | None:
        """Check, and return the tag, or None without one, which DeepSpeed reports."""
        if tag is None:
            tag = named_by(load_dir / ("latest_universal" if self._universal else "latest"), follow=True)
        if tag is None:
            return None
        if swaps_to_nvme(self._engine):
            raise ValueError(_NVME)
        directory = load_dir / str(tag)
        with reading(directory):
            self._check(directory)
        return str(tag)

    def _check(self, directory: Path) -> None:
        if not directory.is_dir():
            raise ValueError(f"checkpoint directory {directory} does not exist")
        converted = (directory / "zero" / "optimizer_state.pt").is_file()
        if self._universal:
            if not converted:
                raise ValueError(
                    f"the DeepSpeed config has checkpoint.load_universal, and {directory} is not converted: run "
                    f"'{_CONVERT}' with it as INPUT"
                )
            saved = UniversalCheckpoint(directory, look_into)
            check_saved(self._engine, saved, self._with_optimizer, strict=self._strict)
        elif converted:
            raise ValueError(
                f'{directory} is a universal checkpoint: set "checkpoint": {{"load_universal": true}} in the DeepSpeed '
                "config"
            )
        elif self._with_optimizer:
            _check_sharded(self._engine, directory)
        elif self._own and not self._engine.has_moe_layers and not isinstance(self._engine, PipelineEngine):
            self.weights = _checked_weights(self._engine, directory, strict=self._strict)


def _checked_weights(engine: Any, directory: Path, *, strict: bool) -> SavedState | None:
    """Open a checkpoint of any optimizer for its weights; None leaves them to DeepSpeed."""
    files = model_files(directory)
    if not files:
        raise ValueError(f"{directory} holds no DeepSpeed checkpoint (no *_model_states.pt)")
    if Path(engine._get_ckpt_name(str(directory.parent), directory.name)) not in files:
        _refuse_other_kind(directory, "it was written under another ZeRO stage, or by fewer ranks at stage 3")
    try:
        weights = ShardedCheckpoint(directory, look_into, weights_only=True)
    except RefusedPickleError:
        if engine.zero_optimization_stage() in (1, 2):
            return None
        raise
    if engine.zero_optimization_partition_weights() and len(files) != engine.seq_dp_world_size:
        _refuse_ranks(directory, len(files), engine)
    check_saved(engine, weights, with_optimizer=False, strict=strict)
    known = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
    if strict and (unknown := [name for name in weights.parameters if name not in known]):
        raise ValueError(
            f"{directory} has a parameter {unknown[0]!r}, which the model has not: load_module_strict=False passes "
            "it over"
        )
    return weights


def _check_sharded(engine: Any, directory: Path) -> None:
    """Check a checkpoint to be loaded by ranks and a stage like those that saved it."""
    files = model_files(directory)
    if not files:
        raise ValueError(f"{directory} holds no DeepSpeed checkpoint (no *_model_states.pt)")
    sharded = engine.zero_optimization()
    try:
        model = look_into(files[0])
    except RefusedPickleError:
        if not sharded:
            return  # the optimizer is in this file, with objects that only DeepSpeed's loading it makes
        model = {}
    written = model.get("dp_world_size", _ranks_in(directory))
    if sharded and written != engine.seq_dp_world_size:
        _refuse_ranks(directory, written, engine)
    above, tag = str(directory.parent), directory.name
    if sharded:
        path = Path(engine._get_zero_ckpt_name(above, tag))
    elif engine.has_moe_layers:  # each expert-parallel rank has an optimizer file of its own
        rank = groups._get_expert_parallel_rank(groups._get_max_expert_size_name())
        path = Path(engine._get_optimizer_ckpt_name(above, tag, rank))
    else:
        path = files[0]
    if path not in files and not path.is_file():
        _refuse_other_kind(directory, "it was written under another ZeRO stage or precision")
    content = look_into(path)
    saved = content[OPTIMIZER_STATE_DICT] if sharded else content["optimizer"]
    if saved is None:
        _refuse_other_kind(directory, "it was written under another ZeRO stage or precision")
    own = "fp32_flat_groups" if engine.zero_optimization_partition_weights() else BASE_OPTIMIZER_STATE
    if sharded and own not in saved:
        _refuse_other_kind(directory, "it was written under another ZeRO stage or precision")
    inner = saved.get(BASE_OPTIMIZER_STATE, saved.get(OPTIMIZER_STATE_DICT, saved))
    if not isinstance(inner, dict):
        return  # an elastic checkpoint, which DeepSpeed checks itself
    settings = settings_of(inner["param_groups"], directory)
    check_state_is_there(directory, model, found=any(inner["state"].values()))
    for group, parameters in zip(settings, (group["params"] for group in inner["param_groups"]), strict=True):
        for parameter in parameters:
            state = inner["state"].get(parameter)
            lost = needed_state(group) - state.keys() if state else set()
            if lost:
                raise ValueError(
                    f"{directory} has lost {sorted(lost)} of the optimizer state and is not loaded"
                )


def _ranks_in(directory: Path) -> int:
    return len(list(directory.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt")))


def _refuse_ranks(directory: Path, written: int, engine: Any) -> NoReturn:
    raise ValueError(
        f"{directory} was written by {written} ranks and this job has {engine.seq_dp_world_size}: resume on "
        f'{written}, or convert it by \'{_CONVERT}\' and set "checkpoint": {{"load_universal": true}}'
    )


def _refuse_other_kind(directory: Path, reason: str) -> NoReturn:
    raise ValueError(
        f"{directory} does not fit this engine, {reason}: use the ZeRO stage and precision that wrote it, or convert "
        f'it by \'{_CONVERT}\' and set "checkpoint": {{"load_universal": true}}'
    )
