"""Job for one rank: trains the configurations of the matrix under DeepSpeed and writes what the ranks end with.

One job for many configurations, because starting one takes longer than training most of them.

usage: matrix.py DIRECTORY SELECTION [--local_rank=N]
"""

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from arsg_dist.engine import end_process
from arsg_dist.optim.kernels import fused
from tests.deepspeed import matrix
from tests.deepspeed.jobs.common import gathered, job, refusal, weights_of
from tests.deepspeed.matrix_cases import cases
from tests.deepspeed.nvme import NVME
from tests.support import toy

fused_updates: list[int] = []


def main() -> None:
    directory, selection = (a for a in sys.argv[1:] if not a.startswith("--"))
    output = Path(directory)
    with job(output / "results.pt") as results:
        count_fused_updates()
        results["configurations"] = try_configurations()
        for case in cases(selection):
            if case.on_nvme and not NVME:
                continue
            start = time.monotonic()
            results[str(case)] = train(case, output)
            if case.on_nvme:
                results[str(case)]["on cpu"] = train(case.on_cpu, output)
            if deepspeed.comm.get_rank() == 0:
                print(f"{case}: {time.monotonic() - start:.2f} s", flush=True)


def train(case: matrix.Case, directory: Path) -> dict[str, Any]:
    """Trains, checks that all ranks agree, and returns fp32 weights and each rank's optimizer state."""
    engine = begin(case, case.config(directory))
    fused_updates.append(0)
    before = masters(engine, case)
    state_before = state_of(engine)
    poison_padding(engine.optimizer)
    for number in range(toy.UPDATES):
        update(engine, case, number)
    after = masters(engine, case)
    for name, weight in weights_of(engine.module).items():
        assert torch.equal(weight, after[name].to(case.dtype)), f"{case}: {name} is not its master, rounded"
    state = {**state_of(engine), "fused updates": fused_updates.pop()}
    engine.destroy()
    all_ranks = gathered({"after": after, "state": state})
    for other in all_ranks:
        assert all(torch.equal(after[name], other["after"][name]) for name in after), f"{case}: ranks differ"
    return {
        "before": before,
        "after": after,
        "state_before": state_before,
        "states": [other["state"] for other in all_ranks],
    }


def begin(case: matrix.Case, config: dict[str, Any]) -> Any:
    """An engine for the model of a configuration."""
    model = matrix.build_model(case)
    parameters = matrix.grouped(case, dict(model.named_parameters()))
    return deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]


def update(engine: Any, case: matrix.Case, number: int) -> None:
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    for step in range(case.accumulation):
        part = matrix.micro_batch(case, world_size, rank, step)
        engine.backward(matrix.loss_of(engine, case, number, part))
        engine.step()


def try_configurations() -> list[dict[str, tuple[str | None, list[str]]]]:
    """What initializing with each of some configs raises (None: nothing) and warns of, for every rank."""
    arsg = {"type": "ARSG", "params": matrix.SETTINGS}
    tried = {
        "plain": {"optimizer": arsg, "gradient_clipping": 0.0},
        "without clipping": {"optimizer": arsg},
        "adam without clipping": {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}},
        "lower case": {"optimizer": {"type": "arsg"}},
        "max_grad_norm": {"optimizer": {"type": "ARSG", "params": {"max_grad_norm": 1.0}}},
        "zenflow": {"optimizer": arsg, "zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
    }
    outcome: dict[str, tuple[str | None, list[str]]] = {}
    for name, config in tried.items():
        given = {"model": (model := toy.build_model()), "model_parameters": model.parameters()}
        given["config"] = {"train_batch_size": 6, **config}
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            error = refusal(lambda given=given: deepspeed.initialize(**given)[0].destroy())
        outcome[name] = error, [str(warning.message) for warning in warned]
    return gathered(outcome)


def poison_padding(zero: Any) -> None:
    """Makes padding NaN, which DeepSpeed leaves as it finds it in memory: nothing may depend on it."""
    rank = deepspeed.comm.get_rank()
    if isinstance(zero, DeepSpeedZeroOptimizer):
        for flat, padding in zip(zero.single_partition_of_fp32_groups, zero.groups_padding, strict=True):
            flat.data[flat.numel() - padding :] = float("nan")
    elif isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            start = 0
            for parameter in group:
                size = parameter.partition_numel()
                used = min(max(parameter.ds_numel - rank * size, 0), size)
                flat.data[start + used : start + size] = float("nan")
                start += size


def count_fused_updates() -> None:
    """Has the kernel for the CPU counted: one call per update and flat tensor."""
    kernel = fused.cpu_kernel()
    assert kernel is not None

    def counted(*args: Any, **kwargs: Any) -> list[int]:
        fused_updates[-1] += len(args[0])
        return kernel(*args, **kwargs)

    fused.cpu_kernel = lambda: counted


def state_of(engine: Any) -> dict[str, Any]:
    """Bytes of the state tensors that this rank holds, and the step counts it has."""
    states = engine.basic_optimizer.state.values()
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return {
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "bytes on disk": bytes_on_disk(engine.optimizer),
        "tensors updated": len(states),
        "devices": sorted({tensor.device.type for tensor in tensors}),
        "steps": sorted({state["step"] for state in states if "step" in state}),
    }


def bytes_on_disk(zero: Any) -> int:
    """Size of the state that is in files and not in memory, without what fills up blocks."""
    total = 0
    if getattr(zero, "swap_optimizer", False):
        for swapped in zero.optimizer_swapper.swap_params_info.values():
            for tensor in swapped.tensors[1:]:  # the first are weights
                size = 4 * swapped.numel()
                assert tensor.compute_tensor.numel() == 0, "state is in memory as well as on disk"
                assert Path(tensor.swap_path).stat().st_size >= size
                total += size
    return total


def masters(engine: Any, case: matrix.Case) -> dict[str, Tensor]:
    """The whole fp32 weights by name; a collective call."""
    named = dict(engine.module.named_parameters())
    full: dict[str, Tensor] = {}
    if case.stage == 0 and case.dtype != torch.float32:
        wrapper = engine.optimizer
        for copies, group in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for copy, master in zip(copies, group, strict=True):
                full |= {name: master for name, parameter in named.items() if parameter is copy}
    elif case.stage:
        full = {
            name: deepspeed.utils.safe_get_full_fp32_param(parameter)
            for name, parameter in named.items()
            if parameter.requires_grad
        }
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=case.stage == 3):
        return {name: full.get(name, parameter).detach().float().clone() for name, parameter in named.items()}


if __name__ == "__main__":
    main()
    end_process(0)
