"""List the launch targets: one file each way to start ranks, none with an engine."""

from arsg_dist.cli.launch.targets.base import Target
from arsg_dist.cli.launch.targets.deepspeed_ssh import OpenMpiRunner, Pdsh, PerNode
from arsg_dist.cli.launch.targets.horovodrun import ElasticHorovodrun, Horovodrun
from arsg_dist.cli.launch.targets.kubernetes import MpiJob, PyTorchJob, TrainJob
from arsg_dist.cli.launch.targets.local import Local
from arsg_dist.cli.launch.targets.lsf import Lsf
from arsg_dist.cli.launch.targets.mpirun import Mpirun
from arsg_dist.cli.launch.targets.pbs import Pbs
from arsg_dist.cli.launch.targets.slurm import Slurm
from arsg_dist.cli.launch.targets.torchrun import Torchrun

TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (
        Local,
        Pdsh,
        OpenMpiRunner,
        PerNode,
        Torchrun,
        Mpirun,
        Horovodrun,
        ElasticHorovodrun,
        Slurm,
        Pbs,
        Lsf,
        MpiJob,
        PyTorchJob,
        TrainJob,
    )
}
"""Name on the command line → target."""

__all__ = ["TARGETS", "Target"]
