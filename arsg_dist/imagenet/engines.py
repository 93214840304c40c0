"""Chooses and builds the engine a run was launched for; the only place of the application that tells engines apart."""

from typing import Any, Literal

import torch
from torch import nn

from arsg_dist.engine import Communicator, Engine, Ranks, SingleProcessCommunicator, SingleProcessEngine
from arsg_dist.imagenet.config import TrainConfig
from arsg_dist.imagenet.optimization import build_optimizer

EngineName = Literal["deepspeed", "horovod", "single"]


def choose_engine(requested: str, deepspeed_config: str | None, ranks: Ranks) -> EngineName:
    """The engine to use.

    Args:
        requested: "auto", "deepspeed", "horovod" or "single". "auto" is DeepSpeed if there is a config for it, else a
            single process.
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
            "add --deepspeed_config FILE or --engine horovod"
        )
    if requested not in ("deepspeed", "horovod", "single"):
        raise ValueError(f"--engine {requested} is not known; use auto, deepspeed, horovod or single")
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
    if name == "horovod":
        from arsg_dist import horovod

        return horovod.connect(ranks)
    return SingleProcessCommunicator()


def deepspeed_settings(config: TrainConfig, path: str, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config at `path`, completed with what the recipe says.

    Raises:
        ValueError: they contradict each other, or the file cannot be read.
    """
    from arsg_dist.deepspeed import resolve_config

    return resolve_config(
        path,
        world_size=world_size,
        batch_size=config.batch_size,
        accumulation_steps=config.accumulation_steps,
        clip_grad_norm=config.clip_grad_norm,
        optimizer={"type": config.optimizer.type, "params": config.optimizer.params},
    )


def build_engine(
    name: EngineName,
    module: nn.Module,
    config: TrainConfig,
    communicator: Communicator,
    ranks: Ranks,
    deepspeed_config: dict[str, Any] | None,
) -> Engine:
    """The engine over `module`, on this rank's device."""
    if name == "deepspeed":
        from arsg_dist.deepspeed import DeepSpeedEngine

        assert deepspeed_config is not None
        return DeepSpeedEngine(module, deepspeed_config, communicator)
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
        module = module.cuda()
    optimizer = build_optimizer(config.optimizer, module.parameters())
    accumulation, clip = config.accumulation_steps, config.clip_grad_norm
    if name == "horovod":
        from arsg_dist.horovod import HorovodEngine

        return HorovodEngine(
            module, optimizer, communicator, accumulation_steps=accumulation, clip_grad_norm=clip
        )
    return SingleProcessEngine(module, optimizer, accumulation_steps=accumulation, clip_grad_norm=clip)
