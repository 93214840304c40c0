"""Bad input gives one clear message on rank 0 and an exit code, without a hang, a traceback or a written file."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from arsg_dist.engine.job import BAD_INPUT
from arsg_dist.imagenet.cli import main, train_command
from arsg_dist.imagenet.output.run_directory import LOCK
from arsg_dist.safe_io.lock import DirectoryLock
from tests.imagenet.test_training import ENGINES, SCRIPT, epochs_of, start
from tests.support import engines
from tests.support.launchers import launch


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["-h"], 0), (["--local_rank=1", "-h"], 0), ([], BAD_INPUT), (["trian"], BAD_INPUT)],
)
def test_the_command_says_what_it_can_do(
    arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches --help that ends as a mistake does, and a mistyped command that ends as if it had run."""
    monkeypatch.setattr(sys, "argv", ["arsg-imagenet", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code
    shown = capsys.readouterr()
    assert "arsg-imagenet {train,recipes,evaluate,compare,export,shard}" in (shown.err if code else shown.out)


def corrupt(tree: Path) -> Path:
    path = sorted((tree / "train" / "3").iterdir())[4]
    path.write_bytes(path.read_bytes()[:150])
    return path


CASES: dict[str, tuple[list[str], str]] = {
    "missing data": (
        ["--data.root", "/does/not/exist"],
        "data directory /does/not/exist/train does not exist",
    ),
    "missing split": (["--data.val_split", "test"], "has train, val"),
    "batch does not divide": (["--batch_size", "10", "--accumulation_steps", "4"], "use 8 or 12"),
    "batch larger than data": (["--batch_size", "120"], "larger than the training split of 60 images"),
    "unknown optimizer key": (
        ["--optimizer.params", "{lr: 0.1, momentum: 0.9}"],
        "ARSG has no parameter momentum",
    ),
    "nothing inside": (
        ["--optimizer.type", "RemoteObservation", "--optimizer.params", "{lr: 0.1}"],
        "name it by optimizer.params.inner",
    ),
    "wrapped twice": (
        ["--optimizer.type", "RemoteObservation", "--optimizer.params", "{inner: RemoteObservation}"],
        "goes around another optimizer, once",
    ),
    "wrapper's setting without its prefix": (
        ["--optimizer.type", "RemoteObservation", "--optimizer.params", "{inner: AdamW, mu: 0.1}"],
        "RemoteObservation around AdamW has no parameter mu",
    ),
    "remote mu too small": (
        ["--optimizer.type", "RemoteObservation", "--optimizer.params", "{inner: SGD, remote_mu: 0.0001}"],
        "mu = 0.0001 needs beta1 of at least 0.9999",
    ),
    "an inner optimizer that wants a closure": (
        ["--optimizer.type", "RemoteObservation", "--optimizer.params", "{inner: LBFGS}"],
        "LBFGS calls a closure several times",
    ),
    "theta of a baseline": (
        ["--optimizer.type", "SGD", "--evaluate_at", "theta"],
        "for the optimizers ARSG and",
    ),
    "mu out of range": (["--optimizer.params", "{mu: 1.0}"], "mu"),
    "unknown optimizer": (["--optimizer.type", "Shampoo2"], "'Shampoo2' is not known"),
    "unknown key": (["--learning_rate", "0.1"], "learning_rate"),
    "unknown model": (["--model", "resnet19"], "model 'resnet19' is not known"),
    "wrong type": (["--epochs", "many"], "epochs"),
    "nonsense value": (["--epochs", "0"], "epochs must be at least 1, not 0"),
    "late milestone": (
        ["--schedule.name", "step", "--schedule.milestones", "[9]"],
        "must lie before the end",
    ),
    "nothing to resume": (["--resume"], "holds no run"),
    "unknown engine": (["--engine", "megatron"], "megatron is not known"),
    "deepspeed without config": (["--engine", "deepspeed"], "needs --deepspeed_config"),
    "deepspeed without launcher": (["--deepspeed_config", "configs/deepspeed/zero1.json"], "not started by"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_alone(
    case: str, recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches input that is ignored, or answered by a traceback."""
    arguments, message = CASES[case]
    assert train_command([*recipe, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_directory_with_another_run_is_left_alone(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a second run written over the first, or into a directory that is not a run's."""
    assert train_command([*recipe, "--epochs", "1"]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert train_command([*recipe, "--epochs", "1"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    assert train_command([*recipe, "--output", str(other)]) == 2
    assert "thesis.tex" in capsys.readouterr().err


def test_a_split_as_the_root_is_guessed(
    recipe: list[str], small_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an answer that lists a thousand classes to someone who named one directory too many."""
    assert train_command([*recipe, "--data.root", str(small_tree / "train")]) == 2
    assert f"did you mean data.root {small_tree}, which has train?" in capsys.readouterr().err


def test_renamed_classes_are_refused_at_a_resume(
    recipe: list[str], small_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches labels that are shifted without a word, and a list of classes that is written over."""
    assert train_command([*recipe, "--epochs", "1"]) == 0
    for split in ("train", "val"):
        (small_tree / split / "0").rename(small_tree / split / "zero")
    capsys.readouterr()
    assert train_command([*recipe, "--epochs", "2", "--resume"]) == 2
    error = capsys.readouterr().err
    assert "classes.txt has 0, the data has zero" in error
    assert (tmp_path / "run" / "classes.txt").read_text().split() == ["0", "3", "6"]


def test_what_a_start_says_of_a_finished_run_and_of_its_outputs_is_true(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches "epochs 2 to 1", and directories named that are not there."""
    assert train_command([*recipe, "--epochs", "1", "--max_updates", "2"]) == 0
    named = capsys.readouterr().out.split("outputs in ")[1].splitlines()[0].split(": ")[1].split(", ")
    assert {"metrics.jsonl"} <= set(named)
    assert all((tmp_path / "run" / name).exists() for name in named), named
    assert "weights/" not in named
    assert train_command([*recipe, "--epochs", "1", "--output", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    assert train_command([*recipe, "--epochs", "1", "--output", str(tmp_path / "whole"), "--resume"]) == 0
    assert "all 1 epochs done" in capsys.readouterr().out


def test_corrupt_images_are_left_out_and_counted_when_asked(
    recipe: list[str], small_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches skipped images that go unmentioned, or still count in the accuracy; a pipe that is waited for; and a
    hidden directory that becomes a class."""
    broken = corrupt(small_tree)
    os.mkfifo(small_tree / "train" / "6" / "pipe.jpg")
    for split in ("train", "val"):
        shutil.copytree(small_tree / split / "3", small_tree / split / ".ipynb_checkpoints")
    (small_tree / "val" / "0" / "extra.jpg").write_bytes(b"no image")
    assert train_command([*recipe, "--data.on_bad_image", "skip"]) == 0
    output = capsys.readouterr().out
    assert str(broken) in output
    assert "extra.jpg" in output
    assert "pipe.jpg: is not a regular file" in output
    assert "left out 6 images" in output  # three files, two epochs
    assert output.count(f"no classes: {small_tree / 'train'} has .ipynb_checkpoints") == 1
    assert (tmp_path / "run" / "classes.txt").read_text() == "0\n3\n6\n"
    assert all(record["val_images"] == 21 for record in epochs_of(tmp_path / "run"))


def bad_tree(recipe: list[str], tree: Path) -> tuple[list[str], str]:
    return recipe, f"cannot decode image {corrupt(tree)}"


def missing_data(recipe: list[str], tree: Path) -> tuple[list[str], str]:
    return [
        *recipe,
        "--data.root",
        str(tree / "gone"),
    ], f"data directory {tree / 'gone' / 'train'} does not exist"


def uneven_batch(recipe: list[str], tree: Path) -> tuple[list[str], str]:
    return [*recipe, "--batch_size", "13"], "batch_size=13 does not divide into 2 ranks"


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("engine", "fault"),
    [
        *((engine, bad_tree) for engine in ENGINES),  # seen by one rank, in mid-training
        # By every rank, before it begins: the same way on all engines.
        ("deepspeed", missing_data),
        ("horovod", uneven_batch),
    ],
)
def test_bad_input_on_two_ranks(
    engine: str,
    fault: Callable[[list[str], Path], tuple[list[str], str]],
    recipe: list[str],
    small_tree: Path,
    tmp_path: Path,
) -> None:
    """Catches the hang of one rank waiting for another that stopped, and messages lost or repeated by ranks."""
    arguments, message = fault(recipe, small_tree)
    job = start(engine, *arguments)
    assert job.code != 0
    assert job.output.count(f"error: {message}") == 1, job.output[-5000:]
    assert "Traceback" not in job.output
    assert not list(tmp_path.glob("run/checkpoints/step-*"))


@pytest.mark.ranks
@pytest.mark.parametrize(
    "engine",
    [pytest.param(name, marks=pytest.mark.turn(turn)) for turn, name in enumerate(ENGINES)],
)
def test_a_directory_in_use_is_refused_on_two_ranks(engine: str, recipe: list[str], tmp_path: Path) -> None:
    """Catches ranks that begin while rank 0 waits for the one who has the directory, or hang when it gives up."""
    holder = DirectoryLock(tmp_path / "run", LOCK)
    assert holder.take()
    before = (tmp_path / "run" / LOCK).read_bytes()
    job = start(engine, *recipe)
    assert job.code == 2, job.output[-5000:]
    assert job.output.count(f"error: {tmp_path / 'run'} is in use by process {os.getpid()} on") == 1
    assert "Traceback" not in job.output
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == {LOCK: before}
    holder.close()


@pytest.mark.ranks
@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=pytest.mark.turn(turn)) for turn, name in enumerate(ENGINES, 1)]
)
def test_a_full_disk_while_checkpointing_leaves_the_checkpoint_before(
    engine: str, recipe: list[str], tmp_path: Path
) -> None:
    """Catches ranks that wait for one that failed to write, half a checkpoint that a resume takes, and an old one that
    is removed before the new one is in place."""
    started = engines.ENGINES[engine]
    checkpoints = tmp_path / "run" / "checkpoints"
    command = [
        started.warm,
        2,
        SCRIPT,
        *started.options,
        *recipe,
        "--checkpoint_every",
        "2",
        "--keep_checkpoints",
        "1",
    ]
    assert launch(*command, "--max_updates", "2").code == 0
    before = contents(checkpoints)
    assert {name.split("/")[0] for name in before} == {"step-000000002"}
    job = launch(*command, "--resume", timeout=90, largest_file=500_000)
    assert job.code != 0
    assert f"cannot write the checkpoint {checkpoints}" in job.output, job.output[-5000:]
    assert "Traceback" not in job.output
    after = contents(checkpoints)
    assert {name: content for name, content in after.items() if name.startswith("step-")} == before
    job = launch(*command, "--resume")
    assert job.code == 0, job.output[-5000:]
    assert "2 updates" in next(line for line in job.output.splitlines() if "resuming from" in line)
    assert "validation accuracy" in job.output


def contents(directory: Path) -> dict[str, bytes]:
    """Path → content of every file; those behind the link `best` once."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and "best" not in path.parts
    }


@pytest.mark.ranks
def test_a_full_disk_while_weights_are_written_is_said(recipe: list[str], tmp_path: Path) -> None:
    """Catches a traceback instead of the file's name, and half a file under the name of a whole one."""
    job = launch("warm alone", 1, SCRIPT, *recipe, timeout=90, largest_file=500_000)
    assert job.code == 2, job.output[-5000:]
    assert f"cannot write {tmp_path / 'run' / 'weights'}" in job.output
    assert "Traceback" not in job.output
    assert not list(tmp_path.glob("run/weights/*.safetensors"))


@pytest.mark.ranks
def test_ranks_without_an_engine_are_refused(recipe: list[str]) -> None:
    """Catches a job that silently comes up as two jobs of one rank."""
    job = launch("warm horovodrun", 2, SCRIPT, *recipe)
    assert job.code != 0
    assert "started 2 ranks but no engine was chosen" in job.output


@pytest.mark.ranks
def test_contradicting_deepspeed_config_is_refused(recipe: list[str], tmp_path: Path) -> None:
    """Catches a learning rate in the JSON that the recipe silently overrules, or the other way round."""
    path = tmp_path / "ds.json"
    path.write_text(
        '{"optimizer": {"type": "ARSG", "params": {"lr": 0.5}}, "zero_optimization": {"stage": 1}}'
    )
    job = launch("warm deepspeed", 2, SCRIPT, "--deepspeed_config", path, *recipe)
    assert job.code != 0
    assert "optimizer.params.lr = 0.5 but this run uses 0.01" in job.output
