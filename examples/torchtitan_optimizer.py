"""torchtitan: an optimizers container with ARSG, for a trainer's config.

    optimizer=arsg(lr=0.01, eps=1e-3)      # in place of default_adamw(lr=3e-4)

`fused` and `foreach` are left to ARSG, since torchtitan's parameters are DTensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from arsg_dist import ARSG


class ARSGContainer(OptimizersContainer):
    """torchtitan's container, whose groups may name "ARSG"."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """As its own."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        return ARSG if name == "ARSG" else OptimizersContainer._resolve_optimizer_factory(name)


def arsg(**settings: Any) -> ARSGContainer.Config:
    """Make the config: all parameters in one group of ARSG."""
    own = {"fused": None, "foreach": None, **settings}
    group = ParamGroupConfig(pattern=r".*", optimizer_name="ARSG", optimizer_kwargs=own)
    return ARSGContainer.Config(param_groups=[group])
