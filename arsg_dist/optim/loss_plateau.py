"""Keep the path `arsg_dist.optim.loss_plateau`, which documents showed; import from `arsg_dist`."""

from arsg_dist.optim.schedulers.loss_plateau import LossPlateau

__all__ = ["LossPlateau"]
