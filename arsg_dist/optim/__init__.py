"""The ARSG method: reference rule, optimizer and schedulers (torch only)."""

from arsg_dist.optim.arsg import ARSG
from arsg_dist.optim.beta1_warmup import Beta1Warmup
from arsg_dist.optim.boost import ObservationBoost
from arsg_dist.optim.loss_plateau import LossPlateau
from arsg_dist.optim.remote_observation import RemoteObservation

__all__ = ["ARSG", "Beta1Warmup", "LossPlateau", "ObservationBoost", "RemoteObservation"]
