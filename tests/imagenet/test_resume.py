"""Runs that are killed or told to stop in mid-epoch go on as if nothing had happened."""

import json
import shutil
from collections import Counter
from pathlib import Path
from signal import SIGINT

import pytest
import torch
from safetensors.torch import load_file

from arsg_dist.engine.job import PREEMPTED
from arsg_dist.imagenet.data.shard_writer import shard_command
from arsg_dist.imagenet.models import build_model
from arsg_dist.imagenet.signals import MARKER
from tests.imagenet.test_training import epochs_of, without_speed
from tests.support.compare import assert_same_weights
from tests.support.engines import ENGINES
from tests.support.launchers import Finished, launch

JOB = "tests/imagenet/jobs/imagenet_job.py"
LOADING = {"single": "workers", "ddp": "workers", "horovod": "shards"}
CORE = ("single", "horovod")
MORE = {"fsdp": ("--ema_decay", "0.9")}  # an average that is in shards
# 60 images, 18 per update: the three epochs end with updates 4, 7 and 10, the last of which is not full.
SETTINGS = ["--epochs", "3", "--batch_size", "18", "--checkpoint_every", "2", "--seed", "7"]


class Run:
    """Starts of one run; what the ranks were given lies in `keys`, by start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, recipe: list[str], directory: Path) -> None:
        self.directory, self._recipe, self._monkeypatch = directory, recipe, monkeypatch
        self.keys: list[Path] = []

    def start(
        self, engine: str, *more: str, signal: str = "", ranks: int = 0, real_launcher: str = ""
    ) -> Finished:
        """On warm ranks, or through a real launcher."""
        started = ENGINES[engine]
        keys = self.directory.with_name(f"{self.directory.name}-keys-{len(self.keys)}")
        keys.mkdir()
        self.keys.append(keys)
        self._monkeypatch.setenv("ARSG_TEST_KEYS", str(keys))
        self._monkeypatch.delenv("ARSG_TEST_SIGNAL", raising=False)
        if signal:
            self._monkeypatch.setenv("ARSG_TEST_SIGNAL", signal)
        return launch(
            real_launcher or started.warm,
            ranks or started.ranks,
            JOB,
            *started.options,
            *MORE.get(engine, ()),
            *self._recipe,
            *SETTINGS,
            "--output",
            self.directory,
            *more,
            timeout=300,
        )

    def checkpoints(self) -> list[int]:
        return sorted(
            int(path.name.removeprefix("step-")) for path in (self.directory / "checkpoints").glob("step-*")
        )

    def seen(self, start: int, *, updates: int | None = None) -> Counter[tuple[int, int]]:
        """(epoch, image) → how often it counted in the first updates of a start, over all ranks."""
        return Counter(
            (epoch, image)
            for path in self.keys[start].iterdir()
            for line in path.read_text().splitlines()[:updates]
            for epoch, image, counts, _ in json.loads(line)
            if counts
        )

    def epochs(self) -> list[dict[str, object]]:
        return without_speed(epochs_of(self.directory))

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.directory / "weights" / "last.safetensors")


EVERYTHING = Counter({(epoch, image): 1 for epoch in range(3) for image in range(60)})


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("engine", "loading"),
    [
        pytest.param(
            name, LOADING.get(name, "here"), marks=[] if name in CORE else [pytest.mark.turn(turn % 3)]
        )
        for turn, name in enumerate(ENGINES)
    ],
)
def test_killed_and_stopped_in_mid_epoch_gives_the_bits_of_the_uninterrupted_run(
    engine: str,
    loading: str,
    recipe: list[str],
    small_tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches anything missing in a checkpoint (weights, shards, ranks' own running statistics, schedule, place in the
    data, sums for the epoch's loss), images seen twice or never, also those that loader processes had read ahead, a
    rank that stops alone, and loader processes that die of its signal or outlive it."""
    if loading == "shards":
        assert shard_command([str(small_tree), str(tmp_path / "shards"), "--workers", "1"]) == 0
        recipe = [*recipe, "--data.source", "shards", "--data.root", str(tmp_path / "shards")]
    whole = Run(monkeypatch, recipe, tmp_path / "whole")
    if loading == "workers":  # the run that it is compared with needs none
        recipe = [*recipe, "--data.workers", "2"]
    job = whole.start(engine)
    assert job.code == 0, job.output[-5000:]
    assert whole.seen(0) == EVERYTHING
    assert [record["update"] for record in whole.epochs()] == [4, 7, 10]

    run = Run(monkeypatch, recipe, tmp_path / "run")
    last_rank = ENGINES[engine].ranks - 1
    killed = run.start(engine, signal=f"3 {last_rank} SIGKILL self")
    assert killed.code != 0
    assert run.checkpoints() == [2]

    # DeepSpeed's launcher must hand the exit code on; mpirun is below.
    stopped = run.start(
        engine,
        "--resume",
        signal=f"3 {last_rank} SIGUSR1 self",
        real_launcher="deepspeed" if engine == "deepspeed" else "",
    )
    assert stopped.code == PREEMPTED, stopped.output[-5000:]
    assert stopped.output.count("stopped by SIGUSR1 after 6 updates") == 1, stopped.output[-5000:]
    assert run.checkpoints() == [4, 6]
    marker = json.loads((run.directory / MARKER).read_text())
    assert (marker["exit_code"], marker["update"], marker["signals"]) == (PREEMPTED, 6, ["SIGUSR1"])

    job = run.start(engine, "--resume")
    assert job.code == 0, job.output[-5000:]
    assert not (run.directory / MARKER).exists()
    assert run.seen(0, updates=2) + run.seen(1, updates=4) + run.seen(2) == EVERYTHING
    assert run.epochs() == whole.epochs()
    torch.manual_seed(7)
    start = build_model("resnet20", 3).state_dict()
    assert_same_weights(run.weights(), whole.weights(), started_from=start, relative=0)


@pytest.mark.ranks
@pytest.mark.parametrize("twice", [False, True])
def test_ctrl_c_saves_and_a_second_one_ends_at_once(
    twice: bool, recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a job that cannot be ended from the keyboard while it saves, and one that a first Ctrl-C throws away."""
    run = Run(monkeypatch, recipe, tmp_path / "run")
    job = run.start("single", signal=f"3 0 SIGINT {'self-twice' if twice else 'self'}")
    assert job.code == (128 + SIGINT if twice else PREEMPTED), job.output[-5000:]
    assert run.checkpoints() == ([2] if twice else [2, 4])
    assert (run.directory / MARKER).exists() != twice


@pytest.mark.turn(0)
@pytest.mark.ranks
def test_another_number_of_ranks_goes_on_with_the_same_images(
    recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a place in the data that is counted in batches of a rank, and state that only two ranks can read."""
    run = Run(monkeypatch, recipe, tmp_path / "run")
    assert run.start("horovod", signal="2 0 SIGTERM self", real_launcher="mpirun").code == PREEMPTED
    shutil.copytree(run.directory, tmp_path / "alone")
    job = run.start("horovod", "--resume", ranks=3)
    assert job.code == 0, job.output[-5000:]
    assert "on another number of ranks" in job.output
    assert run.seen(0, updates=3) + run.seen(1) == EVERYTHING
    alone = Run(monkeypatch, recipe, tmp_path / "alone")
    job = alone.start("single", "--resume")
    assert job.code == 0, job.output[-5000:]
    assert run.seen(0, updates=3) + alone.seen(0) == EVERYTHING


def test_a_checkpoint_due_at_the_last_update_asked_for(
    recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches `--max_updates 6 --checkpoint_every 2` that ends inside an epoch and throws updates 5 and 6 away."""
    run = Run(monkeypatch, recipe, tmp_path / "run")
    assert run.start("single", "--max_updates", "6").code == 0
    assert run.checkpoints()[-1] == 6
