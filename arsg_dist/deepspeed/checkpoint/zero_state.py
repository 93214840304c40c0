"""Find what a DeepSpeed engine holds on this rank, at any stage and precision."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from arsg_dist.deepspeed.checkpoint.partitioning import Piece, pieces_of_each, pieces_of_range
from arsg_dist.deepspeed.config.rules import place_of
from arsg_dist.deepspeed.versions import flat_offsets, is_optimized_parameter, ranks_of_sub_group
from arsg_dist.optim import ARSG, RemoteObservation
from arsg_dist.optim.base_iterate import MOVEMENT
from arsg_dist.optim.state import MOMENTS, needs_step


@dataclass(frozen=True)
class Shard:
    """Hold a tensor that this rank updates, with its optimizer state.

    Attributes:
        master: in fp32, the optimizer's parameter; any shape under stage 0, else flat, with padding.
        copy: what the model computes with, the same elements in the model's dtype; may be `master` itself.
        group: settings of the optimizer's parameter group.
        pieces: which parameters' elements are in it.
        state: the optimizer's state for it; empty before the first step.
        process_group: the ranks that together hold the whole parameters.
    """

    master: Tensor
    copy: Tensor
    group: dict[str, Any]
    pieces: list[Piece]
    state: dict[str, Any]
    process_group: Any


def needed_state(group: dict[str, Any]) -> set[str]:
    """Name the state entries without which a parameter of the group cannot go on."""
    needed = set[str]()
    if group.get("remote_mu", 1.0) < 1:
        needed.add(MOVEMENT)
    if "preconditioner" not in group:  # an inner optimizer of torch, whose state torch itself asks for
        return needed
    needed |= set(MOMENTS[group["preconditioner"]])
    if needs_step(group):
        needed.add("step")
    if group["lookahead_k"] > 0:
        needed.add("slow_param")
    return needed


def optimizer_of(engine: Any) -> ARSG | RemoteObservation:
    """Return the ARSG or RemoteObservation inside a DeepSpeed engine.

    Raises:
        TypeError: not a DeepSpeed engine, or one with another optimizer.
    """
    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        raise TypeError(f"expected the engine that deepspeed.initialize returns, got {type(engine).__name__}")
    optimizer = getattr(engine, "basic_optimizer", None)
    if not isinstance(optimizer, ARSG | RemoteObservation):
        raise TypeError(
            f"the engine's optimizer is {type(optimizer).__name__}, neither ARSG nor RemoteObservation"
        )
    return optimizer


def experts_apart(engine: Any) -> bool:
    """Tell whether ranks hold different experts of a mixture."""
    if not engine.has_moe_layers:
        return False
    mixtures = [module for module in engine.module.modules() if isinstance(module, MoE)]
    return not mixtures or any(module.ep_size > 1 for module in mixtures)  # none: DeepSpeed's AutoEP


def swaps_to_nvme(engine: Any) -> bool:
    """Tell whether parameters or state live on NVMe, out of reach between steps."""
    return "nvme" in (place_of(engine.zero_offload_optimizer()), place_of(engine.zero_offload_param()))


def shards_of(engine: Any) -> Iterator[Shard]:
    """Yield this rank's shards, in the order of DeepSpeed's groups and sub-groups.

    Raises:
        ValueError: experts on several ranks, NVMe, or a wrapper that keeps its masters in a way not known here.
    """
    optimizer = engine.basic_optimizer
    if experts_apart(engine):
        raise ValueError(
            "experts that are spread over ranks (ep_size > 1) are not supported here: each rank has others of the same "
            "name"
        )
    if swaps_to_nvme(engine):
        raise ValueError(
            "parameters or optimizer state are offloaded to NVMe, where they cannot be read between steps: "
            "offload to the CPU instead"
        )
    wrapper, names = engine.optimizer, engine.param_names
    if isinstance(wrapper, FP16_Optimizer):
        raise ValueError(
            f"DeepSpeed's stage 0 keeps the fp32 masters of {type(optimizer).__name__} in a way that is not read here: "
            "use stage 1, or ARSG or RemoteObservation"
        )

    def shard(
        master: Tensor, copy: Tensor, group: dict[str, Any], pieces: list[Piece], process_group: Any
    ) -> Shard:
        return Shard(master, copy, group, pieces, optimizer.state.get(master, {}), process_group)

    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        for index, parameters in enumerate(wrapper.fp16_groups):
            process_group = ranks_of_sub_group(wrapper, index)
            pieces = pieces_of_each(
                ((names[p], p.ds_numel) for p in parameters),
                deepspeed.comm.get_rank(group=process_group),
                deepspeed.comm.get_world_size(group=process_group),
            )
            yield shard(
                wrapper.fp32_partitioned_groups_flat[index],
                wrapper.fp16_partitioned_groups_flat[index],
                optimizer.param_groups[wrapper.sub_group_to_group_id[index]],
                pieces,
                process_group,
            )
    elif isinstance(wrapper, DeepSpeedZeroOptimizer | BF16_Optimizer):
        for index, group in enumerate(optimizer.param_groups):
            process_group = wrapper.real_dp_process_group[index]
            rank = deepspeed.comm.get_rank(group=process_group)
            if isinstance(wrapper, BF16_Optimizer):
                parameters = wrapper.bf16_groups[index]
                numels = [p.numel() for p in parameters]
                offsets = [sum(numels[:i]) for i in range(len(numels))]
                master = wrapper.fp32_groups_flat_partition[index]
                copy = wrapper.bf16_partitioned_groups[index][rank]
            else:
                parameters = wrapper.round_robin_bit16_groups[index]
                offsets = flat_offsets(wrapper, index)
                master = wrapper.single_partition_of_fp32_groups[index]
                copy = wrapper.parallel_partitioned_bit16_groups[index][rank]
            listed = ((names[p], p.numel(), o) for p, o in zip(parameters, offsets, strict=True))
            yield shard(master, copy, group, pieces_of_range(listed, rank, master.numel()), process_group)
    else:
        copies = wrapper.fp16_groups if isinstance(wrapper, FP16_UnfusedOptimizer) else None
        for index, group in enumerate(optimizer.param_groups):
            for position, master in enumerate(group["params"]):
                copy = master if copies is None else copies[index][position]
                if is_optimized_parameter(copy):
                    yield shard(master, copy, group, [Piece(names[copy], 0, 0, copy.numel())], None)


def release_whole_parameters(engine: Any) -> None:
    """Release parameters that stage 3 holds whole, before shards' `copy` is written."""
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        engine.optimizer.checkpoint_event_prologue()


@torch.no_grad()
def publish_copies(engine: Any) -> None:
    """Gather what the ranks wrote into their shards' `copy`. Collective."""
    wrapper = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        for index in range(len(wrapper.fp16_groups)):
            wrapper._unflatten_partitioned_parameters(index)
        wrapper.checkpoint_event_epilogue()
    elif isinstance(wrapper, DeepSpeedZeroOptimizer | BF16_Optimizer):
        bf16 = isinstance(wrapper, BF16_Optimizer)
        all_gather_dp_groups(
            groups_flat=wrapper.bf16_groups_flat if bf16 else wrapper.bit16_groups_flat,
            partitioned_param_groups=wrapper.bf16_partitioned_groups
            if bf16
            else wrapper.parallel_partitioned_bit16_groups,
            dp_process_group=wrapper.real_dp_process_group,
            start_alignment_factor=wrapper.nccl_start_alignment_factor,
            allgather_bucket_size=wrapper.allgather_bucket_size,
        )


def group_names(engine: Any) -> list[list[str]]:
    """Name the trained parameters of each group, the same on every rank."""
    return [[name for _, name in group] for group in _grouped(engine)]


def trained_names(engine: Any) -> set[str]:
    """Name the trained parameters, the same on every rank."""
    return {name for names in group_names(engine) for name in names}


def group_positions(engine: Any) -> list[list[int]]:
    """Return where each of `group_names` is in its group.

    Stage 0 in fp32 leaves frozen parameters in the groups.
    """
    return [[position for position, _ in group] for group in _grouped(engine)]


def _grouped(engine: Any) -> list[list[tuple[int, str]]]:
    optimizer, wrapper, names = engine.basic_optimizer, engine.optimizer, engine.param_names
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        groups: list[list[Any]] = [[] for _ in optimizer.param_groups]
        for index, parameters in enumerate(wrapper.fp16_groups):
            groups[wrapper.sub_group_to_group_id[index]] += parameters
    elif isinstance(wrapper, BF16_Optimizer):
        groups = wrapper.bf16_groups
    elif isinstance(wrapper, DeepSpeedZeroOptimizer):
        groups = wrapper.bit16_groups
    elif isinstance(wrapper, FP16_UnfusedOptimizer):
        groups = wrapper.fp16_groups
    else:
        groups = [
            [p if is_optimized_parameter(p) else None for p in group["params"]]
            for group in optimizer.param_groups
        ]
    return [[(position, names[p]) for position, p in enumerate(group) if p is not None] for group in groups]


def shapes_of(engine: Any) -> dict[str, torch.Size]:
    """Map the name of every parameter of the model, partitioned or not, to its shape."""
    return {
        name: torch.Size(getattr(parameter, "ds_shape", parameter.shape))
        for parameter, name in engine.param_names.items()
    }
