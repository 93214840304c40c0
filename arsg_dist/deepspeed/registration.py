"""Register the optimizer types "ARSG" and "RemoteObservation" with DeepSpeed."""

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.constants import BFLOAT16
from deepspeed.runtime.engine import DeepSpeedEngine as _Engine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero import utils as zero_utils
from torch.optim import Optimizer

from arsg_dist.deepspeed.checkpoint.zero_state import experts_apart
from arsg_dist.deepspeed.config.resolve import check_config, is_ours
from arsg_dist.deepspeed.config.rules import AUTO, check_partitioned
from arsg_dist.deepspeed.config.schedules import check_scheduler, with_schedules_for_arsg
from arsg_dist.deepspeed.config.side_effects import check_swap_directory
from arsg_dist.deepspeed.offloaded_states import support_offloaded_states
from arsg_dist.deepspeed.patches.offload import patch_offload
from arsg_dist.deepspeed.patches.state_access import patch_state_access
from arsg_dist.deepspeed.patches.training_step import patch_training_step
from arsg_dist.deepspeed.patching import Method, check_known, is_repaired, wrap_once
from arsg_dist.deepspeed.update_checks import check_updates
from arsg_dist.deepspeed.versions import is_optimized_parameter, leaves_out_frozen
from arsg_dist.optim import ARSG, RemoteObservation
from arsg_dist.optim.by_name import NAMES, OURS, make_optimizer


def register() -> None:
    """Register `arsg_dist.ARSG` and `RemoteObservation` as types of optimizers in DeepSpeed configs.

    DeepSpeed has no registry: it looks a type it does not know itself up in `torch.optim`, and ZeRO accepts an
    optimizer by its exact class. Here DeepSpeed's look-up is wrapped, so that torch stays as it is. More of its methods
    are wrapped, and do what they did for other optimizers: its check of a config also calls `check_config`, and warns
    where DeepSpeed will clip the gradient unasked; schedules of the config; and the `patches`. Calling this again
    changes nothing.

    Raises:
        RuntimeError: this DeepSpeed is built differently.
    """
    for kind in OURS:
        if kind not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
            zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(kind)
    wrap_once(DeepSpeedConfig, "_initialize_params", _with_params_looked_at)
    wrap_once(_Engine, "_is_supported_optimizer", _with_arsg_known)
    wrap_once(_Engine, "_configure_basic_optimizer", _with_arsg_built)
    wrap_once(_Engine, "_do_sanity_check", _with_arsg_check)
    wrap_once(_Engine, "_do_optimizer_sanity_check", _with_built_arsg_check)
    wrap_once(_Engine, "_scheduler_from_config", with_schedules_for_arsg)
    wrap_once(_Engine, "_configure_fp16_optimizer", _with_fused_refused)
    patch_state_access()
    patch_training_step()
    patch_offload()
    check_updates()
    support_offloaded_states()


def factory_of(name: str, params: Any, source: str) -> "functools.partial[Any]":
    """Return what makes an optimizer of ours from parameters or groups, with a config's settings.

    Args:
        name: of `NAMES`.
        params: `optimizer.params` of a DeepSpeed config; None for the defaults.
        source: what messages call the config.

    Raises:
        ValueError: a value is still "auto", or `params` are no settings.
    """
    params = params or {}
    if params != AUTO and not isinstance(params, dict):
        raise ValueError(f"{source} has optimizer.params = {params!r}, which must be an object of settings")
    left = ["optimizer.params"] if params == AUTO else [key for key in params if params[key] == AUTO]
    if left:
        raise ValueError(
            f'{source} has "auto" for {", ".join(left)}, which nothing has filled in (Hugging Face fills lr, betas, '
            "eps and weight_decay, arsg-imagenet all of them): write a value, or leave it out for the optimizer's "
            "default"
        )
    if name == ARSG.__name__:
        return functools.partial(ARSG, **params)
    return functools.partial(make_optimizer, name, params, where=f"{source}'s optimizer")


def _with_params_looked_at(method: Method) -> Method:
    """Refuse optimizer.params in which DeepSpeed would look for keys, and fail."""

    def _initialize_params(config: Any, param_dict: dict[str, Any]) -> None:
        section = param_dict.get("optimizer") or {}
        if section.get("type") == AUTO:
            raise ValueError(
                'the DeepSpeed config has optimizer.type = "auto", which nothing has filled in (arsg-imagenet does, '
                'from its recipe): write "ARSG" and its params'
            )
        if section.get("type") in NAMES and not isinstance(section.get("params"), dict):
            factory_of(section["type"], section.get("params"), "the DeepSpeed config")
        method(config, param_dict)

    return _initialize_params


def _with_arsg_known(method: Method) -> Method:
    def _is_supported_optimizer(engine: Any, name: str) -> Any:
        return name in NAMES or method(engine, name)

    return _is_supported_optimizer


def _with_arsg_built(method: Method) -> Method:
    def _configure_basic_optimizer(engine: Any, model_parameters: Iterable[Any]) -> Any:
        name = engine.optimizer_name()
        if name not in NAMES:
            return method(engine, model_parameters)
        return factory_of(name, engine.optimizer_params(), "the DeepSpeed config")(model_parameters)

    return _configure_basic_optimizer


def _with_arsg_check(method: Method) -> Method:
    def check(engine: Any) -> None:
        client = engine.client_optimizer
        if isinstance(client, OURS) or makes_ours(client):
            _check(engine, from_config=False)
        elif not client and is_ours(engine.optimizer_name()):
            _check(engine, from_config=True)
        method(engine)

    return check


def _with_built_arsg_check(method: Method) -> Method:
    """Check what a callable has made, and drop groups without anything to train."""

    def check(engine: Any, basic_optimizer: Any) -> Any:
        client = engine.client_optimizer
        known = client is None or isinstance(client, OURS) or makes_ours(client)
        if isinstance(basic_optimizer, OURS) and not known:
            _check(engine, from_config=False)
        if isinstance(basic_optimizer, RemoteObservation):
            config: dict[str, Any] = engine._config._param_dict
            check_partitioned(type(basic_optimizer.optimizer), config, "the DeepSpeed config")
        wrapper = method(engine, basic_optimizer)
        if isinstance(basic_optimizer, OURS):
            _tell_what_will_not_work(engine, wrapper)
            if wrapper is not None:  # None: stage 0 in fp32
                _drop_frozen(basic_optimizer)
        return wrapper

    return check


def _tell_what_will_not_work(engine: Any, wrapper: Any) -> None:
    """Name before the training what a pipeline, or experts spread over ranks, cannot do after it.

    Args:
        engine: that is being built.
        wrapper: the kind of masters that DeepSpeed chose.
    """
    pipeline = isinstance(engine, PipelineEngine)
    if pipeline and wrapper == BFLOAT16 and not engine.zero_optimization():
        raise ValueError(
            "DeepSpeed cannot resume a pipeline in bf16 at ZeRO stage 0: its checkpoints have one rank's part of "
            'the optimizer\'s state, and loading them raises KeyError; set "zero_optimization": {"stage": 1}'
        )
    if not (pipeline or experts_apart(engine)) or deepspeed.comm.get_rank() != 0:
        return
    warnings.warn(
        f"{'a pipeline' if pipeline else 'a mixture of experts spread over ranks (ep_size > 1)'} resumes by "
        "load_checkpoint under the stage, precision and number of ranks that saved it, and its weights alone load on "
        "any number; arsg_dist.deepspeed.export and base_iterate, universal checkpoints and those of arsg-imagenet do "
        "not work with it",
        stacklevel=2,
    )


def _with_fused_refused(method: Method) -> Method:
    """Refuse what `repair` was asked to repair and cannot."""

    def _configure_fp16_optimizer(engine: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        wrapper = method(engine, optimizer, *args, **kwargs)
        if is_repaired(optimizer) and isinstance(wrapper, FP16_Optimizer):
            raise ValueError(
                f"arsg_dist.deepspeed.repair does not know the wrapper that DeepSpeed puts around "
                f"{type(optimizer).__name__} at stage 0 in half precision: use stage 1, or torch.optim.AdamW"
            )
        return wrapper

    return _configure_fp16_optimizer


def _drop_frozen(optimizer: Optimizer) -> None:
    """Drop groups whose parameters are all frozen, as DeepSpeed drops empty ones, and frozen parameters of others.

    Stages 1 and 2 fail on such groups with an IndexError. They are dropped at every stage and precision where DeepSpeed
    makes masters, so that an engine has the same groups in all of these, and schedules go from one to another.
    """
    groups = optimizer.param_groups
    trained = [group for group in groups if any(map(is_optimized_parameter, group["params"]))]
    if not trained:
        raise ValueError("every parameter of the optimizer is frozen: give it some with requires_grad=True")
    groups[:] = trained
    if not leaves_out_frozen():
        for group in trained:
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]


def makes_ours(client: Any) -> bool:
    """Tell whether a callable shows, without being called, that it makes an optimizer of ours."""
    if not isinstance(client, functools.partial):
        return client is ARSG
    return client.func is ARSG or (client.func is make_optimizer and client.args[0] in NAMES)


def _check(engine: Any, *, from_config: bool) -> None:
    check_known()
    config: dict[str, Any] = dict(engine._config._param_dict)
    for own in OURS if from_config else ():
        name = own.__name__
        if getattr(torch.optim, name, own) is not own and engine.optimizer_name() == name:
            raise ValueError(
                f'torch.optim.{name} is {getattr(torch.optim, name)!r}: "type": "{name}" could mean that one or '
                "arsg_dist's; remove it, or pass optimizer=... to deepspeed.initialize"
            )
    if not from_config:
        config.pop("optimizer", None)  # DeepSpeed takes no notice of it then
    if engine.client_lr_scheduler:
        config.pop("scheduler", None)
    check_scheduler(config.get("scheduler"), "the DeepSpeed config")
    check_config(config)
    check_swap_directory(config.get("zero_optimization") or {})
    if "gradient_clipping" not in config and deepspeed.comm.get_rank() == 0:
        warnings.warn(
            "the DeepSpeed config has no 'gradient_clipping', and DeepSpeed then clips the gradient at norm 1.0: "
            'write "gradient_clipping": 0.0 to train as without DeepSpeed, or the norm you want',
            stacklevel=2,
        )
