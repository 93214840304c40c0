"""How the tests start each engine of the product's table; a row there is a case of every test that goes through it."""

from dataclasses import dataclass

from arsg_dist.engine import registry


@dataclass(frozen=True)
class Started:
    """An engine as the tests start it.

    Attributes:
        launcher: a real one of `launch`; `warm` is the one that forks.
        ranks: how many.
        options: of `arsg-imagenet train`.
    """

    launcher: str
    ranks: int
    options: tuple[str, ...]

    @property
    def warm(self) -> str:
        """The launcher whose ranks start in a moment."""
        return f"warm {self.launcher}"


def _of(entry: registry.EngineEntry) -> Started:
    if entry.rendezvous is None:
        return Started("alone", 1, ())
    if entry.config_file:
        return Started("deepspeed", 2, ("--deepspeed_config", entry.config_file))
    return Started(
        {"torch": "torchrun", "horovod": "horovodrun"}[entry.rendezvous], 2, ("--engine", entry.name)
    )


ENGINES = {name: _of(entry) for name, entry in registry.ENGINES.items()}
ON_RANKS = [name for name, started in ENGINES.items() if started.ranks > 1]
STAGES = {
    f"deepspeed-{stage}": Started(
        "deepspeed", 2, ("--deepspeed_config", f"configs/deepspeed/zero{stage}.json")
    )
    for stage in (0, 2, 3)
}
"""Beside stage 1, which is ENGINES["deepspeed"]."""
