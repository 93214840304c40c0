"""Add ARSG to timm's optimizers: `import arsg_dist.timm`, then `--opt arsg` in timm's train script.

timm hands on lr, weight decay, `--opt-eps`, `--opt-betas`, and the rest by `--opt-kwargs mu=0.1`. Like timm's other
optimizers of this name ("adam" and "adamw"), "arsg" couples weight decay with the gradient and "arsgw" decouples it.
"""

from __future__ import annotations

try:
    from timm.optim import OptimInfo
    from timm.optim._optim_factory import default_registry
except ImportError as error:
    raise ImportError(
        "arsg_dist.timm needs timm with its registry of optimizers (1.0.12 or newer): pip install 'arsg-dist[timm]'"
    ) from error

from arsg_dist.optim.arsg import ARSG

_ABOUT = "adaptive remote stochastic gradient (arXiv 1905.01422)"


def register() -> None:
    """Add "arsg" and "arsgw" to timm's registry; timm warns where it has one of these names already."""
    for name, decoupled in (("arsg", False), ("arsgw", True)):
        default_registry.register(
            OptimInfo(
                name=name,
                opt_class=ARSG,
                description=_ABOUT + (", decoupled weight decay" if decoupled else ""),
                has_betas=True,
                defaults={"decoupled_weight_decay": decoupled},
            )
        )


register()
