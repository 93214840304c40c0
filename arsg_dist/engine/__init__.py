"""Provide what a training loop needs of any run: ranks, collectives, `Engine`.

`SingleProcessEngine` is the engine without a distribution; `arsg_dist.deepspeed.DeepSpeedEngine` and
`arsg_dist.horovod.HorovodEngine` implement the same interface on several ranks.
"""

from arsg_dist.engine.base import Capabilities, Engine, all_finite, copy_weight, copy_weights
from arsg_dist.engine.builder import EngineBuilder, TrainingSettings, load_builder
from arsg_dist.engine.communicator import (
    Communicator,
    SingleProcessCommunicator,
    TorchCommunicator,
    check_hosts,
    connect_torch,
    device_of,
    require_backend,
    torch_communicator,
)
from arsg_dist.engine.consistency import check_agreement, check_replicas, package_versions
from arsg_dist.engine.job import JobError, end_process
from arsg_dist.engine.local import LocalBuilder, LocalEngine, SingleProcessEngine
from arsg_dist.engine.ranks import Ranks, discover_ranks
from arsg_dist.engine.registry import ENGINES, EngineEntry
from arsg_dist.engine.rendezvous import announce_to_torch, collective_timeout, init_method
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import EngineState

__all__ = [
    "ENGINES",
    "Capabilities",
    "Communicator",
    "Engine",
    "EngineBuilder",
    "EngineEntry",
    "EngineState",
    "JobError",
    "LocalBuilder",
    "LocalEngine",
    "Ranks",
    "SavedState",
    "SingleProcessCommunicator",
    "SingleProcessEngine",
    "TorchCommunicator",
    "TrainingSettings",
    "all_finite",
    "announce_to_torch",
    "check_agreement",
    "check_hosts",
    "check_replicas",
    "collective_timeout",
    "connect_torch",
    "copy_weight",
    "copy_weights",
    "device_of",
    "discover_ranks",
    "end_process",
    "init_method",
    "load_builder",
    "package_versions",
    "require_backend",
    "torch_communicator",
]
