"""Choose and build the engine a run was launched for."""

import os
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn

from arsg_dist.engine import (
    ENGINES,
    Capabilities,
    Communicator,
    Engine,
    EngineBuilder,
    Ranks,
    TrainingSettings,
    load_builder,
)
from arsg_dist.imagenet.config import TrainConfig
from arsg_dist.imagenet.training.optimization import build_optimizer, parameter_groups


def choose_engine(requested: str, deepspeed_config: str | None, ranks: Ranks) -> str:
    """Choose the engine to use.

    Args:
        requested: "auto" or a name of `ENGINES`. "auto" is the engine whose config file is given, else a single
            process.
        deepspeed_config: path, or None.
        ranks: of this process.

    Returns:
        A name of `ENGINES`.

    Raises:
        ValueError: the request does not fit the config or the number of ranks.
    """
    configured = [entry.name for entry in ENGINES.values() if entry.config_file]
    alone = [entry.name for entry in ENGINES.values() if not entry.rendezvous]
    if requested == "auto":
        requested = configured[0] if deepspeed_config else alone[0]
    if requested in configured and not deepspeed_config:
        raise ValueError(
            f"--engine {requested} needs --deepspeed_config FILE, for example {ENGINES[requested].config_file}"
        )
    if requested not in configured and deepspeed_config:
        raise ValueError(
            f"--deepspeed_config has no meaning with --engine {requested}; leave one of them out"
        )
    if requested in alone and ranks.world_size > 1:
        *some, last = [
            "--deepspeed_config FILE" if entry.config_file else f"--engine {entry.name}"
            for entry in ENGINES.values()
            if entry.rendezvous
        ]
        raise ValueError(
            f"{ranks.launcher} started {ranks.world_size} ranks but no engine was chosen that lets them work together: "
            f"add {', '.join(some)} or {last}"
        )
    if requested not in ENGINES:
        raise ValueError(f"--engine {requested} is not known; use auto, {', '.join(ENGINES)}")
    return requested


def prepare(name: str, config: TrainConfig, config_file: str | None, world_size: int) -> EngineBuilder:
    """Check a run against its engine.

    Args:
        name: of `ENGINES`.
        config: of the run.
        config_file: path of the engine's own config, for an engine that has one.
        world_size: ranks of the job.

    Returns:
        What builds the engine.

    Raises:
        ImportError: the engine is not installed; the message says how to install it.
        ValueError: the engine cannot do what the run asks for, or its config file says something else.
    """
    kind = load_builder(name)
    kind.check_options(name, config.engine_options)
    builder = kind(_settings(config, config_file), world_size)
    _require(config, builder.capabilities)
    return builder


def _require(config: TrainConfig, capabilities: Capabilities) -> None:
    """Raise ValueError where a run asks for what an engine cannot do."""
    for wanted, setting, refused in (
        (config.ema_decay > 0, "ema_decay", capabilities.no_twin),
        (config.compile, "compile", capabilities.no_twin),
        (config.check_replicas_every > 0, "check_replicas_every", capabilities.no_replicas),
    ):
        if wanted and refused:
            raise ValueError(f"{setting} does not work with {refused}")


def _settings(config: TrainConfig, config_file: str | None) -> TrainingSettings:
    return TrainingSettings(
        batch_size=config.batch_size,
        accumulation_steps=config.accumulation_steps,
        clip_grad_norm=config.clip_grad_norm,
        precision=config.precision,
        skip_nonfinite=config.on_nonfinite == "skip",
        channels_last=config.channels_last,
        optimizer_type=config.optimizer.type,
        optimizer_params=config.optimizer.params,
        parameter_groups=partial(parameter_groups, config=config.optimizer),
        build_optimizer=partial(build_optimizer, config.optimizer),
        config_file=config_file,
        engine_options=config.engine_options,
    )


def build_engine(
    builder: EngineBuilder, module: nn.Module, config: TrainConfig, communicator: Communicator, ranks: Ranks
) -> Engine:
    """Put a network under its engine, on this rank's device. Collective.

    Raises:
        JobError: on every rank: what the run asks for is not to be had on these hosts.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS reads at its first use
        torch.use_deterministic_algorithms(True)
    # Convolutions of one size are worth trying out; sizes that change would be tried out again and again.
    torch.backends.cudnn.benchmark = not (config.deterministic or config.data.progressive.start_size)
    if config.compile:
        builder.compile(module)
    engine = builder.build(module, communicator, ranks)
    with communicator.fail_together():
        _require(config, engine.capabilities)  # which the hosts may have decided
    return engine


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Make a context for forward passes, to be entered any number of times.

    Args:
        precision: of an `EngineBuilder`.
        device: of the forward passes.
    """
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")
