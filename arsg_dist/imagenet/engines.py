"""Chooses and builds the engine a run was launched for; the only place of the application that tells engines apart."""

import warnings
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from arsg_dist.engine import Communicator, Engine, Ranks, SingleProcessCommunicator, SingleProcessEngine
from arsg_dist.imagenet.config import TrainConfig
from arsg_dist.imagenet.optimization import build_optimizer, parameter_groups

EngineName = Literal["deepspeed", "horovod", "horovod-sharded", "single"]


def choose_engine(requested: str, deepspeed_config: str | None, ranks: Ranks) -> EngineName:
    """The engine to use.

    Args:
        requested: "auto", "deepspeed", "horovod", "horovod-sharded" or "single". "auto" is DeepSpeed if there is a
            config for it, else a single process.
        deepspeed_config: path, or None.
        ranks: of this process.

    Raises:
        ValueError: the request does not fit the config or the number of ranks.
    """
    if requested == "auto":
        requested = "deepspeed" if deepspeed_config else "single"
    if requested == "deepspeed" and not deepspeed_config:
        raise ValueError(
            "--engine deepspeed needs --deepspeed_config FILE, for example configs/deepspeed/zero1.json"
        )
    if requested != "deepspeed" and deepspeed_config:
        raise ValueError(
            f"--deepspeed_config has no meaning with --engine {requested}; leave one of them out"
        )
    if requested == "single" and ranks.world_size > 1:
        raise ValueError(
            f"{ranks.launcher} started {ranks.world_size} ranks but no engine was chosen that lets them work together: "
            "add --deepspeed_config FILE, --engine horovod or --engine horovod-sharded"
        )
    if requested not in get_args(EngineName):
        raise ValueError(f"--engine {requested} is not known; use auto, {', '.join(get_args(EngineName))}")
    return requested  # type: ignore[return-value]


def connect(name: EngineName, ranks: Ranks) -> Communicator:
    """Joins this process to the job.

    Raises:
        ImportError: the engine is not installed; the message says how to install it.
        ValueError: the job came up with another number of ranks than the launcher announced.
    """
    if name == "deepspeed":
        from arsg_dist import deepspeed

        return deepspeed.connect(ranks)
    if name in ("horovod", "horovod-sharded"):
        from arsg_dist import horovod

        return horovod.connect(ranks)
    return SingleProcessCommunicator()


def deepspeed_settings(config: TrainConfig, path: str, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config at `path`, completed with what the recipe says.

    Raises:
        ValueError: they contradict each other, or the file cannot be read.
    """
    from arsg_dist.deepspeed import resolve_config

    resolved = resolve_config(
        path,
        world_size=world_size,
        batch_size=config.batch_size,
        accumulation_steps=config.accumulation_steps,
        clip_grad_norm=config.clip_grad_norm,
        optimizer={"type": config.optimizer.type, "params": config.optimizer.params},
    )
    _settle_precision(resolved, config.precision, path)
    zero = resolved.get("zero_optimization") or {}
    kind, half = config.optimizer.type, _precision_on(resolved)
    if not zero.get("stage", 0) and kind != "ARSG" and half:
        raise ValueError(
            f"optimizer.type {kind} does not work with ZeRO stage 0 in {half}, where "
            "DeepSpeed makes an update before the first batch: use stage 1, 2 or 3, or fp32"
        )
    if zero.get("stage", 0) == 3:
        for wanted, name in (
            (config.ema_decay > 0, "ema_decay"),
            (config.compile, "compile"),
            (config.check_replicas_every > 0, "check_replicas_every"),
        ):
            if wanted:
                raise ValueError(
                    f"{name} does not work with ZeRO stage 3, under which no rank holds the whole weights: "
                    "use a DeepSpeed config with stage 0, 1 or 2"
                )
    return resolved


def _settle_precision(resolved: dict[str, Any], precision: str, path: str) -> None:
    """Writes the recipe's precision into a DeepSpeed config that leaves it open.

    Raises:
        ValueError: the two contradict each other.
    """
    on = _precision_on(resolved)
    given = on.replace("bfloat16", "bf16") if on else None
    if precision == "auto":
        return
    if given is None:
        if precision != "fp32":
            resolved[precision] = {**(resolved.get(precision) or {}), "enabled": True}
    elif given != precision:
        raise ValueError(
            f"{path} has {on} enabled but this run has precision: {precision}: "
            "make them equal, or write precision: auto in the recipe"
        )


def _precision_on(resolved: dict[str, Any]) -> str | None:
    """The section of a DeepSpeed config that turns fp32 off."""
    for name in ("bf16", "bfloat16", "fp16", "torch_autocast"):
        if (resolved.get(name) or {}).get("enabled", False) is True:
            return name
    return None


def precision_of(config: TrainConfig, name: EngineName) -> str:
    """The precision of autocast: "fp32" for none, and under DeepSpeed, which casts the network itself."""
    return "fp32" if name == "deepspeed" or config.precision == "auto" else config.precision


def autocast(config: TrainConfig, name: EngineName, device: torch.device) -> AbstractContextManager[None]:
    """A context for forward passes, to be entered any number of times."""
    precision = precision_of(config, name)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def build_engine(
    name: EngineName,
    module: nn.Module,
    config: TrainConfig,
    communicator: Communicator,
    ranks: Ranks,
    deepspeed_config: dict[str, Any] | None,
) -> Engine:
    """The engine over `module`, on this rank's device."""
    # Convolutions of one size are worth trying out; sizes that change would be tried out again and again.
    torch.backends.cudnn.benchmark = not config.data.progressive.start_size
    if config.compile:
        module.compile()
    skip_nonfinite = config.on_nonfinite == "skip"
    if name == "deepspeed":
        from arsg_dist.deepspeed import DeepSpeedEngine
        from arsg_dist.deepspeed.side_effects import side_effects

        assert deepspeed_config is not None
        for effect in side_effects(deepspeed_config) if communicator.rank == 0 else ():
            warnings.warn(f"besides training, the DeepSpeed config has an effect: {effect}", stacklevel=2)
        return DeepSpeedEngine(
            module,
            deepspeed_config,
            communicator,
            parameter_groups=parameter_groups(module, config.optimizer),
            # ARSG is left to its name in the config, as in any script with DeepSpeed.
            optimizer=None if config.optimizer.type == "ARSG" else partial(build_optimizer, config.optimizer),
            skip_nonfinite=skip_nonfinite,
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
        module = module.cuda()
    if config.channels_last and name != "horovod":  # its gradients of such parameters would have to be copied
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(config.optimizer, parameter_groups(module, config.optimizer))
    options: dict[str, Any] = {
        "accumulation_steps": config.accumulation_steps,
        "clip_grad_norm": config.clip_grad_norm,
        "loss_scaling": precision_of(config, name) == "fp16",
        "skip_nonfinite": skip_nonfinite,
    }
    if name == "horovod":
        from arsg_dist.horovod import HorovodEngine

        return HorovodEngine(module, optimizer, communicator, **options)
    if name == "horovod-sharded":
        from arsg_dist.horovod import HorovodShardedEngine

        return HorovodShardedEngine(module, optimizer, communicator, **options)
    return SingleProcessEngine(module, optimizer, **options)
