"""Build the engine `fsdp` for a training."""

from typing import ClassVar

from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from arsg_dist.engine import Communicator, LocalBuilder, connect_torch
from arsg_dist.engine.hosts import this_host
from arsg_dist.fsdp.engine import CAPABILITIES, FSDPEngine
from arsg_dist.fsdp.units import recompute_activations, replicas_of_shards, shard, units_of


class FSDPBuilder(LocalBuilder):
    """Build an `FSDPEngine`: the network sharded block by block, forward passes under autocast."""

    capabilities = CAPABILITIES
    connect = staticmethod(connect_torch)
    _channels_last = (
        False  # there are no shards of such parameters; images may be in that layout all the same
    )

    _engine = FSDPEngine
    options: ClassVar = {
        "activation_checkpointing": (True, False),
        "reshard_after_forward": (True, False),
        "shard_group": ("job", "node"),
    }

    @staticmethod
    def units(module: nn.Module) -> list[str]:
        """Name the blocks."""
        return [name for name, _ in units_of(module)]

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
        shard(module, mesh, reshard_after_forward=chosen.get("reshard_after_forward", True))
