"""State in fewer bits on every engine: cases of `followed`."""

from typing import Any

from torch import Tensor, nn

from arsg_dist import ARSG
from arsg_dist.engine import Engine
from arsg_dist.optim.kernels.eight_bit import EightBit
from arsg_dist.optim.state import local
from tests.support import toy
from tests.support.checkpoint_matrix import FAMILIES, STAGES, engine_around

SIZES = (
    150,
    131,
)  # three shards of a weight each have more than the 4,096 elements from which on 8 bits are used
SETTINGS = {"lr": 0.02, "betas": [0.9, 0.9], "eps": 1e-3, "mu": 0.2}
SPLIT = {"state_dtype": "8bit", "master": "split"}

CASES: dict[str, dict[str, Any]] = {
    "bfloat16": {"state_dtype": "bfloat16"},
    "8bit": {"state_dtype": "8bit"},
    "split": {"master": "split"},
    "split, 8bit": SPLIT,
}


MASTERLESS = ("single", "ddp", "ddp-divided", "fsdp", "horovod")
"""Engines in which the optimizer has the parameters themselves, in their dtype."""


def engines_of(family: str, label: str) -> list[str]:
    """Engines that can: those with masters of their own do without split ones."""
    return [name for name in FAMILIES[family] if "split" not in label or name in MASTERLESS]


def build(name: str, label: str, communicator: Any) -> Engine:
    model: nn.Module = toy.build_model(*SIZES)
    settings = {**SETTINGS, **CASES[label]}
    if name in STAGES:
        from arsg_dist.deepspeed import DeepSpeedEngine

        config = {
            "train_batch_size": toy.BATCH * communicator.world_size,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "ARSG", "params": settings},
            "zero_optimization": {
                "stage": int(name[-1]),
                "stage3_param_persistence_threshold": 0,
                "reduce_bucket_size": 100_000,
            },
        }
        return DeepSpeedEngine(model, config, communicator)
    if "split" in label:
        model = model.bfloat16()
    if name == "horovod-sharded":
        from arsg_dist import horovod

        # In smaller buckets every piece would be too small for 8 bits.
        optimizer = ARSG(model.parameters(), **settings)
        return horovod.HorovodShardedEngine(model, optimizer, communicator, bucket_mb=1)
    return engine_around(
        name,
        model,
        lambda module: [{"params": list(module.parameters())}],
        lambda groups: ARSG(groups, **settings),
        communicator,
    )


def train(engine: Engine, first: int, last: int) -> None:
    """Updates from the same batch on every rank: the mean of two or four equal gradients is that gradient."""
    dtype = next(iter(engine.module.parameters())).dtype
    for update in range(first, last):
        inputs, targets = (tensor.to(dtype) for tensor in toy.batch(update))
        engine.backward(toy.loss_of(engine.module(inputs), targets))
        engine.step()


def weights(engine: Engine) -> dict[str, Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in engine.whole_weights().items()}


def moments(engine: Engine) -> int:
    """How many moments of this rank are in 8 bits."""
    states = engine.optimizer.state
    if hasattr(engine.optimizer, "inner"):
        states = engine.optimizer.inner.state
    tensors = [value for state in states.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(isinstance(local(tensor), EightBit) for tensor in tensors)


def seen(engine: Engine) -> dict[str, Any]:
    return {"saved": weights(engine), "moments": moments(engine)}
