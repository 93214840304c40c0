"""Slurm jobs that are stopped, requeued, lose a node, share GPUs, or are started wrongly."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from arsg_dist.checkpoint import SavedRun
from arsg_dist.imagenet.data.builtin import digits_tree
from arsg_dist.imagenet.signals import MARKER
from tests.cluster import slurm
from tests.cluster.rehearsal import Cluster
from tests.cluster.starts import start, wait_for_batch_job
from tests.support.launchers import REPOSITORY

pytestmark = [pytest.mark.cluster, pytest.mark.ranks]


@pytest.fixture(autouse=True)
def no_job_stays(cluster: Cluster) -> Iterator[None]:
    """Ends what a failed test leaves to Slurm: it would hold the nodes of the next."""
    yield
    cluster.run_on("node1", ["scancel", "--user=root"], timeout=60)


NODES = ["--nodes", "2", "--ranks-per-node", "1", "--engine", "deepspeed", "--time", "10"]


def small_training(tmp_path: Path, epochs: int) -> list[str]:
    """arsg-imagenet under DeepSpeed on a few digits, three updates per epoch."""
    if not (tmp_path / "small").exists():
        digits_tree(tmp_path / "digits")
        for split, count in (("train", 12), ("val", 4)):
            for digit in "036":
                target = tmp_path / "small" / split / digit
                target.mkdir(parents=True)
                for path in sorted((tmp_path / "digits" / split / digit).iterdir())[:count]:
                    shutil.copy(path, target)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: {{root: {tmp_path}/small, augmentation: crop, image_size: 16, crop_size: 14, workers: 0}}\n"
        "model: resnet20\nbatch_size: 12\nval_batch_size: 4\nlog_every: 1\n"
        "optimizer: {type: ARSG, params: {lr: 0.01, mu: 0.1}}\n"
    )
    return [
        str(REPOSITORY / "launch/train_imagenet.py"), "--config", str(recipe), "--epochs", str(epochs),
        "--deepspeed_config", str(REPOSITORY / "configs/deepspeed/zero1.json"), "--output", str(tmp_path / "run"),
    ]  # fmt: skip


def text_of(log: Path) -> str:
    """What a job printed; bars of two ranks can meet in the middle of a character."""
    return log.read_text(errors="replace") if log.exists() else ""


def submit_preemptible(cluster: Cluster, tmp_path: Path, steps: int) -> tuple[str, Path]:
    output = tmp_path / "run"
    output.mkdir()
    program = [
        str(REPOSITORY / "tests/cluster/jobs/preemptible_job.py"),
        "--output",
        str(output),
        "--steps",
        str(steps),
    ]
    submitted = start(cluster, "slurm", *NODES, program=program, directory=tmp_path).wait(120)
    assert submitted.code == 0, submitted.output
    return submitted.output.split()[-1], output


def wait_for_step(cluster: Cluster, output: Path, at_least: int, job: str) -> None:
    end = time.monotonic() + 180
    while not (output / "step").exists() or int((output / "step").read_text() or 0) < at_least:
        if time.monotonic() > end:
            state = cluster.run_on("node1", ["scontrol", "show", "job", job], timeout=60).output
            logs = "".join(text_of(path) for path in output.parent.glob("*.out"))
            pytest.fail(f"the job did not get to step {at_least}:\n{state}\n{logs[-5000:]}")
        time.sleep(0.2)


def start_now(cluster: Cluster, job: str) -> None:
    """A requeued job waits two minutes by default.

    Not started in the second in which it was requeued: slurmd takes what was signed then for the start it has revoked
    ("Job credential revoked").
    """
    end = time.monotonic() + 90
    while (
        "JobState=PENDING"
        not in cluster.run_on("node1", ["scontrol", "show", "job", "-o", job], timeout=60).output
    ):
        assert time.monotonic() < end, "the job was not requeued"
        time.sleep(0.5)
    cluster.run_on("node1", ["scontrol", "update", f"JobId={job}", "StartTime=now+3"], timeout=60)


@pytest.mark.turn(0)
def test_a_job_near_its_time_limit_saves_requeues_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    """Catches a signal that never reaches the ranks, an exit code that is lost, and a second start from scratch."""
    job, output = submit_preemptible(cluster, tmp_path, steps=60)
    wait_for_step(cluster, output, 5, job)
    # The signal --signal=B:USR1@90 announces, sent at once: Slurm counts time limits in minutes.
    assert cluster.run_on("node1", ["scancel", "--batch", "--signal=USR1", job], timeout=60).code == 0
    start_now(cluster, job)
    submitted = cluster.run_on("node1", ["echo", job])
    finished = wait_for_batch_job(cluster, submitted, tmp_path)
    assert finished.code == 0, finished.output[-5000:]
    assert "saved: requeueing" in finished.output
    assert "start 1" in finished.output
    assert "start 2" in finished.output
    first, second = json.loads((output / "checkpoints" / "state.json").read_text())
    assert 5 <= first["to"] < 60
    assert second == {"from": first["to"], "restarts": "1", "to": 60}


@pytest.mark.turn(1)
def test_a_job_that_loses_a_node_is_requeued_without_it(cluster: Cluster, tmp_path: Path) -> None:
    """Catches a job that dies, or waits, with a node it has lost."""
    job, output = submit_preemptible(cluster, tmp_path, steps=400)
    wait_for_step(cluster, output, 5, job)
    lost = lose_a_node(cluster, job)
    try:
        wait_for_requeue(cluster, job)
        start_now(cluster, job)
        (output / "step").unlink(missing_ok=True)
        wait_for_step(cluster, output, 5, job)
        again = cluster.run_on("node1", ["scontrol", "show", "job", "-o", job], timeout=60).output
        assert lost not in again.partition(" NodeList=")[2].split()[0]
    finally:
        cluster.run_on("node1", ["scancel", job], timeout=60)
        cluster.boot(lost)
        slurm.restore(cluster, lost)


def lose_a_node(cluster: Cluster, job: str) -> str:
    """Cuts the power of the last node of a job; returns its name."""
    shown = cluster.run_on("node1", ["scontrol", "show", "job", "-o", job], timeout=60).output
    nodes = next(part for part in shown.split() if part.startswith("NodeList=")).partition("=")[2]
    lost = cluster.run_on("node1", ["scontrol", "show", "hostnames", nodes]).output.split()[-1]
    assert lost != "node1", "the controller would be lost"
    cluster.kill(lost)
    return lost


def wait_for_requeue(cluster: Cluster, job: str) -> None:
    end = time.monotonic() + 150
    while (
        "Restarts=1" not in cluster.run_on("node1", ["scontrol", "show", "job", "-o", job], timeout=60).output
    ):
        assert time.monotonic() < end, "the job was not requeued"
        time.sleep(1)


@pytest.mark.turn(2)
def test_the_training_program_begins_anew_when_a_node_is_lost_in_the_first_epoch(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Catches a requeued training that is refused, its directory holding a run that has no complete checkpoint."""
    (tmp_path / "recipe.yaml").write_text(
        "data: {source: synthetic, synthetic_images: 600000, synthetic_classes: 3, image_size: 16, workers: 0}\n"
        "model: resnet20\nbatch_size: 12\nlog_every: 1\noptimizer: {type: ARSG, params: {lr: 0.01, mu: 0.1}}\n"
    )
    run = tmp_path / "run"
    program = [
        str(REPOSITORY / "launch/train_imagenet.py"), "--config", str(tmp_path / "recipe.yaml"), "--epochs", "1",
        "--deepspeed_config", str(REPOSITORY / "configs/deepspeed/zero1.json"), "--output", str(run),
    ]  # fmt: skip
    submitted = start(cluster, "slurm", *NODES, program=program, directory=tmp_path).wait(240)
    assert submitted.code == 0, submitted.output
    job = submitted.output.split()[-1]
    log = tmp_path / f"arsg-{job}.out"

    def wait_for_records(directory: Path, count: int) -> None:
        end = time.monotonic() + 240
        metrics = directory / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < count:
            assert time.monotonic() < end, text_of(log)[-5000:] or "the job did not start"
            time.sleep(0.2)

    wait_for_records(run, 5)
    lost = lose_a_node(cluster, job)
    try:
        wait_for_requeue(cluster, job)
        start_now(cluster, job)
        wait_for_records(run / "earlier-001", 5)
        wait_for_records(run, 3)
        assert f"the records of the start before are kept in {run / 'earlier-001'}" in text_of(log)
        first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        assert (first["kind"], first["update"]) == ("train", 1)
    finally:
        cluster.run_on("node1", ["scancel", job], timeout=60)
        cluster.boot(lost)
        slurm.restore(cluster, lost)


@pytest.mark.slow
def test_each_job_sees_its_own_gpus(cluster: Cluster, tmp_path: Path) -> None:
    """Catches two jobs on one host that train on the same GPUs (here devices that only look like GPUs)."""
    shown = cluster.run_on(
        "node1",
        ["srun", "--quiet", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2",
         "sh", "-c", "echo $SLURM_LOCALID $CUDA_VISIBLE_DEVICES"],
        timeout=60,
    )  # fmt: skip
    assert sorted(shown.output.split("\n")) == ["", "0 0,1", "0 0,1", "1 0,1", "1 0,1"]
    one_each = cluster.run_on(
        "node1",
        ["srun", "--quiet", "-N1", "-n2", "--gpus-per-task=1", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES"],
        timeout=60,
    )
    assert sorted(one_each.output.split()) in (["0", "1"], ["0", "0"]), one_each.output


@pytest.mark.turn(1)
def test_ranks_that_would_each_be_alone_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    """Catches srun without MPI's wiring under Horovod, and WORLD_SIZE=1 left over in the shell: N jobs of one rank."""
    job = [str(REPOSITORY / "tests/support/engine_job.py"), "horovod", str(tmp_path / "w.pt"), "1", "0"]
    alone = cluster.run_on("node1", ["srun", "--mpi=none", "-N2", "-n2", "python", *job], timeout=120)
    assert alone.code != 0
    assert "announced 2 ranks but Horovod came up with 1" in alone.output
    left_over = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    job[1] = "deepspeed"
    alone = cluster.run_on(
        "node1", ["srun", "--mpi=none", "-N2", "-n2", "python", *job], timeout=120, environment=left_over
    )
    assert alone.code != 0
    assert "2 jobs of one rank" in alone.output
    assert not (tmp_path / "w.pt").exists()


@pytest.mark.turn(1)
def test_the_training_program_goes_on_when_submitted_again(cluster: Cluster, tmp_path: Path) -> None:
    """Catches a recipe that works under the deepspeed launcher only, and a second submission that starts anew."""
    outputs = []
    for epochs in (1, 2):
        program = small_training(tmp_path, epochs)
        submitted = start(cluster, "slurm", *NODES, program=program, directory=tmp_path).wait(240)
        outputs.append(wait_for_batch_job(cluster, submitted, tmp_path))
        assert outputs[-1].code == 0, outputs[-1].output[-5000:]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records if record["kind"] == "epoch"] == [1, 2]
    assert "resuming from" not in outputs[0].output
    assert ": 3 updates, 36 training images in 1 whole epochs" in outputs[1].output.replace("\n", " ")


@pytest.mark.turn(0)
def test_the_training_program_saves_is_requeued_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    """Catches a signal that arsg-imagenet does not get through srun, and an exit code that does not requeue."""
    epochs = 40
    program = small_training(tmp_path, epochs)
    submitted = start(cluster, "slurm", *NODES, program=program, directory=tmp_path).wait(240)
    assert submitted.code == 0, submitted.output
    job = submitted.output.split()[-1]
    log, metrics = tmp_path / f"arsg-{job}.out", tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 180
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        assert time.monotonic() < end, text_of(log)[-5000:] or "the job did not start"
        time.sleep(0.2)
    assert cluster.run_on("node1", ["scancel", "--batch", "--signal=USR1", job], timeout=60).code == 0
    start_now(cluster, job)
    finished = wait_for_batch_job(cluster, submitted, tmp_path)
    assert finished.code == 0, finished.output[-5000:]
    assert "saved: requeueing" in finished.output
    assert "start 2" in finished.output
    assert "resuming from" in finished.output
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [r["epoch"] for r in records if r["kind"] == "epoch"] == list(range(1, epochs + 1))


@pytest.mark.turn(2)
def test_a_cancelled_training_saves_and_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    """Catches loader processes that die of scancel before their rank has saved, and a batch script that takes 75 for a
    reason to requeue a job that its user has cancelled."""
    program = [*small_training(tmp_path, 900), "--data.workers", "1"]
    submitted = start(cluster, "slurm", *NODES, program=program, directory=tmp_path).wait(240)
    assert submitted.code == 0, submitted.output
    job = submitted.output.split()[-1]
    log, run = tmp_path / f"arsg-{job}.out", tmp_path / "run"
    end = time.monotonic() + 180
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 5:
        assert time.monotonic() < end, text_of(log)[-5000:] or "the job did not start"
        time.sleep(0.2)
    assert cluster.run_on("node1", ["scancel", job], timeout=60).code == 0
    end, state = time.monotonic() + 90, dict[str, str]()
    while state.get("JobState") != "CANCELLED" or not (run / MARKER).exists():
        assert time.monotonic() < end, f"{state}\n{text_of(log)[-5000:]}"
        time.sleep(0.5)
        shown = cluster.run_on("node1", ["scontrol", "show", "job", "-o", job], timeout=60).output
        state = dict(pair.partition("=")[::2] for pair in shown.split() if "=" in pair)
    marker = json.loads((run / MARKER).read_text())
    saved = SavedRun(Path(marker["checkpoint"]))
    assert not saved.damage()
    assert saved.progress["position"]["update"] == marker["update"]
    slurm.wait_for_idle(cluster, len(cluster.names))
    shown = cluster.run_on("node1", ["scontrol", "show", "job", "-o", job], timeout=60).output
    assert "JobState=CANCELLED" in shown, text_of(log)[-5000:]
    assert "Restarts=0" in shown


@pytest.mark.turn(2)
def test_a_host_lost_to_mpirun_fails_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """Catches a job that Slurm counts as done because Open MPI 5's mpirun exits with 0 after the loss of a host."""
    nodes = [
        "--nodes",
        "2",
        "--ranks-per-node",
        "1",
        "--engine",
        "horovod",
        "--time",
        "10",
        "--through",
        "mpirun",
    ]
    program = [str(REPOSITORY / "tests/support/endless_job.py"), "horovod", str(tmp_path)]
    submitted = start(
        cluster,
        "slurm",
        *nodes,
        "--sbatch=--no-requeue",
        "--sbatch=--no-kill",
        program=program,
        directory=tmp_path,
    ).wait(120)
    assert submitted.code == 0, submitted.output
    job = submitted.output.split()[-1]
    end = time.monotonic() + 180
    while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()):
        assert time.monotonic() < end, "".join(text_of(path) for path in tmp_path.glob("*.out"))[-5000:]
        time.sleep(0.2)
    shown = cluster.run_on("node1", ["scontrol", "show", "job", "-o", job], timeout=60).output
    held = next(part for part in shown.split() if part.startswith("NodeList=")).partition("=")[2]
    lost = cluster.run_on("node1", ["scontrol", "show", "hostnames", held]).output.split()[-1]
    cluster.cut(lost)
    try:
        finished = wait_for_batch_job(cluster, submitted, tmp_path)
        assert finished.code != 0, finished.output[-5000:]
    finally:
        cluster.run_on("node1", ["scancel", job], timeout=60)
        cluster.join(lost)
        cluster.kill(lost)
        cluster.boot(lost)
        slurm.restore(cluster, lost)
