"""Join a DeepSpeed config with a program's settings; neither overrules the other."""

import inspect
from pathlib import Path
from typing import Any, Final

from arsg_dist.deepspeed.config.rules import (
    AUTO,
    check_masters,
    check_nvme,
    check_partitioned,
    check_sections,
    require_object,
)
from arsg_dist.deepspeed.config.schedules import check_scheduler
from arsg_dist.deepspeed.config.side_effects import (
    check_imported,
    check_names,
    check_overwritten,
    check_swap_directory,
)
from arsg_dist.optim import ARSG, RemoteObservation
from arsg_dist.optim.by_name import INNER, NAMES, class_of, settings_of
from arsg_dist.safe_io.documents import read_json

_ADAM_ONLY: Final = {
    "max_grad_norm": "DeepSpeed refuses it for every optimizer: set 'gradient_clipping' at the top of the config",
    "adam_w_mode": "choose with decoupled_weight_decay",
    "torch_adam": "ARSG has one implementation per path: choose with foreach and fused",
    "amsgrad": "choose with preconditioner",
    "fp32_optimizer_states": "choose with state_dtype",
    **dict.fromkeys(
        ("freeze_step", "var_freeze_step", "comm_backend_name", "cuda_aware", "local_step_scaler"),
        "it belongs to DeepSpeed's 1-bit optimizers, which send a compressed momentum and keep v as it is after some "
        "steps, where ARSG's v̂ goes on growing",
    ),
}
"""Settings of DeepSpeed's Adam and its 1-bit forms that a config changed from them to ARSG may still have."""


def check_config(config: dict[str, Any], source: str = "the DeepSpeed config") -> None:
    """Refuse what DeepSpeed 0.19.8 cannot do with ARSG or RemoteObservation, or would silently leave out.

    Args:
        config: content of a DeepSpeed config, complete or not.
        source: what messages call it.

    Raises:
        ValueError: with the setting and the reason.
    """
    sections = ("optimizer", "scheduler", "zero_optimization", "fp16", "bf16", "bfloat16", "torch_autocast")
    for key in (*sections, "data_types", "aio"):
        require_object(config, key, source)
    section = config.get("optimizer") or {}
    if section.get("params") != AUTO:
        require_object(section, "params", f"{source}'s optimizer")
    require_object(config.get("scheduler") or {}, "params", f"{source}'s scheduler")
    name = section.get("type")
    check_sections(config, source)
    check_names(config, source)
    if is_ours(name):
        _check_optimizer(section, config, source)
        check_scheduler(config.get("scheduler"), source)
        zero, params = config.get("zero_optimization"), section.get("params") or {}
        if isinstance(params, dict):
            check_masters([params], source)
        if isinstance(zero, dict) and isinstance(params, dict):
            check_nvme(zero, [params], source)


def is_ours(name: Any) -> bool:
    """Tell whether the type in an optimizer section means one of ours, however it is spelled."""
    return str(name).lower() in {own.lower() for own in NAMES}


def _check_optimizer(section: dict[str, Any], config: dict[str, Any], source: str) -> None:
    name = section["type"]
    if name not in NAMES:
        meant = next(own for own in NAMES if own.lower() == name.lower())
        raise ValueError(
            f"{source} has optimizer.type = {name!r}: write {meant!r} (DeepSpeed minds the case)"
        )
    if section.get("legacy_fusion"):
        raise ValueError(
            f"{source} sets optimizer.legacy_fusion, which does not work with {name}: DeepSpeed has it for FusedAdam "
            "only"
        )
    params = section.get("params") or {}
    if name == RemoteObservation.__name__:
        if isinstance(params, dict) and params.get(INNER, AUTO) != AUTO:
            settings_of(name, params, where=f"{source}'s optimizer")
            inner = class_of(params[INNER], where=f"{source}'s optimizer.params.{INNER}")
            check_partitioned(inner, config, source)
        return
    for key in params if isinstance(params, dict) else ():
        if key in _ADAM_ONLY:
            raise ValueError(
                f"{source} sets optimizer.params.{key}, which ARSG does not have: {_ADAM_ONLY[key]}"
            )
        if key not in _SETTINGS:
            raise ValueError(
                f"{source} sets optimizer.params.{key}, which ARSG does not have; it has {sorted(_SETTINGS)}"
            )


_SETTINGS: Final = frozenset(inspect.signature(ARSG).parameters) - {"params"}


def read_config(path: Path) -> dict[str, Any]:
    """Read the file of a DeepSpeed config.

    Raises:
        ValueError: it is missing, no regular file, or no JSON object.
    """
    try:
        config = read_json(path, follow=True)
    except FileNotFoundError:
        raise ValueError(f"DeepSpeed config {path} does not exist") from None
    except OSError as error:
        raise ValueError(f"DeepSpeed config {path} cannot be read: {error.strerror}") from error
    if not isinstance(config, dict):
        raise ValueError(f"DeepSpeed config {path} must hold a JSON object")
    return config


def resolve_config(
    config: str | Path | dict[str, Any],
    *,
    world_size: int,
    batch_size: int,
    accumulation_steps: int,
    clip_grad_norm: float,
    optimizer: dict[str, Any],
) -> dict[str, Any]:
    """Fill what a DeepSpeed config leaves open; refuse what contradicts the program.

    As with Hugging Face's Trainer, a key that is absent or ``"auto"`` takes the program's value; a key with another
    value is an error, for neither side may be silently ignored.

    Args:
        config: path of a JSON file, or its content.
        world_size: number of ranks.
        batch_size: samples per weight update over all ranks.
        accumulation_steps: micro-batches per weight update and rank.
        clip_grad_norm: largest norm of the gradient, 0 for no clipping. DeepSpeed 0.19 clips at 1.0 where its config
            says nothing; here silence means the program's value.
        optimizer: ``{"type": ..., "params": {...}}``.

    Returns:
        A new, complete config for `deepspeed.initialize`.

    Raises:
        ValueError: unreadable config, or a value that contradicts the program's.
    """
    source = "the DeepSpeed config"
    if not isinstance(config, dict):
        source, config = str(config), read_config(Path(config))
    resolved = dict(config)
    check_config(resolved, source)
    if "scheduler" in resolved:
        raise ValueError(
            f"{source} has a 'scheduler'; the learning rate follows the recipe's 'schedule': remove one"
        )
    program: dict[str, Any] = {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // (world_size * accumulation_steps),
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": clip_grad_norm,
    }
    _fill(resolved, program, source, prefix="")
    section = dict(resolved.get("optimizer") or {})
    unknown = {key for key, value in section.items() if value or key != "legacy_fusion"} - {"type", "params"}
    if unknown:
        raise ValueError(
            f"{source} has unknown optimizer keys {sorted(unknown)}; DeepSpeed knows type and params"
        )
    _fill(section, {"type": optimizer["type"]}, source, prefix="optimizer.")
    given = section.get("params") or {}
    params = {} if given == AUTO else dict(given)
    defaulted = [key for key, value in params.items() if value == AUTO and key not in optimizer["params"]]
    for key in defaulted:  # "auto" and the program says nothing: the optimizer's own default
        del params[key]
    extra = set(params) - set(optimizer["params"])
    if extra:
        raise ValueError(
            f"{source} sets optimizer.params {sorted(extra)}, which the recipe leaves at their defaults: "
            "set them in the recipe, or 'auto' in the DeepSpeed config"
        )
    _fill(params, optimizer["params"], source, prefix="optimizer.params.")
    section["params"] = params
    resolved["optimizer"] = section
    check_config(resolved, source)  # again: now the optimizer has a name
    check_overwritten(resolved, source)
    check_imported(resolved, source)
    check_swap_directory(resolved.get("zero_optimization") or {})
    return resolved


def _fill(section: dict[str, Any], program: dict[str, Any], source: str, *, prefix: str) -> None:
    for key, value in program.items():
        given = section.get(key, AUTO)
        same = (
            list(given) == list(value)
            if isinstance(given, list) and isinstance(value, list | tuple)
            else given == value
        )
        if given != AUTO and not same:
            raise ValueError(
                f"{source} has {prefix}{key} = {given!r} but this run uses {value!r}: "
                f'make them equal, or write "auto" in the DeepSpeed config'
            )
        section[key] = list(value) if isinstance(value, tuple) else value
