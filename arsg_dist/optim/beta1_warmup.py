"""Keep the path `arsg_dist.optim.beta1_warmup`, which documents showed; import from `arsg_dist`."""

from arsg_dist.optim.schedulers.beta1_warmup import Beta1Warmup

__all__ = ["Beta1Warmup"]
