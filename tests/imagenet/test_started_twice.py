"""One command that is given again and again, as schedulers, operators and people do after something went wrong."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from arsg_dist.cli.launch import command as launch_command
from tests.imagenet.test_starting_again import files_of
from tests.imagenet.test_training import epochs_of, without_speed
from tests.support.compare import assert_same_weights
from tests.support.engines import ENGINES
from tests.support.launchers import REPOSITORY, Finished, launch
from tests.support.warm_ranks import free_port

JOB = "tests/imagenet/jobs/imagenet_job.py"
SETTINGS = ["--checkpoint_every", "3", "--log_every", "1", "--resume", "auto"]


def again(engine: str, recipe: list[str], *, signal: str = "", **options: Any) -> Finished:
    """The same command, in the same directory."""
    started = ENGINES[engine]
    variables = {"ARSG_TEST_SMALL_NETWORK": "1", **({"ARSG_TEST_SIGNAL": signal} if signal else {})}
    arguments = [*started.options, *recipe, *SETTINGS]
    return launch(started.warm, started.ranks, JOB, *arguments, variables=variables, **options)


def updates_of(directory: Path) -> list[int]:
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [record["update"] for record in records if record["kind"] == "train"]


@pytest.mark.ranks
@pytest.mark.parametrize(
    "engine",
    [
        "single",
        pytest.param("horovod", marks=pytest.mark.turn(1)),
        pytest.param("deepspeed", marks=pytest.mark.turn(2)),
    ],
)
def test_killed_before_and_after_the_first_checkpoint(engine: str, recipe: list[str], tmp_path: Path) -> None:
    """Catches a job that a kill before its first checkpoint ends for good, one that throws its checkpoint away, a
    container that fails when it is started once more after the end, and bits that all this changes."""
    run, last = tmp_path / "run", ENGINES[engine].ranks - 1
    assert again(engine, recipe, signal=f"2 {last} SIGKILL self").code != 0
    assert updates_of(run) == [1]
    assert again(engine, recipe, signal=f"4 {last} SIGKILL self").code != 0
    assert updates_of(run / "earlier-001") == [1]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000003"]
    job = again(engine, recipe)
    assert job.code == 0, job.output[-5000:]
    assert "resuming from" in job.output
    assert updates_of(run) == [*range(1, 11)]
    job = again(engine, recipe)
    assert job.code == 0, job.output[-5000:]
    assert "this run is finished" in job.output
    whole = again(engine, [*recipe, "--output", str(tmp_path / "whole")])
    assert whole.code == 0, whole.output[-5000:]
    assert without_speed(epochs_of(run)) == without_speed(epochs_of(tmp_path / "whole"))
    weights = [
        load_file(directory / "weights" / "last.safetensors") for directory in (run, tmp_path / "whole")
    ]
    assert_same_weights(
        *weights, started_from={key: 0 * value for key, value in weights[0].items()}, relative=0
    )


@pytest.mark.ranks
def test_a_disk_that_is_full_at_the_first_checkpoint(recipe: list[str], tmp_path: Path) -> None:
    """Catches a run that can be neither started nor resumed once there is space again."""
    run = tmp_path / "run"
    job = again("single", recipe, largest_file=100_000)
    assert job.code == 2, job.output[-5000:]
    assert f"cannot write the checkpoint {run / 'checkpoints'}" in job.output
    assert not list((run / "checkpoints").glob("step-*"))
    before = (run / "metrics.jsonl").read_text()
    job = again("single", recipe)
    assert job.code == 0, job.output[-5000:]
    assert f"the records of the start before are kept in {run / 'earlier-001'}" in job.output
    assert (run / "earlier-001" / "metrics.jsonl").read_text() == before
    assert updates_of(run) == [*range(1, 11)]
    assert not list((run / "checkpoints").glob(".step-*")), "half a checkpoint takes space"


@pytest.mark.turn(0)
@pytest.mark.ranks
def test_the_container_of_a_pytorchjob_is_started_twice(recipe: list[str], tmp_path: Path) -> None:
    """Catches a manifest whose command works once: with restartPolicy OnFailure the same container is started again."""
    program = [str(REPOSITORY / "launch/train_imagenet.py"), *recipe, "--engine", "ddp", "--epochs", "1"]
    parser = argparse.ArgumentParser()
    launch_command.add_arguments(parser)
    target = ["pytorchjob", "--image", "arsg:1", "--nodes", "1", "--ranks-per-node", "1", "--cpu"]
    made = launch_command.make_plan(
        parser.parse_args([*target, "--directory", str(REPOSITORY), "--", *program, "--max_updates", "2"])
    )
    (text,) = made.files.values()
    pod = json.loads(text)["spec"]["pytorchReplicaSpecs"]["Master"]
    assert pod["restartPolicy"] == "OnFailure"
    (container,) = pod["template"]["spec"]["containers"]
    operator = {"PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
    words = [re.sub(r"\$\((\w+)\)", lambda name: operator[name[1]], word) for word in container["command"]]
    assert words[0] == "python"  # the image's
    words[0] = sys.executable
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            words,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
        )
        outputs.append(done.stdout + done.stderr)
        assert done.returncode == 0, outputs[-1]
    assert "ended after 2 updates" in outputs[0]
    assert ": 2 updates, 24 training images" in outputs[1].replace("\n", " ")
    assert files_of(tmp_path / "run")
