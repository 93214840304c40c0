"""The files under launch/ that people copy are what `arsg-dist launch` writes for these commands.

python -m tests.cli.launch.examples      writes them anew
"""

import argparse

from arsg_dist.cli.launch import command as launch
from arsg_dist.safe_io.files import write_text
from tests.support.launchers import REPOSITORY

_RECIPE = "--config configs/imagenet_arsg.yaml --data.root /path/to/imagenet"
_PROGRAM = f"launch/train_imagenet.py {_RECIPE} --output runs/imagenet"
_DEEPSPEED = f"{_PROGRAM} --deepspeed_config configs/deepspeed/zero1.json"
_HOROVOD = f"{_PROGRAM} --engine horovod"
_PATHS = "--directory /path/to/arsg_dist --python /path/to/arsg_dist/.venv/bin/python"
_IMAGE = "--image arsg_dist:latest"
_NODES = "--nodes 2 --ranks-per-node 4"

EXAMPLES = {
    "slurm_deepspeed.sbatch": f"slurm --engine deepspeed {_NODES} -- {_DEEPSPEED}",
    "slurm_horovod.sbatch": f"slurm --engine horovod {_NODES} -- {_HOROVOD}",
    "slurm_horovod_mpirun.sbatch": f"slurm --engine horovod --through mpirun {_NODES} -- {_HOROVOD}",
    "slurm_horovodrun.sbatch": f"slurm --engine horovod --through horovodrun {_NODES} -- {_HOROVOD}",
    "slurm_frontier.sbatch": "slurm --engine deepspeed --profile frontier --account PROJECT "
    f"--nodes 2 --ranks-per-node 8 -- {_DEEPSPEED}",
    "pbs_polaris.pbs": "pbs --engine deepspeed --profile polaris --account PROJECT "
    f"--time 01:00:00 {_NODES} -- {_DEEPSPEED}",
    "lsf_horovod.lsf": f"lsf --engine horovod --time 24:00 {_NODES} -- {_HOROVOD}",
    "kubernetes/mpijob_horovod.json": f"mpijob --engine horovod {_IMAGE} {_NODES} -- {_HOROVOD}",
    "kubernetes/pytorchjob_deepspeed.json": f"pytorchjob {_IMAGE} {_NODES} -- {_DEEPSPEED}",
    "kubernetes/trainjob_deepspeed.json": f"trainjob {_IMAGE} {_NODES} -- {_DEEPSPEED}",
}


def example(name: str) -> str:
    """The content of launch/NAME."""
    command, _, program = EXAMPLES[name].partition(" -- ")
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    paths = "" if _IMAGE in command else _PATHS  # those of the image
    options = parser.parse_args([*f"{command} {paths} --".split(), *program.split()])
    (content,) = launch.make_plan(options, here={}).files.values()
    return content


if __name__ == "__main__":
    for name in EXAMPLES:
        path = REPOSITORY / "launch" / name
        path.parent.mkdir(exist_ok=True)
        write_text(path, example(name))
