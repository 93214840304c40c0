"""Make `zero_optimization.offload_optimizer` of DeepSpeed work with ARSG."""

from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine as _Engine
from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
from torch import Tensor
from torch.optim import Optimizer

from arsg_dist.deepspeed.config.rules import check_masters, check_nvme
from arsg_dist.deepspeed.patching import Method, is_repaired, repair_once, wrap_once
from arsg_dist.optim.by_name import OURS


def patch_offload() -> None:
    """Apply all of these patches; calling this again changes nothing.

    Raises:
        RuntimeError: this DeepSpeed is built differently.
    """
    wrap_once(_Engine, "_configure_optimizer", _with_own_arsg_accepted)
    wrap_once(_Engine, "_configure_zero_optimizer", _with_groups_checked)
    repair_once(OptimizerSwapper, "_adjust_for_misaligned_lengths", _with_aligned_gradients)


def _with_own_arsg_accepted(method: Method) -> Method:
    """Offload a program's ARSG without `"zero_force_ds_cpu_optimizer": false`.

    DeepSpeed refuses an optimizer that is not its own there, since most have no fast update on the CPU. ARSG has.
    """

    def configure(engine: Any, client_optimizer: Any, model_parameters: Any) -> Any:
        if isinstance(client_optimizer, OURS):
            check_masters(client_optimizer.param_groups, "the optimizer")
        if (
            "zero_force_ds_cpu_optimizer" not in engine._config._param_dict
            and engine.zero_use_cpu_optimizer()
        ):
            made = client_optimizer
            if client_optimizer is not None and not isinstance(client_optimizer, Optimizer):
                made = client_optimizer(model_parameters)
                client_optimizer = lambda _: made  # noqa: E731
            if isinstance(made, OURS):
                engine._config.zero_force_ds_cpu_optimizer = False
        return method(engine, client_optimizer, model_parameters)

    return configure


def _with_groups_checked(method: Method) -> Method:
    """Check every parameter group as `check_config` does the JSON config (NVMe)."""

    def configure(engine: Any, optimizer: Any) -> Any:
        if isinstance(optimizer, OURS):
            zero = engine._config._param_dict.get("zero_optimization")
            check_masters(optimizer.param_groups, "the optimizer")
            if isinstance(zero, dict):
                check_nvme(zero, optimizer.param_groups, "the DeepSpeed config")
        return method(engine, optimizer)

    return configure


def _with_aligned_gradients(method: Method) -> Method:
    """Read a gradient back wherever in its sub-group it begins (NVMe).

    DeepSpeed writes gradients of 1 MiB and more to files and reads each to its place in the sub-group's buffer. Where
    that place is no multiple of 512 bytes, nothing is read, the number of completed reads says otherwise, and the
    update uses what the buffer held before. Here the elements up to the next such place stay in memory, as DeepSpeed
    keeps those of an incomplete last block. Both are copies: a view would keep all of the gradient in memory.
    """

    def adjust(swapper: Any, tensors: list[Tensor], offsets: list[int]) -> tuple[list[Tensor], list[int]]:
        repaired = is_repaired(swapper.optimizer)
        if repaired:
            pieces, starts = [], []
            for tensor, offset in zip(tensors, offsets, strict=True):
                head = min(-offset % swapper.numel_alignment, tensor.numel())
                if head:
                    pieces.append(tensor[:head])
                    starts.append(offset)
                if head < tensor.numel():
                    pieces.append(tensor[head:])
                    starts.append(offset + head)
            tensors, offsets = pieces, starts
        tensors, offsets = method(swapper, tensors, offsets)
        if repaired:
            tensors = [
                tensor if swapper.is_swappable_tensor(tensor=tensor) else tensor.clone() for tensor in tensors
            ]
        return tensors, offsets

    return adjust
