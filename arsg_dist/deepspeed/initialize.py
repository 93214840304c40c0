"""Call `deepspeed.initialize` with ARSG or RemoteObservation as an object instead of by its name."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from torch.optim import Optimizer

from arsg_dist.deepspeed.config.resolve import check_config
from arsg_dist.deepspeed.registration import factory_of, makes_ours
from arsg_dist.deepspeed.versions import load_config
from arsg_dist.optim.by_name import NAMES, OURS


def initialize(
    args: Any = None,
    model: Any = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: str | Path | dict[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | Path | dict[str, Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Call `deepspeed.initialize` for ARSG or RemoteObservation, without its look-up of the type.

    Builds the optimizer that the config's optimizer section describes, or takes the one you pass, and hands it to
    DeepSpeed. Same arguments and results as `deepspeed.initialize` (see there), except:

    Args:
        args: may have `deepspeed_config`, the path of the config.
        model: a module.
        optimizer: an ARSG or RemoteObservation, or a callable that takes parameters or groups and returns one. Default:
            from the config.
        model_parameters: parameters, or groups of them with settings of their own (lr, betas, mu, ...).
        training_data: see DeepSpeed.
        lr_scheduler: see DeepSpeed; a callable gets the optimizer.
        distributed_port: see DeepSpeed.
        mpu: see DeepSpeed.
        dist_init_required: see DeepSpeed.
        collate_fn: see DeepSpeed.
        config: path or content; not changed. CPU offload does not need `zero_force_ds_cpu_optimizer`.
        mesh_param: see DeepSpeed.
        config_params: DeepSpeed's older name of `config`.

    Returns:
        engine, optimizer (as DeepSpeed wrapped it), data loader or None, scheduler or None.

    Raises:
        TypeError: the optimizer is none of these, nor makes one.
        ValueError: no config; none of these in it although no optimizer is passed; both; or what `check_config`
            refuses.
    """
    named = getattr(args, "deepspeed_config", None)
    given = [value for value in (config, config_params, named) if value is not None]
    if len(given) != 1:
        raise ValueError("give exactly one DeepSpeed config: config=... or args.deepspeed_config")
    content = given[0]
    if not isinstance(content, dict):
        content = load_config(str(content))
    content = copy.deepcopy(content)
    check_config(content)
    section = content.pop("optimizer", None)
    if optimizer is not None and section is not None:
        raise ValueError(
            "there is an optimizer in the DeepSpeed config and another one as an argument: remove one"
        )
    if optimizer is None:
        if not section or section.get("type") not in NAMES:
            raise ValueError(
                f"the DeepSpeed config has optimizer {section!r}: arsg_dist.deepspeed.initialize needs "
                '{"type": "ARSG", ...}, {"type": "RemoteObservation", ...} or optimizer=...; for other optimizers use '
                "deepspeed.initialize"
            )
        optimizer = factory_of(section["type"], section.get("params"), "the DeepSpeed config")
    optimizer = _only_ours(optimizer)
    if named is not None:
        args.deepspeed_config = None  # DeepSpeed wants to be told once only
    try:
        result: tuple[Any, Any, Any, Any] = deepspeed.initialize(
            args=args,
            model=model,
            optimizer=optimizer,
            model_parameters=model_parameters,
            training_data=training_data,
            lr_scheduler=lr_scheduler,
            distributed_port=distributed_port,
            mpu=mpu,
            dist_init_required=dist_init_required,
            collate_fn=collate_fn,
            config=content,
            mesh_param=mesh_param,
        )
    finally:
        if named is not None:
            args.deepspeed_config = named
    return result


def _only_ours(optimizer: Any) -> Any:
    """Return the optimizer; wrap a callable to refuse what is not ours."""
    if isinstance(optimizer, OURS) or makes_ours(optimizer):
        return optimizer
    if isinstance(optimizer, type | Optimizer) or not callable(optimizer):
        raise _not_ours(optimizer)

    def make(parameters: Any) -> Optimizer:
        made = optimizer(parameters)
        if not isinstance(made, OURS):
            raise _not_ours(made)
        return made

    return make


def _not_ours(optimizer: Any) -> TypeError:
    name = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
    return TypeError(
        f"arsg_dist.deepspeed.initialize takes an ARSG or RemoteObservation, or a callable that makes one, not {name}: "
        "for other optimizers use deepspeed.initialize"
    )
