"""Runs an example whose framework shards on accelerators only: usage: as_on_accelerators.py EXAMPLE ARGUMENTS...

accelerate's and Lightning's own code runs, over Gloo on the CPU; what is changed is what they answer when they ask
themselves whether there are accelerators.
"""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tests.support.warm_ranks import REPOSITORY


def accelerate_shards_on_cpus() -> None:
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    real = PartialState.__init__

    def made(self: Any, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = made


def lightning_shards_on_cpus() -> None:
    if find_spec("lightning") is None:
        return
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.strategies import deepspeed

    vars(deepspeed).update(
        CUDAAccelerator=CPUAccelerator, _validate_device_index_selection=lambda devices: None
    )
    # It wants a number.
    deepspeed.DeepSpeedStrategy.root_device = property(lambda self: torch.device("cpu", 0))


if __name__ == "__main__":
    accelerate_shards_on_cpus()
    lightning_shards_on_cpus()
    example = REPOSITORY / sys.argv[1]
    sys.argv = [str(example), *sys.argv[2:]]
    sys.path[0] = str(Path(example).parent)
    runpy.run_path(str(example), run_name="__main__")
    from accelerate.state import AcceleratorState, is_initialized

    if is_initialized():
        kind = AcceleratorState().distributed_type
        assert kind == "FSDP", kind
