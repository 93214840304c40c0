"""Makes DeepSpeed know the optimizer type "ARSG"."""

import torch
from deepspeed.runtime.zero import utils as zero_utils

from arsg_dist.optim import ARSG


def register() -> None:
    """Lets `"type": "ARSG"` in a DeepSpeed JSON config mean `arsg_dist.ARSG`, under every ZeRO stage.

    DeepSpeed 0.19 has no registry: it looks a type it does not know itself up in `torch.optim`, and ZeRO accepts an
    optimizer by its exact class. Calling this again changes nothing.

    Raises:
        RuntimeError: `torch.optim.ARSG` exists and is something else.
    """
    present = getattr(torch.optim, "ARSG", None)
    if present is not None and present is not ARSG:
        raise RuntimeError(
            f"torch.optim.ARSG is already {present!r}; arsg_dist cannot register its own ARSG there"
        )
    torch.optim.ARSG = ARSG  # type: ignore[attr-defined]
    if ARSG not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
        zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(ARSG)
