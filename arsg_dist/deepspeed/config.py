"""Joins a DeepSpeed JSON config with what the training program decides, without either overruling the other."""

import json
from pathlib import Path
from typing import Any

AUTO = "auto"


def resolve_config(
    config: str | Path | dict[str, Any],
    *,
    world_size: int,
    batch_size: int,
    accumulation_steps: int,
    clip_grad_norm: float,
    optimizer: dict[str, Any],
) -> dict[str, Any]:
    """Fills what a DeepSpeed config leaves open and refuses what contradicts the program.

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
        path, source = Path(config), str(config)
        if not path.is_file():
            raise ValueError(f"DeepSpeed config {path} does not exist")
        try:
            config = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"DeepSpeed config {path} is not JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"DeepSpeed config {path} must hold a JSON object")
    resolved = dict(config)
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
    unknown = set(section) - {"type", "params", "legacy_fusion"}
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
