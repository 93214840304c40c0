"""Makes DeepSpeed know the optimizer type "ARSG", and treat it right."""

import warnings
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine as _Engine
from deepspeed.runtime.zero import utils as zero_utils

from arsg_dist.deepspeed.config import check_config
from arsg_dist.deepspeed.repairs import Method, apply_repairs, wrap_once
from arsg_dist.optim import ARSG


def register() -> None:
    """Lets `"type": "ARSG"` in a DeepSpeed JSON config mean `arsg_dist.ARSG`, under every ZeRO stage.

    DeepSpeed 0.19 has no registry: it looks a type it does not know itself up in `torch.optim`, and ZeRO accepts an
    optimizer by its exact class. Some methods of DeepSpeed are wrapped, and do what they did for other optimizers: its
    check of a config also calls `check_config`, and warns where DeepSpeed will clip the gradient unasked; and the
    `repairs`. Calling this again changes nothing.

    Raises:
        RuntimeError: `torch.optim.ARSG` exists and is something else, or this DeepSpeed is built differently.
    """
    present = getattr(torch.optim, "ARSG", None)
    if present is not None and present is not ARSG:
        raise RuntimeError(
            f"torch.optim.ARSG is already {present!r}; arsg_dist cannot register its own ARSG there"
        )
    torch.optim.ARSG = ARSG  # type: ignore[attr-defined]
    if ARSG not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
        zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(ARSG)
    wrap_once(_Engine, "_do_sanity_check", _with_arsg_check)
    apply_repairs()


def _with_arsg_check(method: Method) -> Method:
    def check(engine: Any) -> None:
        config: dict[str, Any] = engine._config._param_dict
        if isinstance(engine.client_optimizer, ARSG):
            # DeepSpeed takes no notice of the optimizer section then.
            _check({key: value for key, value in config.items() if key != "optimizer"})
        elif not engine.client_optimizer and str(engine.optimizer_name()).lower() == "arsg":
            _check(config)
        method(engine)

    return check


def _check(config: dict[str, Any]) -> None:
    check_config(config)
    if "gradient_clipping" not in config and deepspeed.comm.get_rank() == 0:
        warnings.warn(
            "the DeepSpeed config has no 'gradient_clipping', and DeepSpeed then clips the gradient at norm 1.0: "
            'write "gradient_clipping": 0.0 to train as without DeepSpeed, or the norm you want',
            stacklevel=2,
        )
