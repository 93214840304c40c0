"""List the engines: what is asked about one before it is imported."""

from dataclasses import dataclass
from typing import Final, Literal

Rendezvous = Literal["torch", "horovod"]
"""Whose variables and messages bring the ranks of a job together."""


@dataclass(frozen=True)
class EngineEntry:
    """Describe one engine.

    Attributes:
        name: on command lines, in checkpoints and in messages; `Engine.kind` of its engines.
        builder: "module:class" of its `EngineBuilder`; imported only when the engine is used.
        rendezvous: how its ranks meet; None for an engine of a single process.
        config_file: path of an example of the engine's own config file, for an engine that needs one; "" where
            everything is in the recipe.
    """

    name: str
    builder: str
    rendezvous: Rendezvous | None
    config_file: str = ""


ENGINES: Final = {
    entry.name: entry
    for entry in (
        EngineEntry(
            "deepspeed", "arsg_dist.deepspeed.build:DeepSpeedBuilder", "torch", "configs/deepspeed/zero1.json"
        ),
        EngineEntry("ddp", "arsg_dist.ddp.build:DDPBuilder", "torch"),
        EngineEntry("fsdp", "arsg_dist.fsdp.build:FSDPBuilder", "torch"),
        EngineEntry("horovod", "arsg_dist.horovod.build:HorovodBuilder", "horovod"),
        EngineEntry("horovod-sharded", "arsg_dist.horovod.build:HorovodShardedBuilder", "horovod"),
        EngineEntry("single", "arsg_dist.engine.local:SingleProcessBuilder", None),
    )
}
"""Name → engine. A new engine is a row here, an extra in pyproject.toml, and its package."""
