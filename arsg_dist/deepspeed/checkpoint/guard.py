"""Guard DeepSpeed's checkpoints against what they lose or get wrong under ARSG.

Wraps `save_checkpoint` and `load_checkpoint` of DeepSpeed's engine, with checks on every rank alike; engines with other
optimizers are left alone.

Loading stays DeepSpeed's own, which executes what the pickles of a checkpoint name: programs keep objects of their own
classes in its client state and would lose them. The checks come before that and execute nothing.
"""

import glob
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine as _Engine
from deepspeed.runtime.pipe.module import PipelineModule
from torch import Tensor
from torch.optim import Optimizer

from arsg_dist.deepspeed.checkpoint.engine_state import fill, link_fragments, publish
from arsg_dist.deepspeed.checkpoint.files import ARSG_SECTION, COUNTERS, OWN_KEYS, check_tag, model_files
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
        return method(engine, save_dir, tag, client_state or {}, *args, **kwargs)

    return save_checkpoint


def _check_save(engine: Any, tag: Any, client_state: Any) -> None:
    """Refuse what would be written and not read back.

    Raises:
        ValueError: it would.
    """
    if swaps_to_nvme(engine):
        raise ValueError(NVME)
    if getattr(engine.optimizer, "offloaded_states", None):
        raise ValueError(OFFLOADED)
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
        else:
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
    vars(engine).update(stand_ins)
    try:
        path, client_state = engine._load_checkpoint(str(load_dir), tag, **options)
    finally:
        for name in stand_ins:
            delattr(engine, name)
    if own_loader is None:
        _agree(engine, lambda: fill(engine, saved, with_optimizer))
        publish(engine)
    else:  # at stage 3
        release_whole_parameters(engine)
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
            own_loader(src=_state_dict(saved), dst=engine.module)
        engine.optimizer.refresh_fp32_params()
        engine.optimizer.checkpoint_event_epilogue()
    return path, client_state


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
