"""The ARSG method: reference rule, optimizer and schedulers (torch only)."""

from arsg_dist.optim.arsg import ARSG

__all__ = ["ARSG"]
