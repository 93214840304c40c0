"""Build the engine `fsdp` for a training."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from arsg_dist.engine import (
    Capabilities,
    Communicator,
    LocalBuilder,
    TrainingSettings,
    connect_torch,
    require_backend,
)
from arsg_dist.engine.hosts import this_host
from arsg_dist.fsdp.engine import CAPABILITIES, FSDPEngine
from arsg_dist.fsdp.units import recompute_activations, refuse_batch_norm, replicas_of_shards, shard, units_of

_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


class FSDPBuilder(LocalBuilder):
    """Build an `FSDPEngine`: the network sharded block by block, forward passes under autocast."""

    connect = staticmethod(connect_torch)
    _channels_last = (
        False  # there are no shards of such parameters; images may be in that layout all the same
    )

    _engine = FSDPEngine
    options: ClassVar = {
        "activation_checkpointing": (True, False),
        "backend": ("auto", "gloo", "nccl"),
        "cpu_offload": (True, False),
        "param_dtype": tuple(_DTYPES),
        "reduce_dtype": tuple(_DTYPES),
        "reshard_after_forward": (True, False),
        "shard_group": ("job", "node"),
    }

    def __init__(self, settings: TrainingSettings, world_size: int) -> None:
        super().__init__(settings, world_size)
        chosen = settings.engine_options
        require_backend(chosen.get("backend", "auto"))
        self._keep_gathered = chosen.get("reshard_after_forward") is False
        self._sharding = _policies(chosen)
        # With replicas of shards it depends on the hosts whether there are any.
        self.capabilities = Capabilities() if chosen.get("shard_group") == "node" else CAPABILITIES
        for option in ("param_dtype", "reduce_dtype"):
            if chosen.get(option) == "bf16" and self.precision != "bf16":
                raise ValueError(
                    f"engine_options.{option}: bf16 contradicts precision: {settings.precision}: set precision: bf16, "
                    "or leave it out"
                )
        if chosen.get("cpu_offload") and self.precision == "fp16":
            raise ValueError(
                "engine_options.cpu_offload contradicts precision: fp16, whose loss scale is kept where the gradients "
                "are not: set precision: bf16, or leave it out"
            )

    @staticmethod
    def units(module: nn.Module) -> list[str]:
        """Name the blocks."""
        return [name for name, _ in units_of(module)]

    def numeric_settings(self) -> dict[str, Any]:
        """Return what the engine computes with: the dtypes of its policies too."""
        chosen = self._settings.engine_options
        return super().numeric_settings() | {
            f"engine_options.{option}": chosen.get(option, "fp32")
            for option in ("param_dtype", "reduce_dtype")
        }

    def check_network(self, module: nn.Module) -> None:
        """Refuse a network without blocks, which every rank would gather whole, and policies that do not fit it.

        Raises:
            ValueError: and says what to use instead.
        """
        if not units_of(module):
            raise ValueError(
                f"no blocks were found in {type(module).__name__} that the engine fsdp could gather one by one, and "
                "every rank would hold the whole: use the engine ddp (its engine_options.shard_update divides the "
                "optimizer's state)"
            )
        if self._settings.engine_options.get("param_dtype") == "bf16":
            refuse_batch_norm(module)

    @staticmethod
    def compile(module: nn.Module) -> None:
        """Have each block compiled by itself: between blocks parameters are gathered."""
        for _, unit in units_of(module):
            unit.compile()

    def _distribute(self, module: nn.Module, communicator: Communicator) -> None:
        chosen = self._settings.engine_options
        mesh = None
        with communicator.fail_together():
            if chosen.get("activation_checkpointing"):
                recompute_activations(module)
        if chosen.get("shard_group") == "node":
            of_ranks = communicator.all_gather_object(this_host())
            with communicator.fail_together():
                nodes, ranks = replicas_of_shards(of_ranks)
            device = next(module.parameters()).device.type
            mesh = init_device_mesh(device, (nodes, ranks), mesh_dim_names=("replica", "shard"))
        shard(module, mesh, reshard_after_forward=not self._keep_gathered, **self._sharding)

    def _engine_options(self) -> dict[str, Any]:
        return {"keep_gathered": self._keep_gathered, "sharding": self._sharding}


def _policies(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Make `fully_shard`'s policies from options."""
    policies: dict[str, Any] = {}
    kinds: dict[str, Any] = {
        option: _DTYPES[chosen[option]] for option in ("param_dtype", "reduce_dtype") if option in chosen
    }
    if any(kinds.values()):
        # Gradients are added up in float32 unless it is asked for otherwise.
        policies["mp_policy"] = MixedPrecisionPolicy(**{"reduce_dtype": torch.float32, **kinds})
    if chosen.get("cpu_offload"):
        policies["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    return policies
