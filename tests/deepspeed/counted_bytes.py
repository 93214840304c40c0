"""Counts what ranks really hold and send under each ZeRO stage, to compare with what `explain` says."""

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.comm import comm
from torch import Tensor, nn

from tests.deepspeed.nvme import NVME
from tests.support import toy

ACCUMULATION = 2
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "bf16, gradients in fp32": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "float32"}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 64.0}},
    "fp16, gradients in fp32": {
        "fp16": {"enabled": True, "loss_scale": 64.0},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
}
CPU = {"offload_optimizer": {"device": "cpu"}}
OFFLOADS: dict[str, dict[str, Any]] = {
    "": {},
    ", offloaded": CPU,
    ", offloaded with parameters": {**CPU, "offload_param": {"device": "cpu"}},
    ", on nvme": {"offload_optimizer": {"device": "nvme", "buffer_count": 5}, "sub_group_size": 300_000},
}
BUCKET = 20000  # elements
# Of messages with fewer bytes (norms, flags, small parameters that stage 3 keeps) nothing is said.
SMALLEST_MESSAGE = 1000


def build_model(name: str) -> nn.Module:
    """Of odd sizes, so that every stage pads; on NVMe with one layer large enough to be swapped, and others not."""
    torch.manual_seed(0)
    hidden = (1701, 607) if "nvme" in name else (101, 67)
    layers = [nn.Linear(17, hidden[0]), nn.Tanh(), nn.Linear(*hidden), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(hidden[1], 5, bias=False))


def cases(directory: Path = Path()) -> dict[str, dict[str, Any]]:
    """Configs by name; what goes to NVMe goes into the directory."""
    found = {}
    for stage, (precision, settings), (where, offload) in (
        (stage, precision, offload)
        for stage in range(4)
        for precision in PRECISIONS.items()
        for offload in OFFLOADS.items()
    ):
        if stage == 0 and (offload or "in fp32" in precision):
            continue
        if ("offload_param" in offload or "nvme" in where) and (stage, precision) != (3, "bf16"):
            continue
        zero = {
            "stage": stage,
            "reduce_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": 200,
            **offload,
        }
        if "nvme" in where:
            zero["offload_optimizer"] = {**zero["offload_optimizer"], "nvme_path": str(directory / "bytes")}
        found[f"zero{stage}, {precision}{where}"] = {
            "train_batch_size": toy.BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "ARSG", "params": toy.HYPERPARAMETERS},
            "zero_optimization": zero,
            "steps_per_print": 10**6,
            "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False},
            **settings,
        }
    return found


def count_cases(directory: Path) -> dict[str, Any]:
    """Of every rank."""
    counted: dict[str, Any] = {}
    for name, config in cases(directory).items():
        if "nvme" in name and not NVME:
            continue
        gathered: list[Any] = [None] * deepspeed.comm.get_world_size()
        gc.collect()
        gc.freeze()  # `bytes_alive` sees no tensors from before
        mine = count(name, config)
        torch.distributed.all_gather_object(gathered, mine)
        counted[name] = gathered
    return counted


def count(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Bytes this rank holds in the second update, by kind and altogether, and its messages."""
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    model = build_model(name)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    dtype = next(model.parameters()).dtype
    stage, size = config["zero_optimization"]["stage"], toy.BATCH // world_size // ACCUMULATION
    alive: list[tuple[int, int]] = []
    engine.basic_optimizer.register_step_pre_hook(lambda *_: alive.append(bytes_alive()))
    for update in range(2):
        comm.comms_logger.comms_dict.clear()
        alive.clear()
        for step in range(ACCUMULATION):
            start = (step * world_size + rank) * size
            inputs, targets = (values[start : start + size] for values in toy.batch(update))
            engine.backward(toy.loss_of(engine(inputs.to(dtype)), targets))
            del inputs, targets
            alive.append(bytes_alive())
            engine.step()
    messages = {
        operation: sum(size * found[0] for size, found in by_size.items() if size >= SMALLEST_MESSAGE)
        for operation, by_size in comm.comms_logger.comms_dict.items()
    }
    basic = engine.basic_optimizer
    own = [parameter for group in basic.param_groups for parameter in group["params"]]
    if stage == 0 and dtype == torch.float32:
        own = []  # the optimizer has the model's own parameters
    parameters = [p.ds_tensor if stage == 3 else p for p in model.parameters()]
    kept = sum(p.numel() for p in model.parameters() if stage == 3 and p.ds_persist)
    result = {
        "parameters": bytes_of(parameters),
        "small parameters": kept * dtype.itemsize,
        "fp32 masters": bytes_of(masters(engine, own)),
        "alive without buckets": max(total for total, _ in alive),
        "gradient buckets": max(buckets for _, buckets in alive),
        "sent": messages,
        **offload_buffers(engine.optimizer),
    }
    for name, key in (("m", "exp_avg"), ("v", "exp_avg_sq"), ("v̂", "max_exp_avg_sq")):
        result[name] = bytes_of(state[key] for state in basic.state.values())
    engine.destroy()
    return result


def offload_buffers(wrapper: Any) -> dict[str, int]:
    """Bytes of what DeepSpeed keeps besides the optimizer's state where it is offloaded, by kind."""
    fp32_gradients, accumulated, temporary = [], [], []
    if getattr(wrapper, "cpu_offload", False):  # stages 1 and 2
        fp32_gradients = [master.grad for master in wrapper.single_partition_of_fp32_groups]
        accumulated = list(wrapper.accumulated_grads_in_cpu.values())
        temporary = [wrapper.temp_grad_buffer_for_cpu_offload, wrapper.temp_grad_buffer_for_gpu_offload]
    elif getattr(wrapper, "offload_optimizer", False):  # stage 3
        flats = wrapper.fp32_partitioned_groups_flat
        fp32_gradients = [master.grad for master in flats if master.grad is not None]
        accumulated = [wrapper.grad_partitions_flat_buffer]
    swapper = getattr(wrapper, "optimizer_swapper", None)
    return {
        "weights, updated": bytes_of(getattr(wrapper, "param_buffer_of_bit16_for_cpu_offload_groups", [])),
        "a gradient on its way": bytes_of(temporary),
        "accumulated on the CPU": bytes_of(accumulated),
        "gradients in fp32 on the CPU": bytes_of(fp32_gradients),
        "swap buffers": bytes_of(swapper.swap_buffer_manager.all_buffers) if swapper else 0,
    }


def masters(engine: Any, own: list[Tensor]) -> list[Tensor]:
    wrapper = engine.optimizer
    for name in (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    ):
        if hasattr(wrapper, name):
            return list(getattr(wrapper, name))
    return own


def bytes_alive() -> tuple[int, int]:
    """Of all tensors that Python can reach, but for buckets of gradients; and of these."""
    gc.collect()
    found = [value for value in gc.get_objects() if isinstance(value, Tensor)]
    found += [value.grad for value in found if value.is_leaf and value.grad is not None]
    sizes = storages(found).values()
    # Known by their size, which nothing else has: gradients can lie in them after DeepSpeed has let go of them.
    buckets = sum(size for size in sizes if size in (2 * BUCKET, 4 * BUCKET))
    return sum(sizes) - buckets, buckets


def storages(values: Iterable[Tensor]) -> dict[int, int]:
    """The memory behind tensors: address → bytes."""
    held = [tensor.untyped_storage() for tensor in values if tensor.numel() and tensor.device.type != "meta"]
    return {storage.data_ptr(): storage.nbytes() for storage in held}


def bytes_of(values: Iterable[Tensor]) -> int:
    """Of the memory behind tensors, each piece once."""
    return sum(storages(values).values())
