"""ARSG where DeepSpeed 0.19.8 keeps the optimizer on the CPU or on NVMe (`zero_optimization.offload_optimizer`)."""

from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine as _Engine
from torch.optim import Optimizer

from arsg_dist.deepspeed.refusals import check_nvme
from arsg_dist.deepspeed.repairs import Method, wrap_once
from arsg_dist.optim import ARSG


def apply_offload() -> None:
    """Makes offload work with ARSG, as `register` describes; calling this again changes nothing.

    Raises:
        RuntimeError: this DeepSpeed is built differently.
    """
    wrap_once(_Engine, "_configure_optimizer", _with_own_arsg_accepted)
    wrap_once(_Engine, "_configure_zero_optimizer", _with_groups_checked)


def _with_own_arsg_accepted(method: Method) -> Method:
    """An ARSG built by the program is offloaded without `"zero_force_ds_cpu_optimizer": false`.

    DeepSpeed refuses an optimizer that is not its own there, since most have no fast update on the CPU. ARSG has.
    """

    def configure(engine: Any, client_optimizer: Any, model_parameters: Any) -> Any:
        if (
            "zero_force_ds_cpu_optimizer" not in engine._config._param_dict
            and engine.zero_use_cpu_optimizer()
        ):
            made = client_optimizer
            if client_optimizer is not None and not isinstance(client_optimizer, Optimizer):
                made = client_optimizer(model_parameters)
                client_optimizer = lambda _: made  # noqa: E731
            if isinstance(made, ARSG):
                engine._config.zero_force_ds_cpu_optimizer = False
        return method(engine, client_optimizer, model_parameters)

    return configure


def _with_groups_checked(method: Method) -> Method:
    """NVMe: what `check_config` checks of the JSON config is checked of every parameter group."""

    def configure(engine: Any, optimizer: Any) -> Any:
        if isinstance(optimizer, ARSG):
            zero = engine._config._param_dict.get("zero_optimization")
            if isinstance(zero, dict):
                check_nvme(zero, optimizer.param_groups, "the DeepSpeed config")
        return method(engine, optimizer)

    return configure
