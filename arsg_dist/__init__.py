"""ARSG (adaptive remote stochastic gradient, arXiv 1905.01422) for distributed training with PyTorch.

Importing this package imports torch and nothing else; the engines are in `arsg_dist.deepspeed` and
`arsg_dist.horovod`, the image-classification application in `arsg_dist.imagenet`.
"""

import torch

OLDEST_TORCH = (2, 6)
"""What pyproject.toml asks for, for those who install without dependencies: FSDP2 is public from here on."""
if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
    raise ImportError(
        f"arsg-dist needs torch 2.6 or newer, not {torch.__version__}: pip install 'torch>=2.6'"
    )

from arsg_dist.optim import (  # noqa: E402
    ARSG,
    Advice,
    Beta1Warmup,
    Lion,
    LossPlateau,
    ObservationBoost,
    RemoteObservation,
    advise,
)

__all__ = [
    "ARSG",
    "Advice",
    "Beta1Warmup",
    "Lion",
    "LossPlateau",
    "ObservationBoost",
    "RemoteObservation",
    "advise",
]
__version__ = "0.1.0"
