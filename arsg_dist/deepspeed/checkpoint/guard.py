"""Guard DeepSpeed's checkpoints against what they lose or get wrong under ARSG.

Wraps `save_checkpoint` and `load_checkpoint` of DeepSpeed's engine, with checks on every rank alike; engines with other
optimizers are left alone.

Loading stays DeepSpeed's own, which executes what the pickles of a checkpoint name: programs keep objects of their own
classes in its client state and would lose them. The checks come before that and execute nothing.
"""

import glob
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import FROZEN_PARAM_FRAGMENTS
from deepspeed.runtime.engine import DeepSpeedEngine as _Engine
from deepspeed.runtime.pipe.module import PipelineModule
from torch import Tensor
from torch.optim import Optimizer

from arsg_dist.deepspeed.checkpoint.engine_state import fill, follow_weights, link_fragments, publish
from arsg_dist.deepspeed.checkpoint.files import (
    ARSG_SECTION,
    COUNTERS,
    OWN_KEYS,
    SAVED_AT,
    check_tag,
    model_files,
)
from arsg_dist.deepspeed.checkpoint.load_check import NVME, OFFLOADED, LoadCheck
from arsg_dist.deepspeed.checkpoint.zero_state import (
    experts_apart,
    group_names,
    group_positions,
    release_whole_parameters,
    shapes_of,
    swaps_to_nvme,
    trained_names,
)
from arsg_dist.deepspeed.config.schedules import follow_schedule, scheduled_settings
from arsg_dist.deepspeed.patching import Method, wrap_once
from arsg_dist.deepspeed.versions import loss_scaler, saves_stage_0
from arsg_dist.engine import TorchCommunicator
from arsg_dist.engine.replicated_state import aliases_of
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import BUFFER, PARAMETER, restore_settings
from arsg_dist.optim.by_name import OURS


def guard_checkpoints() -> None:
    """Wrap DeepSpeed's engine; calling this again changes nothing.

    Raises:
        RuntimeError: this DeepSpeed is built differently.
    """
    wrap_once(_Engine, "save_checkpoint", _guarded_save)
    wrap_once(_Engine, "load_checkpoint", _guarded_load)
    wrap_once(_Engine, "_get_all_ckpt_names", _with_literal_names)
    wrap_once(PipelineModule, "ckpt_layer_path_list", _with_literal_names)
    if hasattr(_Engine, "_common_checkpoint_state"):
        wrap_once(_Engine, "_common_checkpoint_state", _with_arsg_section)
    else:  # until 0.19.2
        wrap_once(_Engine, "_save_checkpoint", _with_arsg_section_among_the_clients)
        wrap_once(_Engine, "_save_moe_checkpoint", _with_arsg_section_among_the_clients)


def _has_arsg(engine: Any) -> bool:
    return isinstance(getattr(engine, "basic_optimizer", None), OURS)


def _with_literal_names(method: Method) -> Method:
    """Find the files in a directory called "lr=[0.1]", which DeepSpeed takes for a pattern."""

    def find(owner: Any, directory: Any, name: Any) -> Any:
        return method(
            owner, glob.escape(str(directory)), glob.escape(name) if isinstance(name, str) else name
        )

    return find


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
            plain = not engine.zero_optimization() and not engine.has_moe_layers
            if plain and engine.bfloat16_enabled() and not saves_stage_0():
                client_state["optimizer"] = engine.optimizer.state_dict()
            if engine.has_moe_layers:  # what DeepSpeed puts there itself for other models
                client_state["buffer_names"] = engine._get_buffer_names()
                if engine.zero_optimization():
                    client_state["param_shapes"] = engine._get_zero_param_shapes()
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
        "experts_apart": experts_apart(engine),
    }


def _guarded_save(method: Method) -> Method:
    def save_checkpoint(
        engine: Any, save_dir: Any, tag: Any = None, client_state: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not _has_arsg(engine):
            return method(
                engine, save_dir, tag, {} if client_state is None else client_state, *args, **kwargs
            )
        _agree(engine, lambda: _check_save(engine, tag, client_state))
        window = engine.gradient_accumulation_steps()
        done = engine.micro_steps % window
        if done and deepspeed.comm.get_rank() == 0:
            warnings.warn(
                f"save_checkpoint after {done} of {window} micro-batches of an update: their gradients are not "
                "saved; a resumed run starts the update again",
                stacklevel=2,
            )
        with _with_updates_made(engine):
            return method(engine, save_dir, tag, client_state or {}, *args, **kwargs)

    return save_checkpoint


@contextmanager
def _with_updates_made(engine: Any) -> Iterator[None]:
    """Let the shards of the optimizer say of which save they are, as the model's file does."""
    wrapper = engine.optimizer
    if not engine.zero_optimization():  # one file has all
        yield
        return
    state_dict = wrapper.state_dict
    wrapper.state_dict = lambda: {**state_dict(), SAVED_AT: engine.global_steps}
    try:
        yield
    finally:
        del wrapper.state_dict


def _check_save(engine: Any, tag: Any, client_state: Any) -> None:
    """Refuse what would be written and not read back.

    Raises:
        ValueError: it would.
    """
    if swaps_to_nvme(engine):
        raise ValueError(NVME)
    if getattr(engine.optimizer, "offloaded_states", None):
        raise ValueError(OFFLOADED)
    if not engine.zero_optimization() and not saves_stage_0() and experts_apart(engine):
        raise ValueError(
            f"DeepSpeed {deepspeed.__version__} loads no optimizer of experts spread over ranks at stage 0: take "
            "0.18.5 or later, or ZeRO 1"
        )
    if tag is not None:
        check_tag(str(tag))
    taken = sorted(
        key
        for key in OWN_KEYS.intersection(client_state or ())
        if key not in COUNTERS or client_state[key] != getattr(engine, key)
    )
    if taken:
        raise ValueError(
            f"client_state has {taken}, under which DeepSpeed's checkpoints have values of their own: one of the two "
            "would be lost; give it another name"
        )


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
        with_optimizer = load_optimizer_states and not load_module_only
        with_schedule = load_lr_scheduler_states and not load_module_only
        check = LoadCheck(engine, with_optimizer, with_schedule, load_module_strict, custom_load_fn)
        found = _agree(engine, lambda: check.tag(Path(load_dir), tag))
        if found is None:
            return method(engine, load_dir, None, **options)  # says so, and loads nothing
        own_schedule = scheduled_settings(engine)
        if check.saved is not None:
            path, client_state = _load_saved(engine, Path(load_dir), found, options, check.saved)
        elif custom_load_fn is not None:
            with _with_own_scale_in_bf16(engine):
                path, client_state = _load_by_function(engine, method, load_dir, found, options)
        else:
            with _with_own_frozen(engine), _with_own_scale_in_bf16(engine):
                path, client_state = method(engine, load_dir, found, **options)
            if not with_optimizer and hasattr(engine.optimizer, "refresh_fp32_params"):
                engine.optimizer.refresh_fp32_params()
        if not with_optimizer:
            _begin_slow_weights(engine.basic_optimizer)
        if with_schedule and not with_optimizer and engine.lr_scheduler is not None:
            follow_schedule(engine)
        if with_optimizer and not with_schedule:
            for group, settings in zip(engine.basic_optimizer.param_groups, own_schedule, strict=False):
                restore_settings(group, settings)
        # Of a backward pass whose update was not made, as after a loss that is not finite.
        engine.optimizer.zero_grad()
        link_fragments(engine)
        # Programs hand this to their next save, where DeepSpeed's own values of now would be overwritten; what was not
        # loaded may be meant to be.
        unloaded = {"lr_scheduler"} if not with_schedule else set()
        unloaded |= {"optimizer"} if not with_optimizer else set()
        return path, {k: v for k, v in client_state.items() if k not in OWN_KEYS - unloaded}

    return load_checkpoint


def _agree(engine: Any, check: Callable[[], str | None]) -> str | None:
    """Run a check; raise ValueError on every rank if it did on any, or found something else. Collective."""
    message = found = None
    try:
        found = check()
    except (ValueError, OSError) as error:
        message = str(error)
    results = TorchCommunicator(engine.device).all_gather_object((message, found))
    said = next((text for text, _ in results if text is not None), None)
    if said is not None:
        everywhere = all(text is not None for text, _ in results)
        raise ValueError(said if everywhere else f"{said} (not on every rank)")
    for rank, (_, other) in enumerate(results):
        if other != results[0][1]:
            raise ValueError(
                f"rank 0 would load the checkpoint {results[0][1]!r} and rank {rank} {other!r}: every rank must see "
                "the same directory; or pass the tag"
            )
    return found


def _load_saved(
    engine: Any, load_dir: Path, tag: str, options: dict[str, Any], saved: SavedState
) -> tuple[Any, Any]:
    """Load from any number of ranks and stage, with masters.

    Without the optimizer's state DeepSpeed itself loads nothing at stage 3, or what `latest` names, and at stage 0 in
    half precision leaves the masters, from which the next update makes the weights again; of a universal checkpoint it
    knows two moments, and at stage 0 none. It reads the counters, the scheduler and the client's state, and we the
    rest.
    """
    with_optimizer = options["load_optimizer_states"] and not options["load_module_only"]
    own_loader = options["custom_load_fn"]
    # With True it would read the optimizer's state at stage 0, and with False at stage 3 all of another checkpoint.
    options = {**options, "load_optimizer_states": engine.zero_optimization(), "custom_load_fn": None}
    file = str(model_files(load_dir / tag)[0])
    # Any rank's file has what DeepSpeed reads here; that of this rank may not be there.
    stand_ins = {"_get_all_ckpt_names": lambda *_: [file], "load_module_state_dict": lambda *_, **__: None}
    has_experts = engine.has_moe_layers
    vars(engine).update(
        stand_ins, has_moe_layers=False
    )  # until 0.19.2 it looks for their files in universal ones, too
    try:
        path, client_state = engine._load_checkpoint(str(load_dir), tag, **options)
    finally:
        engine.has_moe_layers = has_experts
        for name in stand_ins:
            delattr(engine, name)
    if own_loader is None or with_optimizer:
        _agree(engine, lambda: fill(engine, saved, with_optimizer))
        publish(engine)
    if own_loader is not None:
        _write_module(engine, own_loader, _state_dict(saved), with_optimizer)
    return path, client_state


@contextmanager
def _with_own_frozen(engine: Any) -> Iterator[None]:
    """Give DeepSpeed the engine's own frozen parameters where a checkpoint has none, over which it raises KeyError."""
    method = engine.load_module_state_dict

    def load_module_state_dict(checkpoint: dict[str, Any], **options: Any) -> Any:
        saved = checkpoint.get(FROZEN_PARAM_FRAGMENTS)
        if saved is not None:
            own = {name: getattr(part, "ds_tensor", part) for part, name in engine.param_names.items()}
            checkpoint = {**checkpoint, FROZEN_PARAM_FRAGMENTS: own | saved}
        return method(checkpoint, **options)

    engine.load_module_state_dict = load_module_state_dict
    try:
        yield
    finally:
        del engine.load_module_state_dict


@contextmanager
def _with_own_scale_in_bf16(engine: Any) -> Iterator[None]:
    """Keep the loss scale of 1 at stage 0 in bf16: until 0.18.4 DeepSpeed had one of 65536 there, and what was saved
    with it would divide the gradients of a later one by that."""
    scaler = loss_scaler(engine.optimizer)
    alone = engine.bfloat16_enabled() and not engine.zero_optimization() and scaler is not engine.optimizer
    own = dict(vars(scaler)) if alone else {}
    try:
        yield
    finally:
        if alone:
            vars(scaler).update(own, cur_iter=scaler.cur_iter)


def _load_by_function(
    engine: Any, method: Method, load_dir: Any, tag: str, options: dict[str, Any]
) -> tuple[Any, Any]:
    """Load what DeepSpeed does, and then let a function of the user's write the module. Collective.

    DeepSpeed calls it before the optimizer's state comes, whose masters would undo it in the next update.
    """
    with_optimizer = options["load_optimizer_states"] and not options["load_module_only"]
    tensors: dict[str, Any] = {}

    def load_module_state_dict(checkpoint: dict[str, Any], **_: Any) -> None:
        tensors.update(checkpoint["module"])
        if with_optimizer:  # masters and state are the checkpoint's, too, where the function writes nothing
            own = engine.module.state_dict()
            fitting = {n: t for n, t in tensors.items() if n in own and t.shape == own[n].shape}
            engine.module.load_state_dict(fitting, strict=False)

    engine.load_module_state_dict = load_module_state_dict
    try:
        path, client_state = method(engine, load_dir, tag, **{**options, "custom_load_fn": None})
    finally:
        del engine.load_module_state_dict
    _write_module(engine, options["custom_load_fn"], tensors, with_optimizer)
    return path, client_state


def _write_module(
    engine: Any, own_loader: Callable[..., Any], tensors: dict[str, Any], with_optimizer: bool
) -> None:
    """Call a function of the user's, and let the masters follow. Collective.

    Raises:
        ValueError: it raised on another rank.
    """
    sharded, error = engine.zero_optimization_partition_weights(), None
    release_whole_parameters(engine)
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=sharded):
        try:
            own_loader(src=tensors, dst=engine.module)
        except Exception as raised:
            error = raised
    if with_optimizer and not experts_apart(engine):
        follow_weights(engine)
    elif hasattr(engine.optimizer, "refresh_fp32_params"):
        engine.optimizer.refresh_fp32_params()
    if sharded:
        engine.optimizer.checkpoint_event_epilogue()
    failed = TorchCommunicator(engine.device).all_gather_object(error is not None)
    if error is not None:
        raise error
    if any(failed):
        raise ValueError(f"custom_load_fn raised an error on rank {failed.index(True)}, which says it")


def _state_dict(saved: SavedState) -> dict[str, Tensor]:
    """Read the whole model, under all of its names."""
    tensors = {name: saved.whole(PARAMETER, name) for name in saved.parameters}
    tensors |= {alias: tensors[name] for alias, name in saved.aliases.items() if name in tensors}
    return tensors | {name: saved.whole(BUFFER, name) for name in saved.buffers}


@torch.no_grad()
def _begin_slow_weights(optimizer: Optimizer) -> None:
    """Begin lookahead's slow weights at the loaded ones, which they would pull back to those of before."""
    for master, state in optimizer.state.items():
        if "slow_param" in state:
            state["slow_param"].copy_(master)
