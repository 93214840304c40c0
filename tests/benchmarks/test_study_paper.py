"""The convergence study: its runs, its numbers, and the same curve on several ranks."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.study.paper import __main__ as command
from benchmarks.study.paper import distributed
from benchmarks.study.paper.curves import Curve, first_at_or_below, share_of_updates, trailing_means
from benchmarks.study.paper.data import load_images
from benchmarks.study.paper.optimizers import NAMES, build, paper_settings
from benchmarks.study.paper.report import renewed
from benchmarks.study.paper.run import Run, train
from benchmarks.study.paper.study import read_studies
from benchmarks.study.paper.tasks import TASKS, augmented

CPU = torch.device("cpu")


def losses_of(path: Path) -> list[float]:
    _, *records = (json.loads(line) for line in path.read_text().splitlines())
    return [loss for record in records for loss in record["batch_losses"]]


def test_updates_to_reach_a_loss_are_counted_from_the_first_update() -> None:
    """Catches a count that is off by the window, by one, or that takes a single lucky batch for the training loss."""
    losses = [4.0, 2.0, 0.0, 4.0, 1.0, 1.0, 1.0, 1.0]  # two batches an epoch
    assert trailing_means(losses, 2) == [3.0, 1.0, 2.0, 2.5, 1.0, 1.0, 1.0]
    assert first_at_or_below(trailing_means(losses, 2), 1.0, 2) == 3  # batches 2 and 3
    assert first_at_or_below(trailing_means(losses, 2), 3.0, 2) == 2  # not before the end of the first epoch
    assert first_at_or_below(trailing_means(losses, 2), 0.9, 2) is None
    run, epochs = Run("digits_logistic", "ADAM", 0), [{}] * 4
    adam = Curve("ADAM", run, "cpu", epochs, [4.0, 4.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0], False)
    other = Curve("ARSG", run, "cpu", epochs, [4.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], False)
    assert share_of_updates(other, adam) == 4 / 8
    assert share_of_updates(adam, other) == 8 / 8


def test_sgd_has_the_papers_learning_rate() -> None:
    """Catches torch's SGD at the paper's α, which is 1/(1−β) times too large."""
    x = torch.nn.Parameter(torch.zeros(1))
    optimizer = build("SGD", [x], {"lr": 2.0, "beta1": 0.75}, weight_decay=0.0)
    gradients, expected = [1.0, -3.0, 0.5], 0.0
    for step, gradient in enumerate(gradients):
        x.grad = torch.tensor([gradient])
        optimizer.step()
        expected -= 2.0 * 0.25 * sum(0.75 ** (step - k) * gradients[k] for k in range(step + 1))
    assert x.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("column", ["mnist_logistic", "mnist_cnn", "cifar10_fast", "cifar10_fine"])
def test_every_optimizer_takes_its_settings(column: str) -> None:
    """Catches a row of the table that its optimizer does not understand."""
    pytest.importorskip("pytorch_optimizer", reason="RANGER and QHADAM are pytorch_optimizer's")
    for name in NAMES:
        x = torch.nn.Parameter(torch.ones(3))
        optimizer = build(name, [x], paper_settings(column, name), weight_decay=1e-3)
        x.grad = torch.ones(3)
        optimizer.step()
        assert torch.isfinite(x).all(), name
    with pytest.raises(ValueError, match="ADAM has no setting mu"):
        build("ADAM", [x], paper_settings(column, "ADAM") | {"mu": 0.1}, weight_decay=0.0)


def test_crops_are_parts_of_the_image() -> None:
    """Catches crops that mix images or rows, and mirrored ones that are only shifted."""
    images = torch.arange(4 * 2 * 6 * 6).reshape(4, 2, 6, 6)
    crops = augmented(images, 4, torch.Generator().manual_seed(0))
    seen = set()
    for image, crop in zip(images, crops, strict=True):
        parts = {
            (row, column, mirrored): part.flip(-1) if mirrored else part
            for row in range(3)
            for column in range(3)
            for part in [image[:, row : row + 4, column : column + 4]]
            for mirrored in (False, True)
        }
        found = [place for place, part in parts.items() if torch.equal(crop, part)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 1


STUDIES = """
peers:
  kind: table
  task: digits_logistic
  optimizers: [ADAM, ARSG, ARSGB]
  seeds: 2
  theta: true
settings:
  kind: map
  task: digits_logistic
  epochs: 1
  variants:
    ARSG: {optimizer: ARSG, lr: [0.01, 0.1], mu: [0.05, 0.1]}
    ADAM: {optimizer: ADAM, lr: [0.001, 0.01], beta1: [0.9, 0.99]}
sizes:
  kind: batch
  task: digits_logistic
  epochs: 1
  optimizers: [ARSG]
  batch_sizes: [64, 128]
  lr_scaling: [none, linear]
points:
  kind: theta
  task: digits_logistic
  theta: true
  optimizers: [ARSG]
"""


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["convergence", *map(str, arguments)])
    command.main()


def test_a_study_runs_through_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches runs done twice or left out after an interruption, and curves that depend on the runs before them."""
    studies, output, document = tmp_path / "studies.yaml", tmp_path / "curves", tmp_path / "page.md"
    studies.write_text(STUDIES)
    pictures = tmp_path / "images/study-paper"
    document.write_text("before\n<!-- study peers -->\nold\n<!-- end -->\nafter\n")
    call(monkeypatch, studies, "--output", output, "--docs", document)
    curves = {path: path.read_text() for path in output.glob("*.jsonl")}
    # 3 optimizers × 2 seeds, 4 + 4 trials, batch 64 once and 128 in two ways; points is a run of peers
    assert len(curves) == 6 + 8 + 3
    for name in ("peers", "settings", "sizes", "points"):
        for path in (output / f"{name}.md", output / f"{name}.json", pictures / f"{name}.png"):
            assert path.stat().st_size < 150_000
    page = document.read_text()
    assert page.startswith("before\n")
    assert page.endswith("<!-- end -->\nafter\n")
    assert "old" not in page
    assert "| ARSGB | 2 |" in page
    assert {"images/study-paper/peers.png", "curves/peers.json"} <= set(re.findall(r"\]\((.*?)\)", page))

    lost = next(path for path in curves if "-ARSG-1-" in path.name)
    lost.rename(lost.with_suffix(".partial"))  # as if stopped within this run
    capsys.readouterr()
    call(monkeypatch, studies, "--output", output)
    assert capsys.readouterr().out.count(".jsonl") == 1
    kept = {path: text for path, text in curves.items() if path != lost}
    assert {path: path.read_text() for path in kept} == kept
    before = [json.loads(line)["batch_losses"] for line in curves[lost].splitlines()[1:]]
    assert losses_of(lost) == [loss for losses in before for loss in losses]


def test_parts_without_results_stay() -> None:
    """Catches a report of one study that wipes the tables of the others."""
    text = "<!-- study one -->\n1\n<!-- end -->\n<!-- study two -->\n2\n<!-- end -->\n"
    assert renewed(text, {"two": "new\n"}) == (
        "<!-- study one -->\n1\n<!-- end -->\n<!-- study two -->\n\nnew\n\n<!-- end -->\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {kind: table, task: digits_logistic, optimizers: [ADAMW]}", "unknown optimizers"),
        ("a: {kind: table, task: digits, optimizers: [ADAM]}", "task must be one of"),
        ("a: {kind: table, task: digits_logistic, optimizers: [ADAM], seed: 3}", r"unknown keys \['seed'\]"),
        (
            "a: {kind: engines, task: digits_logistic, optimizers: [ARSG], engines: [zero9]}",
            "unknown engines",
        ),
        ("a: {kind: engines, task: digits_logistic, optimizers: [ADAM], engines: [zero2]}", "not ADAM"),
        ("a: {kind: table, task: digits_logistic}", "no runs"),
    ],
)
def test_a_wrong_study_is_refused(text: str, message: str, tmp_path: Path) -> None:
    """Catches settings that are silently ignored."""
    (tmp_path / "studies.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_studies(tmp_path / "studies.yaml")


def test_missing_data_is_named_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a study that finds out after hours that its second data set is not there."""
    (tmp_path / "studies.yaml").write_text(
        "a: {kind: table, task: digits_logistic, optimizers: [ADAM]}\n"
        "b: {kind: table, task: mnist_cnn, optimizers: [ADAM]}\n"
    )
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path / "studies.yaml", "--output", tmp_path / "curves")
    assert "--mnist DIR" in capsys.readouterr().err
    assert not list((tmp_path / "curves").glob("*.jsonl"))


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_studies_in_the_repository_are_readable(name: str) -> None:
    """Catches a study file that no longer fits the program."""
    path = Path(command.__file__).parent / "configs" / f"{name}.yaml"
    for study in read_studies(path):
        names = [member.run.file_name("cpu") for member in study.members]
        assert len(set(names)) == len(names)
        assert all(member.run.optimizer_settings()["lr"] > 0 for member in study.members)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("zero2", marks=pytest.mark.turn(0)),
        pytest.param("horovod-sharded", marks=pytest.mark.turn(2)),
    ],
)
def test_the_curve_of_two_ranks_lies_on_that_of_one_process(engine: str, tmp_path: Path) -> None:
    """Catches ranks that see other images, and losses or gradients that are not those of the whole batch."""
    run = Run("digits_logistic", "ARSGB", seed=1, engine=engine, ranks=2)
    path = tmp_path / "curve.jsonl"
    distributed.start(run, path, None)
    images = load_images(TASKS[run.task].images, None)
    reference = [loss for record in train(run, images, CPU) for loss in record["batch_losses"]]
    assert losses_of(path) == pytest.approx(reference, rel=1e-4, abs=2e-6)  # printed with six digits
    other = Run("digits_logistic", "ARSGB", seed=1, ranks=2, settings={"boost": "none"})
    unboosted = [loss for record in train(other, images, CPU) for loss in record["batch_losses"]]
    assert losses_of(path) != pytest.approx(unboosted, rel=1e-2), "the comparison sees nothing"
