"""Train with ARSG under DeepSpeed's ZeRO.

Importing this package registers the optimizer, so that a DeepSpeed JSON config with
``"optimizer": {"type": "ARSG", "params": {...}}`` works in any script that has the line
``import arsg_dist.deepspeed``. Only DeepSpeed learns of it; torch stays as it is.
"""

try:
    import deepspeed as _deepspeed  # noqa: F401
except ImportError as error:
    raise ImportError(
        "arsg_dist.deepspeed needs DeepSpeed: pip install 'arsg-dist[deepspeed]', or run launch/setup.sh in a checkout"
    ) from error

from arsg_dist.deepspeed.base_iterate import base_iterate
from arsg_dist.deepspeed.checkpoint.engine_state import restart_lost_maximum
from arsg_dist.deepspeed.checkpoint.guard import guard_checkpoints
from arsg_dist.deepspeed.checkpoint.pickles import trust_pickles
from arsg_dist.deepspeed.config.resolve import check_config, resolve_config
from arsg_dist.deepspeed.engine import DeepSpeedEngine, connect, release_shared_memory
from arsg_dist.deepspeed.export import export
from arsg_dist.deepspeed.initialize import initialize
from arsg_dist.deepspeed.patching import repair
from arsg_dist.deepspeed.registration import register

register()
guard_checkpoints()

__all__ = [
    "DeepSpeedEngine",
    "base_iterate",
    "check_config",
    "connect",
    "export",
    "initialize",
    "register",
    "release_shared_memory",
    "repair",
    "resolve_config",
    "restart_lost_maximum",
    "trust_pickles",
]
