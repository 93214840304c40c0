"""One run on several ranks, through the engines: a job that the study starts under a launcher.

    deepspeed --num_accelerators 2 --module benchmarks.study.paper.distributed RUN.json CURVE.jsonl [DIR]
    mpirun -np 2 --bind-to none python -m benchmarks.study paper.distributed RUN.json CURVE.jsonl [DIR]

RUN.json holds the fields of `Run`; DIR has the images.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from arsg_dist.engine import Engine, discover_ranks, end_process
from benchmarks.common.machine import mpirun
from benchmarks.study.paper.data import load_images
from benchmarks.study.paper.optimizers import arsg_arguments, build
from benchmarks.study.paper.run import Run, train, write
from benchmarks.study.paper.tasks import TASKS


def start(run: Run, path: Path, images: Path | None) -> None:
    """Runs a job on this machine, and waits for it.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    specification = path.with_suffix(".run.json")
    specification.write_text(json.dumps(asdict(run)))
    module = "benchmarks.study.paper.distributed"
    if run.engine == "zero2":
        # On a GPU machine the same option chooses how many GPUs.
        launcher = ["deepspeed", "--num_accelerators", str(run.ranks), "--master_port", _free_port()]
        launcher += ["--module", module]
    else:
        launcher = [*mpirun(run.ranks), sys.executable, "-m", module]
    command = [*launcher, str(specification), str(path), *([str(images)] if images else [])]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),
    }
    job = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    specification.unlink()
    if job.returncode or not path.is_file():
        raise RuntimeError(f"{' '.join(command)} failed:\n{job.stdout[-2000:]}\n{job.stderr[-2000:]}")


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def main() -> None:
    """One rank of the job."""
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    run, path = Run(**json.loads(Path(given[0]).read_text())), Path(given[1])
    torch.set_num_threads(1)
    ranks = discover_ranks()
    task = TASKS[run.task]
    settings = run.optimizer_settings()
    settings.pop("boost")
    if run.engine == "zero2":
        from arsg_dist import deepspeed

        communicator = deepspeed.connect(ranks)
        arguments = arsg_arguments(run.optimizer, settings, task.weight_decay)
        config = deepspeed.resolve_config(
            {"zero_optimization": {"stage": 2}, "steps_per_print": 1_000_000},
            world_size=ranks.world_size,
            batch_size=run.batch,
            accumulation_steps=1,
            clip_grad_norm=0.0,
            optimizer={"type": "ARSG", "params": arguments | {"betas": list(arguments["betas"])}},
        )

        def make(module: nn.Module, run: Run) -> Engine:
            return deepspeed.DeepSpeedEngine(module, config, communicator)
    else:
        from arsg_dist import horovod

        communicator = horovod.connect(ranks)

        def make(module: nn.Module, run: Run) -> Engine:
            optimizer = build(run.optimizer, module.parameters(), settings, task.weight_decay)
            return horovod.HorovodShardedEngine(module, optimizer, communicator)

    device = torch.device("cpu")
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
        device = torch.device("cuda", torch.cuda.current_device())
    images = load_images(task.images, Path(given[2]) if len(given) > 2 else None).to(device)
    records = train(run, images, device, make)
    if communicator.rank == 0:
        write(run, records, device, path)
    else:
        for _ in records:
            pass
    communicator.barrier()
    communicator.close()
    end_process(0)


if __name__ == "__main__":
    main()
