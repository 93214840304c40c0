"""Keep the path `arsg_dist.optim.boost`, which documents showed; import from `arsg_dist`."""

from arsg_dist.optim.schedulers.boost import ObservationBoost

__all__ = ["ObservationBoost"]
