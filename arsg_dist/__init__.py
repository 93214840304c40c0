"""ARSG (adaptive remote stochastic gradient, arXiv 1905.01422) for distributed training with PyTorch.

Importing this package imports torch and nothing else; the engines are in `arsg_dist.deepspeed` and
`arsg_dist.horovod`, the image-classification application in `arsg_dist.imagenet`.
"""

from arsg_dist.optim import (
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
