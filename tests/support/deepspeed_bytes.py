"""Counts what ranks really hold and send under each ZeRO stage, to compare with what `explain` says."""

from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from deepspeed.comm import comm
from torch import Tensor, nn

from tests.support import toy

ACCUMULATION = 2
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "bf16, gradients in fp32": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}
# Of messages with fewer bytes (norms, flags, small parameters that stage 3 keeps) nothing is said.
SMALLEST_MESSAGE = 1000


def build_model() -> nn.Module:
    """Of odd sizes, so that every stage pads."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(17, 101), nn.Tanh(), nn.Linear(101, 67), nn.Tanh(), nn.Linear(67, 5, bias=False)
    )


def cases() -> dict[str, dict[str, Any]]:
    """Configs by name."""
    return {
        f"zero{stage}, {precision}": {
            "train_batch_size": toy.BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "ARSG", "params": toy.HYPERPARAMETERS},
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": 20000,
                "stage3_param_persistence_threshold": 200,
            },
            "steps_per_print": 10**6,
            "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False},
            **settings,
        }
        for stage in range(4)
        for precision, settings in PRECISIONS.items()
        if (stage, precision) != (0, "bf16, gradients in fp32")
    }


def count_cases() -> dict[str, Any]:
    """Of every rank."""
    counted: dict[str, Any] = {}
    for name, config in cases().items():
        gathered: list[Any] = [None] * deepspeed.comm.get_world_size()
        torch.distributed.all_gather_object(gathered, count(config))
        counted[name] = gathered
    return counted


def count(config: dict[str, Any]) -> dict[str, Any]:
    """Bytes this rank holds after the second backward pass, by kind, and messages of the second update."""
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    model = build_model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    dtype = torch.bfloat16 if "bf16" in config else torch.float32
    stage = config["zero_optimization"]["stage"]
    size = toy.BATCH // world_size // ACCUMULATION
    for update in range(2):
        comm.comms_logger.comms_dict.clear()
        for step in range(ACCUMULATION):
            start = (step * world_size + rank) * size
            inputs, targets = (values[start : start + size] for values in toy.batch(update))
            engine.backward(toy.loss_of(engine(inputs.to(dtype)), targets))
            if update == 1 and step == 1:
                gradients = bytes_of(gradients_of(engine, stage))
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
        "gradients": gradients,
        "sent": messages,
    }
    for name, key in (("m", "exp_avg"), ("v", "exp_avg_sq"), ("v̂", "max_exp_avg_sq")):
        result[name] = bytes_of(state[key] for state in basic.state.values())
    engine.destroy()
    return result


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


def gradients_of(engine: Any, stage: int) -> list[Tensor]:
    """Wherever a gradient is kept between the backward pass and the update."""
    found = [p.grad for p in engine.module.parameters() if p.grad is not None]
    wrapper = engine.optimizer
    for name in ("averaged_gradients", "fp32_groups_gradients_flat", "grad_partitions_flat_buffer"):
        found += list(tensors(getattr(wrapper, name, None)))
    return found


def tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for member in value.values():
            yield from tensors(member)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from tensors(member)


def bytes_of(values: Iterable[Tensor]) -> int:
    """Of the memory behind tensors, each piece once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in values if t.numel()}
    return sum(storages.values())
