"""Provide the ARSG method: reference, optimizer and schedulers (torch only)."""

from arsg_dist.optim.advice import Advice, advise
from arsg_dist.optim.arsg import ARSG
from arsg_dist.optim.lion import Lion
from arsg_dist.optim.remote_observation import RemoteObservation
from arsg_dist.optim.schedulers.beta1_warmup import Beta1Warmup
from arsg_dist.optim.schedulers.boost import ObservationBoost
from arsg_dist.optim.schedulers.loss_plateau import LossPlateau

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
