"""Runs and checkpoints of strangers: nothing outside is written, removed or published, and nothing is executed."""

import ast
import copy
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.checkpoint.convert import to_torch
from arsg_dist.checkpoint.export import export_saved
from arsg_dist.engine import JobError, SingleProcessCommunicator
from arsg_dist.imagenet.cli import compare_command, export_command, train_command
from arsg_dist.imagenet.config import TrainConfig
from arsg_dist.imagenet.output import compare, run_directory
from arsg_dist.imagenet.output.export import write_model_card
from arsg_dist.imagenet.output.run_directory import read_metrics
from arsg_dist.imagenet.output.run_log import RunLog
from arsg_dist.imagenet.output.weights import LAST, WeightFiles
from arsg_dist.imagenet.signals import write_marker
from arsg_dist.imagenet.training.checkpoint import Position
from arsg_dist.imagenet.training.optimization import Schedules
from arsg_dist.imagenet.training.rank_state import add_rank_state, load_rank_state
from tests.checkpoint.runs import engine, saved
from tests.checkpoint.test_commands import command
from tests.imagenet.conftest import digits, recipe, small_tree
from tests.support.hostile import Payload

__all__ = ["digits", "recipe", "small_tree"]

SECRET = "alias ll='ls -l'\n"
STEERING = "\x1b]0;owned\x07\x1b[2J\u202e"
CONFIG: dict[str, Any] = {
    "model": "resnet18",
    "optimizer": {"type": "ARSG", "params": {"lr": 0.001, "mu": 0.1}},
    "data": {"image_size": 32, "augmentation": "none"},
    "engine": "single",
    "world_size": 1,
    "epochs": 2,
    "batch_size": 8,
}
START: dict[str, Any] = {
    "time": "2026-01-01T00:00:00+0000",
    "command": ["arsg-imagenet", "train"],
    "git": {"revision": "0" * 40, "changed": False},
    "packages": {"torch": "2"},
    "device": "x86_64 CPU",
    "hosts": 1,
    "seed": 0,
    "data": "0123456789abcdef",
}
EPOCH: dict[str, Any] = {
    "epoch": 1,
    "train_loss": 1.5,
    "val_loss": 1.25,
    "val_top1": 0.5,
    "val_top5": 1.0,
    "val_images": 10,
    "images_per_second": 100.0,
}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file that no run may touch."""
    path = tmp_path / "home" / ".bashrc"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of a finished epoch, as a training writes them."""
    path = tmp_path_factory.mktemp("finished") / "run"
    log = RunLog(path, CONFIG, resumed_updates=None, environment=START, classes=["a", "b"])
    log.write("epoch", 4, EPOCH)
    log.close()
    about = {"epoch": 1, "weights": "x", "val_top1": 0.5}
    WeightFiles(path, resumed_epoch=0).save(LAST, {"weight": torch.ones(2, 2)}, about)
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def store(directory: Path, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(directory, SingleProcessCommunicator(), keep=keep)


def put_link(path: Path, target: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


# --- What a store removes


def test_a_save_removes_nothing_that_the_store_did_not_make(tmp_path: Path) -> None:
    """Catches a store in a project's directory that removes .git and .env with what a killed job left."""
    mine = [".env", ".best", ".x.partial", ".step-1.partial", ".step-000000001.removed.txt", "step-1"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".git" / "objects").mkdir(parents=True)
    for step in (1, 2, 3):
        store(tmp_path, keep=1).save(step, lambda directory: None, score=float(step))
    assert [path.name for path in store(tmp_path).complete()] == ["step-000000003"]
    assert all((tmp_path / name).read_text() == "mine" for name in mine)
    assert (tmp_path / ".git" / "objects").is_dir()


def test_an_old_checkpoint_with_links_in_it_is_removed_without_what_they_lead_to(
    tmp_path: Path, victim: Path
) -> None:
    """Catches the removal of an old checkpoint that goes through a link, and of a link that a killed job's name has."""
    directory = tmp_path / "checkpoints"
    store(directory, keep=1).save(1, lambda path: None)
    (directory / "step-000000001" / "inner").symlink_to(victim.parent)
    (directory / ".step-000000007.partial").symlink_to(victim.parent)
    store(directory, keep=1).save(2, lambda path: None)
    assert [path.name for path in directory.iterdir()] == ["step-000000002"]
    assert victim.read_text() == SECRET


@pytest.mark.parametrize("what", ["directory", "file"])
def test_something_else_in_the_place_of_the_link_to_the_best_is_kept(what: str, tmp_path: Path) -> None:
    """Catches a directory `best` of the user's that goes when the first checkpoint with a score is saved."""
    best = tmp_path / "best"
    if what == "directory":
        best.mkdir()
        (best / "thesis.tex").touch()
    else:
        best.touch()
    with pytest.raises(JobError, match=r"best is in the place of the link .* move it elsewhere"):
        store(tmp_path).save(1, lambda path: None, score=0.5)
    assert best.exists()
    assert what == "file" or (best / "thesis.tex").exists()
    assert store(tmp_path).complete() == []


def test_a_link_to_the_best_that_leads_elsewhere_is_replaced(tmp_path: Path, victim: Path) -> None:
    """Catches a checkpoint that is written, or renamed, over what a stranger's link `best` leads to."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best").symlink_to(victim.parent)
    store(tmp_path / "checkpoints").save(1, lambda path: None, score=0.5)
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step-000000001"
    assert victim.read_text() == SECRET


@pytest.mark.parametrize("what", ["link", "file"])
def test_what_only_has_a_checkpoints_name_is_refused(what: str, tmp_path: Path, victim: Path) -> None:
    """Catches a link that is resumed from or renamed as if it were a checkpoint."""
    path = tmp_path / "step-000000005"
    if what == "link":
        path.symlink_to(victim.parent)
    else:
        path.touch()
    with pytest.raises(
        ValueError, match=f"step-000000005 is a {what} where a checkpoint's directory belongs"
    ):
        store(tmp_path).latest()
    with pytest.raises(JobError, match="where a checkpoint's directory belongs"):
        store(tmp_path).save(6, lambda directory: None)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("step")] == ["step-000000005"]


SCORES = {
    "list": "[]",
    "text": '"0.9"',
    "boolean": "true",
    "NaN": "NaN",
    "infinite": "1e999",
    "integer beyond floats": "1" + "0" * 400,
    "large": "1" + " " * 5000,
    "empty": "",
}


@pytest.mark.parametrize("content", [*SCORES, "named pipe", "link"])
def test_a_score_is_a_finite_number(content: str, tmp_path: Path, victim: Path) -> None:
    """Catches a traceback, or a wait for ever, over what somebody put into score.json."""
    store(tmp_path).save(1, lambda directory: None, score=0.5)
    score = tmp_path / "step-000000001" / "score.json"
    score.unlink()
    if content == "named pipe":
        os.mkfifo(score)
    elif content == "link":
        victim.write_text("0.9")
        score.symlink_to(victim)
    else:
        score.write_text(SCORES[content])
    with pytest.raises(ValueError, match=r"score\.json.* remove the file"):
        store(tmp_path).check()
    with pytest.raises(JobError, match=r"score\.json"):
        store(tmp_path).save(2, lambda directory: None, score=0.6)
    score.unlink()
    with pytest.raises(JobError, match="the score of a checkpoint is nan"):
        store(tmp_path).save(2, lambda directory: None, score=float("nan"))
    store(tmp_path).save(2, lambda directory: None, score=0.6)
    assert os.readlink(tmp_path / "best") == "step-000000002"


# --- Links in a run


PLACES = [
    "checkpoints",
    "tensorboard",
    "weights",
    "wandb",
    "config.yaml",
    "metrics.jsonl",
    "environment.yaml",
]


def test_a_resume_refuses_a_run_with_links_before_anything_is_touched(
    recipe: list[str], tmp_path: Path, victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches `ln -s .. run/checkpoints` and a resume, which removed the dot files of the directory above."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("{}\n")
    for name in [*PLACES, "checkpoints/step-000000001"]:
        copied = tmp_path / "copy"
        shutil.copytree(path, copied)
        (copied / name).parent.mkdir(exist_ok=True)
        put_link(copied / name, victim if name.endswith(("yaml", "jsonl")) else victim.parent)
        before = sorted(copied.rglob("*"))
        assert train_command([*recipe, "--output", str(copied), "--resume"]) == 2
        said = capsys.readouterr().err
        assert f"{copied / name} is a link" in said, said
        assert "Traceback" not in said
        assert "put the" in said, said
        assert sorted(copied.rglob("*")) == before
        assert [entry.name for entry in victim.parent.iterdir()] == [victim.name]
        assert victim.read_text() == SECRET
        shutil.rmtree(copied)


def test_a_run_that_is_itself_a_link_goes_on(run: Path, tmp_path: Path) -> None:
    """Catches the refusal of runs that people keep on another disk by a link."""
    (tmp_path / "link").symlink_to(run)
    run_directory.check_output(tmp_path / "link", resume=True)
    store(tmp_path / "link" / "checkpoints").save(1, lambda directory: None)
    log = RunLog(tmp_path / "link", CONFIG, resumed_updates=4, environment=START, classes=["a"])
    log.close()
    assert (run / "checkpoints" / "step-000000001").is_dir()
    assert [record["update"] for record in read_metrics(run)] == [4]


LINKED = [
    ".metrics.jsonl.partial",
    ".config.yaml.partial",
    ".environment.yaml.partial",
    ".classes.txt.partial",
    ".requeue.json.partial",
    "classes.txt",
    "learning_curve.png",
    "requeue.json",
    "weights/.last.safetensors.partial",
    "weights/.README.md.partial",
    "weights/README.md",
]


def test_a_resume_writes_through_no_link(run: Path, victim: Path) -> None:
    """Catches files of fixed names that a stranger's run has as links: the next shell ran a line of the metrics."""
    for name in LINKED:
        put_link(run / name, victim)
    log = RunLog(run, {**CONFIG, "epochs": 3}, resumed_updates=4, environment=START, classes=["a", "b"])
    log.write("train", 5, {"loss": 1.0})
    log.close()
    about = {"epoch": 2, "weights": "x", "val_top1": 0.75}
    WeightFiles(run, resumed_epoch=1).save(LAST, {"weight": torch.zeros(2, 2)}, about)
    write_model_card(run)
    write_marker(run, checkpoint=run, update=5, signals=["SIGTERM"])
    assert victim.read_text() == SECRET
    assert [record["update"] for record in read_metrics(run)] == [4, 5]
    for name in ("classes.txt", "learning_curve.png", "requeue.json", "weights/README.md"):
        assert (run / name).is_file()
        assert not (run / name).is_symlink()


def test_nobody_can_put_a_link_at_the_name_of_tensorboards_file(run: Path) -> None:
    """Catches a file name made of time, host and process number only."""
    (events,) = (run / "tensorboard").iterdir()
    assert re.search(r"\.[0-9a-f]{16}$", events.name)


def test_records_are_not_appended_through_a_link(run: Path, victim: Path) -> None:
    """Catches records that reach another file by a link put there while the run trains."""
    log = RunLog(run, CONFIG, resumed_updates=4, environment=START, classes=["a", "b"])
    put_link(run / "metrics.jsonl", victim)
    with pytest.raises(ValueError, match="is a link"):
        log.write("train", 5, {"loss": 1.0})
    assert victim.read_text() == SECRET


def test_partial_files_of_a_kill_go_at_the_next_resume_and_are_never_shown(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches half a file of weights that is offered for export, and files that fill the disk for ever."""
    left = [
        run / f".metrics.{'0' * 16}.partial.jsonl",
        run / "weights" / f".ema.{'1' * 16}.partial.safetensors",
        run / "checkpoints" / ".step-000000001.partial",
    ]
    for path in left[:2]:
        path.touch()
    left[2].mkdir(parents=True)
    assert export_command([str(run), "--output", str(tmp_path / "out"), "--weights", "ema"]) == 2
    assert "it has best, last\n" in capsys.readouterr().err
    RunLog(run, CONFIG, resumed_updates=4, environment=START, classes=["a"]).close()
    WeightFiles(run, resumed_epoch=1)
    store(run / "checkpoints").save(2, lambda directory: None)
    assert not any(map(os.path.lexists, left))


def test_exports_and_conversions_of_a_checkpoint_write_through_no_link(tmp_path: Path, victim: Path) -> None:
    """Catches partial files of fixed names beside the output, and an output that is a link put there before."""
    path = saved(tmp_path / "checkpoints")
    output = tmp_path / "out"
    output.mkdir()
    for name in (".x.safetensors.partial", "x.safetensors", ".x.pt.partial"):
        (output / name).symlink_to(victim)
    (output / "linked.pt").symlink_to(tmp_path / "home" / "new")
    assert command("export", path, output / "x.safetensors") == 0
    assert command("convert", path, output / "x.pt", "--to", "torch") == 0
    assert command("convert", path, output / "linked.pt", "--to", "torch") == 2
    assert not (output / "x.safetensors").is_symlink()
    assert victim.read_text() == SECRET
    assert [entry.name for entry in victim.parent.iterdir()] == [victim.name]


# --- Export of a run


@pytest.mark.parametrize("name", ["classes.txt", "config.yaml", "weights/best.safetensors", "weights"])
def test_nothing_behind_a_link_is_exported(
    name: str, run: Path, victim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches `classes.txt -> ../id_rsa`, which was copied into the folder to be published."""
    target = tmp_path / "elsewhere"
    (shutil.copytree if name == "weights" else shutil.copy)(run / name, target)
    put_link(run / name, target)
    output = tmp_path / "out"
    assert export_command([str(run), "--output", str(output)]) == 2
    assert f"{run / name} is a link" in capsys.readouterr().err
    assert not output.exists()


EVIL_MODELS = [
    'resnet18(); __import__("os").system("true") #',
    "resnet18\nimport os",
    'timm:x"); import os; ("',
    "resnet18`\n```\n# pwned",
    "a.b",
    "",
]


@pytest.mark.parametrize("model", EVIL_MODELS)
def test_a_models_name_is_no_code(
    model: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a name that is pasted into the card's Python block, which a reader runs."""
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model}))
    assert export_command([str(run), "--output", str(tmp_path / "out")]) == 2
    assert "config.yaml names no model" in capsys.readouterr().err


def test_text_of_a_run_is_text_in_its_card(run: Path, tmp_path: Path) -> None:
    """Catches Markdown, HTML and ends of code blocks that a stranger's settings bring into a published card."""
    evil = f"`<script>`\n```\n[x](http://evil) {STEERING}"
    ended = "a\n```\n<script>"  # which YAML writes on lines of their own
    config = {**CONFIG, "model": "timm:vit.x-1", "engine": evil, "note": evil, "other": ended}
    config["optimizer"] = {"type": evil, "params": {}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    start = {**START, "device": evil, "command": [evil], "packages": {evil: evil}, "git": {"revision": evil}}
    (run / "environment.yaml").write_text(yaml.safe_dump([start]))
    assert export_command([str(run), "--output", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\x1b" not in card
    assert "\u202e" not in card
    outside = []
    fence = ""
    for line in card.splitlines():
        if fence:
            fence = "" if line.strip() == fence else fence
        elif ticks := re.match(r"```+", line):
            fence = ticks[0]
        else:
            outside.append(re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "CODE", line))
    assert not fence
    assert not re.search(r"[<>`]|http", "\n".join(outside)), outside
    block = card.split("```python\n")[1].split("\n```")[0]
    tree = ast.parse(block)
    assert ast.unparse(tree).splitlines() == [
        "from safetensors.torch import load_file",
        "import timm",
        "model = timm.create_model('vit.x-1', num_classes=2)",
        "model.load_state_dict(load_file('model.safetensors'))",
    ]


# --- Records, settings and environments of a run


def write_metrics(run: Path, *lines: str | bytes) -> None:
    content = b"".join(line.encode() if isinstance(line, str) else line for line in lines)
    (run / "metrics.jsonl").write_bytes(content)


GOOD = '{"kind": "train", "update": 1, "loss": 0.5}\n'
BAD_RECORDS = {
    "update is text": '{"kind": "train", "update": "x"}\n',
    "update is a boolean": '{"kind": "train", "update": true}\n',
    "negative update": '{"kind": "train", "update": -1}\n',
    "no update": '{"kind": "train"}\n',
    "no kind": '{"update": 1}\n',
    "a list": "[]\n",
    "a number": "3\n",
    "nested": '{"kind": "train", "update": 1, "loss": []}\n',
    "an integer beyond all bounds": '{"kind": "train", "update": 1' + "0" * 30 + "}\n",
    "a key twice": '{"kind": "train", "update": 1, "update": 2}\n',
    "deep": "[" * 5000 + "\n",
    "no UTF-8": b"\xff\n",
    "no JSON": "half a rec\n",
    "an epoch without its numbers": '{"kind": "epoch", "update": 1, "epoch": 1}\n',
    "long": '{"kind": "train", "update": 1, "x": 1' + " " * 70_000 + "}\n",
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_records_that_are_none_are_named(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a traceback, or records silently dropped with all after them."""
    write_metrics(run, GOOD, BAD_RECORDS[name], GOOD)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged.* line 2"):
        list(read_metrics(run))
    assert compare_command([str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "metrics.jsonl is damaged" in said
    with pytest.raises(ValueError, match="line 2"):
        RunLog(run, CONFIG, resumed_updates=4, environment=START, classes=["a"])
    assert (run / "metrics.jsonl").read_bytes().startswith(GOOD.encode())


@pytest.mark.parametrize("last", ['{"kind": "tra', '{"kind": "train", "update": 2', "\0" * 600, b"\xc3"])
def test_a_last_record_cut_off_by_a_crash_is_left_out(last: str | bytes, run: Path) -> None:
    """Catches a run that cannot be resumed after a power failure."""
    write_metrics(run, GOOD, last)
    assert [record["update"] for record in read_metrics(run)] == [1]


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.yaml", "config.yaml"])
@pytest.mark.parametrize("what", ["named pipe", "device", "sparse"])
def test_a_file_without_end_is_refused(
    what: str, name: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a program that waits for ever, or reads until its memory is full."""
    path = run / name
    path.unlink()
    if what == "named pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    assert compare_command([str(run)]) == 2
    assert name in capsys.readouterr().err


def test_documents_of_a_run_are_bounded_and_of_the_right_kind(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches YAML whose aliases take minutes, tags, and tracebacks over values of another kind."""
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
    )
    good = {name: (run / name).read_text() for name in ("config.yaml", "environment.yaml")}
    bad = [
        laughs,
        "!!python/object/apply:os.getcwd []\n",
        "[" * 300 + "]" * 300,
        "3\n",
        "- 3\n",
        "[]: {}\n",
        "model: [1]\n",
        yaml.safe_dump({**CONFIG, "optimizer": 3}),
        yaml.safe_dump({**CONFIG, "epochs": "many"}),
        yaml.safe_dump([{**START, "command": 3}]),
    ]
    for name, content in good.items():
        for text in bad:
            (run / name).write_text(text)
            for ran in (
                lambda: compare_command([str(run)]),
                lambda: export_command([str(run), "--output", str(tmp_path / "out")]),
            ):
                assert ran() == 2, (name, text[:40])
                assert name in capsys.readouterr().err
        (run / name).write_text(content)
    assert not (tmp_path / "out").exists()


def test_a_comparison_shows_no_characters_that_steer_the_terminal(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches escape sequences of a stranger's settings or directory on the terminal, and rows broken by them."""
    other = tmp_path / f"x{STEERING}\n| y $\\frac{{$"
    shutil.copytree(run, other)
    config = {**CONFIG, "model": f"m{STEERING}|\n", "engine": STEERING}
    config["optimizer"] = {"type": STEERING, "params": {"lr": STEERING}}
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    assert compare_command([str(run), str(other), "--output", str(tmp_path / "picture.png")]) == 0
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text), text
    assert len([line for line in shown.out.splitlines() if line.startswith("| ")]) == 3
    (other / "metrics.jsonl").unlink()
    assert compare_command([str(other)]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_start_among_hundreds_leaves_a_file_that_can_be_read(run: Path) -> None:
    """Catches a run started so often that the list of its starts is refused."""
    (run / "environment.yaml").write_text(yaml.safe_dump([START] * 500))
    RunLog(run, CONFIG, resumed_updates=4, environment=START, classes=["a"]).close()
    assert len(run_directory.read_environments(run)) == 201


# --- Manifests


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("checkpoint"))


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Writes a manifest whose digest is right."""
    body = {key: value for key, value in content.items() if key not in ("format", "version", "digest")}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    content["digest"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(content))


def weight(content: dict[str, Any]) -> dict[str, Any]:
    tensor: dict[str, Any] = content["tensors"]["parameter:first.weight"]
    return tensor


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "strides beyond integers": lambda m: weight(m).update(shape=[2**62, 2**62, 0], pieces=[]),
    "many dimensions": lambda m: weight(m).update(shape=[1] * 5000),
    "more elements than a shard has": lambda m: (
        weight(m).update(shape=[2**40], dtype="uint8"),
        weight(m)["pieces"][0].__setitem__(2, 2**40),
    ),
    "negative size": lambda m: weight(m).update(shape=[-3, -3]),
    "size is text": lambda m: weight(m).update(shape=["3", "3"]),
    "size is a boolean": lambda m: weight(m).update(shape=[True, 9]),
    "shape is a number": lambda m: weight(m).update(shape=9),
    "order of other dimensions": lambda m: weight(m).update(order=[0, 2]),
    "a dtype that is none": lambda m: weight(m).update(dtype="object"),
    "a dtype that is a list": lambda m: weight(m).update(dtype=[]),
    "pieces are a number": lambda m: weight(m).update(pieces=3),
    "a piece of three": lambda m: weight(m)["pieces"][0].pop(),
    "a digest of another kind": lambda m: weight(m)["pieces"][0].__setitem__(3, "x" * 64),
    "a shard elsewhere": lambda m: m.update(shards={"../../etc/passwd": 10}),
    "a shard of Arabic digits": lambda m: m.update(shards={"shard-٠٠٠٠٠.safetensors": 10}),
    "infinitely many ranks": lambda m: m.update(world_size=float("inf")),
    "more ranks than shards": lambda m: m.update(world_size=10**9),
    "tied to nothing": lambda m: m["aliases"].update(x="nowhere"),
    "tied over a parameter": lambda m: m["aliases"].update({"first.bias": "first.weight"}),
    "a buffer with a parameter's name": lambda m: m["tensors"].update({"buffer:first.weight": weight(m)}),
    "a group of nothing": lambda m: m["groups"][0]["parameters"].append("nowhere"),
    "a parameter in a group twice": lambda m: m["groups"][0]["parameters"].append("first.weight"),
    "groups are a number": lambda m: m.update(groups=3),
    "a setting is a mapping": lambda m: m["groups"][0]["settings"].update(lr={}),
    "numbers of nothing": lambda m: m["numbers"].update(nowhere={"step": 1}),
    "a number is a list": lambda m: m["numbers"].update({"first.weight": {"step": [1] * 100}}),
    "a number its dtype does not hold": lambda m: m["numbers"].update(
        {"first.weight": {"step": {"value": 2**62, "dtype": "int8"}}}
    ),
    "a number beyond all bounds": lambda m: m["numbers"].update({"first.weight": {"step": 10**400}}),
    "a key without a name": lambda m: m["tensors"].update({"parameter": weight(m)}),
    "the loss scale is a list": lambda m: m.update(loss_scale=[1]),
    "progress is text": lambda m: m.update(progress="x"),
    "packages are a list": lambda m: m.update(packages=[]),
    "a part is missing": lambda m: m.pop("tensors"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_a_clear_error(
    name: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, or memory asked for by what a manifest says."""
    shutil.copytree(checkpoint, tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"
    content = json.loads(path.read_text())
    HOSTILE[name](content)
    write_manifest(path, content)
    assert command("show", path.parent) == 2
    said = capsys.readouterr().err
    assert re.match(rf"error: {re.escape(str(path))} (is damaged|does not describe a checkpoint)", said), said
    assert command("verify", path.parent) == 1


@pytest.mark.parametrize("what", ["named pipe", "link", "sparse", "deep", "directory"])
def test_a_manifest_that_is_no_file_of_its_size_is_refused(
    what: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a command that waits, reads elsewhere or fills the memory."""
    shutil.copytree(checkpoint, tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"
    path.unlink()
    if what == "named pipe":
        os.mkfifo(path)
    elif what == "link":
        path.symlink_to(checkpoint / "manifest.json")
    elif what == "directory":
        path.mkdir()
    elif what == "deep":
        path.write_text("[" * 5000)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    assert command("show", path.parent) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("what", ["named pipe", "link"])
def test_a_shard_that_is_no_file_is_damage(what: str, checkpoint: Path, tmp_path: Path) -> None:
    """Catches weights read through a link, and a wait for somebody to write into a pipe."""
    shutil.copytree(checkpoint, tmp_path / "c")
    shard = tmp_path / "c" / "shard-00000.safetensors"
    shard.unlink()
    if what == "link":
        shard.symlink_to(checkpoint / shard.name)
    else:
        os.mkfifo(shard)
    (damage,) = SavedRun(shard.parent).damage()
    assert str(shard) in damage
    with pytest.raises(JobError, match=shard.name):
        engine(seed=1).load_state(SavedRun(shard.parent))


def test_what_a_checkpoint_says_is_shown_on_lines_of_its_own_without_escapes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches escape sequences from a manifest on the terminal, in what is shown and in messages."""
    shutil.copytree(checkpoint, tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"
    content = json.loads(path.read_text())
    evil = f"{STEERING}\nerror: \ud800"
    content.update(engine=evil, packages={evil: evil}, progress={evil: evil})
    content["groups"][0]["settings"][evil] = evil
    content["tensors"][f"extra:{evil}"] = {"dtype": "float32", "shape": [0], "pieces": []}
    write_manifest(path, content)
    assert command("show", path.parent, "--tensors") == 0
    content["tensors"][f"exp_avg:{evil}"] = {"dtype": "float32", "shape": [0], "pieces": []}
    write_manifest(path, content)
    assert command("show", path.parent) == 2
    shown = capsys.readouterr()
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e\ud800]", shown.out + shown.err)
    assert "\nerror" not in shown.out


SCHEDULES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a method is replaced": lambda s: s["schedule"].update(step="x"),
    "a count is text": lambda s: s["schedule"].update(last_epoch="x"),
    "a rate is a list": lambda s: s["schedule"].update(base_lrs=[[1.0]]),
    "a function": lambda s: s["schedule"].update(lr_lambdas=["os.system"]),
    "nothing of it": lambda s: s["schedule"].clear(),
    "a part too many": lambda s: s.update(more={}),
    "losses of a boost that is not": lambda s: s.update(boost={}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_a_checkpoint_change_numbers_only(name: str) -> None:
    """Catches torch's scheduler taking over whatever attributes a checkpoint says it has."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedules = Schedules(
        TrainConfig(), optimizer, updates_per_epoch=3, communicator=SingleProcessCommunicator()
    )
    optimizer.step()
    schedules.after_update()
    state = json.loads(json.dumps(schedules.state_dict()))
    schedules.load_state_dict(copy.deepcopy(state))
    before = schedules.state_dict()
    SCHEDULES[name](state)
    with pytest.raises(ValueError, match="checkpoint"):
        schedules.load_state_dict(state)
    assert schedules.state_dict() == before
    assert callable(schedules._schedule.step)


@pytest.mark.parametrize("setting", [{"lr": "0.1"}, {"betas": 0.9}, {"eps": [1e-8]}, {"lr": True}])
def test_settings_of_a_checkpoint_are_of_the_optimizers_kinds(
    setting: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    """Catches a learning rate that is a text, found out in the first update."""
    shutil.copytree(checkpoint, tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"
    content = json.loads(path.read_text())
    content["groups"][0]["settings"].update(setting)
    write_manifest(path, content)
    made = engine(seed=1)
    before = made.module.state_dict()["first.bias"].clone()
    with pytest.raises(JobError, match=f"the saved setting '{next(iter(setting))}' of a parameter group is"):
        made.load_state(SavedRun(path.parent))
    assert torch.equal(made.module.state_dict()["first.bias"], before)


def test_a_random_state_of_a_checkpoint_that_is_none_is_a_clear_error(tmp_path: Path) -> None:
    """Catches a RuntimeError of torch, which ends one rank and leaves the others waiting."""
    communicator, made = SingleProcessCommunicator(), engine()
    for what, values in (
        ("torch", torch.zeros(3)),
        ("python", torch.zeros(0, dtype=torch.int64)),
        ("numpy", torch.zeros(5, dtype=torch.int64)),
        ("numpy gauss", torch.zeros(200_000)),
    ):
        state = made.state()
        add_rank_state(state, {}, 0)
        key = f"extra:rank 0, random state of {what}"
        state.pieces = [piece for piece in state.pieces if piece.key != key]
        state.add_whole(key, values)
        path = save_run(store(tmp_path), 1, state, {}, communicator)
        with pytest.raises(ValueError, match="random state of"):
            load_rank_state(SavedRun(path), {}, communicator, seed=0, update=1)


def test_no_command_executes_a_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches show, verify, export or convert that unpickles a file of a checkpoint."""
    marker, output = tmp_path / "executed", tmp_path / "out"
    for name in ("manifest.json", "shard-00000.safetensors"):
        for write in (
            lambda path: path.write_bytes(pickle.dumps(Payload(marker))),
            lambda path: torch.save({"model": Payload(marker)}, path),
        ):
            directory = tmp_path / "c"
            shutil.copytree(checkpoint, directory)
            write(directory / name)
            command("show", directory)
            assert command("verify", directory) == 1
            assert command("export", directory, output) == 2
            assert command("convert", directory, output, "--to", "torch") == 2
            assert command("convert", directory, output) == 2
            shutil.rmtree(directory)
    assert not marker.exists()
    assert not output.exists()
    assert "Traceback" not in capsys.readouterr().err


# --- Random input

HOSTILE_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from([2**62, -1, 0, 10**400, "../../x", STEERING, "nan", [], {}, [[]], [2**62, 2**62, 0]]),
    st.lists(st.integers(-2, 2**63), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)
FUZZ = settings(
    max_examples=max(60, settings.default.max_examples - 100),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def mutate(data: st.DataObject, value: Any) -> None:
    """Replaces, removes or adds something somewhere in a document."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        inner = value[key]
        if isinstance(inner, dict | list) and inner and data.draw(st.integers(0, 4)):
            value = inner
            continue
        action = data.draw(st.integers(0, 5))
        if action == 0:
            del value[key]
        elif action == 1 and isinstance(value, dict):
            value[data.draw(st.text(max_size=6))] = copy.deepcopy(inner)
        else:
            value[key] = data.draw(HOSTILE_VALUES)
        return


@FUZZ
@given(data=st.data())
def test_random_manifests(data: st.DataObject, checkpoint: Path, tmp_path: Path) -> None:
    """Catches a traceback of a manifest whose digest is right, in whatever is done with it, and files outside."""
    directory, output = tmp_path / "c", tmp_path / "out"
    if not directory.exists():
        shutil.copytree(checkpoint, directory)
    content = json.loads((checkpoint / "manifest.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(data, content)
    write_manifest(directory / "manifest.json", content)
    with suppress(ValueError, JobError):
        run = SavedRun(directory)
        if not run.damage():
            command("show", directory, "--tensors")
            export_saved(run, output)
            output.unlink()
            to_torch(run, output)
            output.unlink()
            engine(seed=1).load_state(run)
    output.unlink(missing_ok=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]
    assert len(list(directory.iterdir())) == 2


RECORDS = st.one_of(
    st.binary(max_size=30),
    HOSTILE_VALUES.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["train", "epoch"]) | HOSTILE_VALUES,
            "update": st.integers(0, 9) | HOSTILE_VALUES,
        },
        optional={key: st.just(value) | HOSTILE_VALUES for key, value in (EPOCH | {"seconds": 1.0}).items()},
    ).map(lambda value: json.dumps(value).encode()),
    st.just({"kind": "epoch", "update": 4, "seconds": 1.0} | EPOCH).map(
        lambda value: json.dumps(value).encode()
    ),
)


@FUZZ
@given(lines=st.lists(RECORDS, max_size=4), ended=st.booleans())
def test_random_metrics(
    lines: list[bytes], ended: bool, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback or a broken table over records, and a record read that is none."""
    before = sorted(run.parent.rglob("*"))
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines) + (b"\n" if ended else b""))
    with suppress(ValueError):
        for record in read_metrics(run):
            assert isinstance(record["kind"], str)
            assert 0 <= record["update"] < 2**63
        table = compare.table(compare.read_runs([run]))
        assert len(table.splitlines()) == 3
        assert table.isprintable() or "\n" in table
        compare.warnings(compare.read_runs([run, run]))
    assert sorted(run.parent.rglob("*")) == before


@FUZZ
@given(
    values=st.dictionaries(st.sampled_from(list(Position.__dataclass_fields__)), HOSTILE_VALUES)
    | HOSTILE_VALUES
)
def test_random_positions(values: Any) -> None:
    """Catches a place in the data that is no number, found out when training goes on from it."""
    good = Position(update=3, images=24, num_images=24).as_dict()
    with suppress(ValueError):
        at = Position.from_dict({**good, **values} if isinstance(values, dict) else values)
        assert all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in vars(at).values()
        )
