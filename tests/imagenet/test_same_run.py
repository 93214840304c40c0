"""Whether a checkpoint is this run's: every difference is named, and refused or let pass by its own flag."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from arsg_dist.checkpoint import SavedRun
from arsg_dist.engine import JobError
from arsg_dist.imagenet.cli import train_command
from arsg_dist.imagenet.config import DataConfig, OptimizerConfig
from arsg_dist.imagenet.data.decoding import Contents
from arsg_dist.imagenet.data.folder import ImageTree
from arsg_dist.imagenet.output import run_log
from arsg_dist.imagenet.recipe import read_arguments
from arsg_dist.imagenet.training import setup as training
from arsg_dist.imagenet.training.identity import ALLOWED, differences
from tests.imagenet.test_run_by_hand import (
    BETA1,
    BETA2,
    EPS,
    LR,
    MU,
    SIZE,
    ByHand,
    assert_as_by_hand,
    build_model,
    recipe,
    records_of,
    start,
)
from tests.imagenet.test_starting_again import files_of
from tests.support.launchers import launch


@pytest.fixture(scope="module", autouse=True)
def _linear_network() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_model", build_model)
        patch.setattr(run_log, "draw_learning_curve", lambda directory: directory / "none")
        yield


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `tree`, of three classes, and `run`, ended after two updates."""
    root = tmp_path_factory.mktemp("begun")
    for split, images in (("train", 4), ("val", 2)):
        for label in "abc":
            (root / "tree" / split / label).mkdir(parents=True)
            for index in range(images):
                pixels = torch.randint(256, (SIZE, SIZE, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(root / "tree" / split / label / f"{index}.bmp")
    assert start(root / "run", of_tree(root), max_updates=2) == 0
    return root


def of_tree(root: Path, *, data: dict[str, Any] | None = None, **settings: Any) -> Any:
    tree: dict[str, Any] = {
        "root": str(root / "tree"),
        "augmentation": "none",
        "image_size": SIZE,
        "workers": 0,
    }
    return recipe(data=DataConfig(**tree, **(data or {})), **settings)


def optimizer(**params: Any) -> dict[str, Any]:
    return {
        "optimizer": OptimizerConfig(
            params={"lr": LR, "betas": [BETA1, BETA2], "mu": MU, "eps": EPS, **params}
        )
    }


def grown(root: Path) -> None:
    with (root / "tree" / "train" / "b" / "1.bmp").open("ab") as file:
        file.write(b"\0")


def renamed(root: Path) -> None:
    (root / "tree" / "val" / "b" / "1.bmp").rename(root / "tree" / "val" / "b" / "7.bmp")


def gone(root: Path) -> None:
    (root / "tree" / "train" / "b" / "1.bmp").unlink()


def other_classes(root: Path) -> None:
    for split in ("train", "val"):
        (root / "tree" / split / "a").rename(root / "tree" / split / "d")


def more_classes(root: Path) -> None:
    for split in ("train", "val"):
        (root / "tree" / split / "d").mkdir()
        (root / "tree" / split / "a" / "1.bmp").rename(root / "tree" / split / "d" / "1.bmp")


@dataclass(frozen=True)
class Case:
    """A change between two starts: of settings, or of files; what is said, and the kind that lets it pass."""

    says: str
    kind: str = ""
    settings: Any = None
    files: Callable[[Path], None] = lambda root: None


CASES = {
    "seed": Case("made with seed=0, not 1", settings={"seed": 1}),
    "batch size": Case("made with batch_size=4, not 8", settings={"batch_size": 8}),
    "model": Case("made with model=resnet20, not resnet18", settings={"model": "resnet18"}),
    "model's option": Case("zero_init_gamma=false, not true", settings={"zero_init_gamma": True}),
    "smoothing": Case("label_smoothing=0.0, not 0.1", "loss", {"label_smoothing": 0.1}),
    "mixup": Case("data.mixup=0.0, not 0.2", "loss", {"data": {"mixup": 0.2}}),
    "lr": Case("optimizer.params.lr=0.004, not 0.001", "optimizer", optimizer(lr=0.001)),
    "default": Case("weight_decay=0.0, not 0.1", "optimizer", optimizer(weight_decay=0.1)),
    "state": Case("preconditioner=amsgrad, not adam", settings=optimizer(preconditioner="adam")),
    "groups": Case(
        "optimizer.decay_norm_and_bias=true, not false",
        settings={
            "optimizer": OptimizerConfig(params=optimizer()["optimizer"].params, decay_norm_and_bias=False)
        },
    ),
    "precision": Case("precision=fp32, not bf16", "engine_settings", {"precision": "bf16"}),
    "clipping": Case("clip_grad_norm=0.0, not 1.0", "engine_settings", {"clip_grad_norm": 1.0}),
    "grown file": Case("had 12 images of 1224 bytes and has 12 of 1225 now", "data", files=grown),
    "renamed file": Case("the validation split had 6 images of 612 bytes", "data", files=renamed),
    "gone file": Case("the training split had 12 images and has 11 now", files=gone),
    "renamed class": Case("classes.txt has a, the data has d", "classes", files=other_classes),
    "another class": Case("made with num_classes=3, not 4", files=more_classes),
    "average": Case("ema_decay cannot be switched on or off", settings={"ema_decay": 0.0}),
}


CORE = ("seed", "smoothing", "lr", "precision", "grown file", "renamed class", "average")


def copied(begun: Path, to: Path) -> Path:
    shutil.copytree(begun, to / "copy", symlinks=True)
    return to / "copy"


@pytest.mark.parametrize(
    "case",
    [
        # In every run one of each kind, and of what nothing lets pass.
        name if name in CORE else pytest.param(name, marks=pytest.mark.turn(number % 3))
        for number, name in enumerate(CASES)
    ],
)
def test_a_difference_is_named_and_refused_or_let_pass_by_its_flag(
    case: str, begun: Path, tmp_path: Path
) -> None:
    """Catches a run that goes on with another setting or other data as if nothing were, or with a setting that is not
    heeded; a flag that lets more pass than it says; and a refusal that comes when files have been changed."""
    root, change = copied(begun, tmp_path), CASES[case]
    change.files(root)
    config, before = of_tree(root, **(change.settings or {})), files_of(root)
    others = frozenset(ALLOWED) - {change.kind}
    for resume in (True, "auto"):
        with pytest.raises(JobError) as error:
            start(root / "run", config, resume=resume, allowed=others)
        lines = str(error.value).removeprefix("--resume: ").splitlines()
        assert [change.says in line for line in lines] == [True], lines
        assert (f"--allow_other_{change.kind}" in lines[0]) == bool(change.kind)
        assert files_of(root) == before
    if not change.kind:
        return
    assert start(root / "run", config, resume=True, allowed=frozenset([change.kind]), max_updates=4) == 0
    assert [record["update"] for record in records_of(root / "run") if record["kind"] == "train"][-1] == 4
    # From the next checkpoint on it is the run's own.
    assert start(root / "run", config, resume=True, max_updates=5) == 0


def test_every_difference_is_named_at_once(begun: Path, tmp_path: Path) -> None:
    """Catches a user who is told of one after the other, and a flag that lets all of them pass."""
    root = copied(begun, tmp_path)
    grown(root)
    config = of_tree(root, label_smoothing=0.1, **optimizer(lr=0.001, weight_decay=0.1))
    with pytest.raises(JobError) as error:
        start(root / "run", config, resume=True)
    named = [line.rpartition(" by --allow_other_")[2] for line in str(error.value).splitlines()]
    assert sorted(named) == ["data", "loss", "optimizer", "optimizer"]
    with pytest.raises(JobError) as error:
        start(root / "run", config, resume=True, allowed=frozenset(["data", "optimizer"]))
    assert "label_smoothing" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_only_says_how_to_compute_may_change(begun: Path, tmp_path: Path) -> None:
    """Catches a refusal of more workers, other records, micro-batches, a longer run or a tree at another place."""
    root = copied(begun, tmp_path)
    (root / "tree").rename(root / "moved")
    (root / "tree").symlink_to(root / "moved")
    config = of_tree(
        root,
        epochs=4,
        log_every=1,
        accumulation_steps=1,
        keep_checkpoints=3,
        **optimizer(fused=False, foreach=False),
    )
    assert start(root / "run", config, resume=True, max_updates=3) == 0


def test_a_changed_learning_rate_and_mu_take_effect(tmp_path: Path) -> None:
    """Catches settings that are let pass and not heeded: the checkpoint's, and the schedule's base, would win."""
    assert start(tmp_path / "run", recipe(), max_updates=4) == 0
    half = recipe(**optimizer(lr=LR / 2, mu=MU / 2))
    assert start(tmp_path / "run", half, resume=True, allowed=frozenset(["optimizer"])) == 0
    assert_as_by_hand(tmp_path / "run", ByHand(recipe()).run(stopped_after=4, factor=0.5))


def test_other_settings_reach_every_group_that_has_none_of_its_own(tmp_path: Path) -> None:
    """Catches a weight decay that a resume gives to norms and biases too."""
    split = {"decay_norm_and_bias": False}
    params = {**optimizer()["optimizer"].params, "weight_decay": 0.1}
    config = recipe(optimizer=OptimizerConfig(params=params, **split))
    assert start(tmp_path / "run", config, max_updates=1) == 0
    changed = recipe(
        optimizer=OptimizerConfig(params={**params, "weight_decay": 0.2, "betas": [0.8, 0.9]}, **split)
    )
    assert start(tmp_path / "run", changed, resume=True, allowed=frozenset(["optimizer"]), max_updates=2) == 0
    saved = SavedRun(tmp_path / "run" / "checkpoints" / "step-000000002")
    assert [(group["weight_decay"], list(group["betas"])) for group in saved.groups] == [
        (0.2, [0.8, 0.9]),
        (0.0, [0.8, 0.9]),
    ]


def test_the_sum_of_a_splits_files_does_not_depend_on_who_adds_them(begun: Path, tmp_path: Path) -> None:
    """Catches a fingerprint that changes with the number of ranks or the place of the tree, or not with a file."""
    tree = begun / "tree" / "train"
    whole = ImageTree(tree).contents(0, 1)
    assert (whole.images, whole.size) == (12, 12 * 102)
    assert sum((ImageTree(tree).contents(rank, 5) for rank in range(5)), Contents()) == whole
    root = copied(begun, tmp_path)
    assert ImageTree(root / "tree" / "train").contents(0, 1) == whole
    one, other = root / "tree" / "train" / "a" / "0.bmp", root / "tree" / "train" / "b" / "0.bmp"
    one.rename(other.with_name("9.bmp"))
    other.rename(one)
    assert ImageTree(root / "tree" / "train").contents(0, 1).digest != whole.digest


def test_settings_of_deepspeed_that_change_numbers_are_compared(tmp_path: Path) -> None:
    """Catches bf16 switched on in the JSON between two starts, where the recipe says nothing of precision."""
    from arsg_dist.deepspeed.build import DeepSpeedBuilder

    path = tmp_path / "ds.json"
    records = []
    for text in ("{}", '{"bf16": {"enabled": true}, "prescale_gradients": true}'):
        path.write_text(text)
        settings: Any = SimpleNamespace(
            config_file=str(path), batch_size=4, accumulation_steps=1, clip_grad_norm=0.0, precision="auto",
            optimizer_type="ARSG", optimizer_params={"lr": 0.1},
        )  # fmt: skip
        records.append(DeepSpeedBuilder(settings, 1).numeric_settings())
    found = differences(*records)
    assert [(one.key, one.kind) for one in found] == [
        ("precision", "engine_settings"),
        ("deepspeed.prescale_gradients", "engine_settings"),
    ]
    assert "precision=fp32, not bf16" in found[0].text
    assert differences({"precision": "fp32"}, records[0]) == []  # another engine's


def test_flags_say_how_to_start(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Catches `--resume` that takes the next flag for its value, and a recipe of before that says `resume: false`."""
    given = [
        read_arguments([*flags, "--epochs", "3"]).resume for flags in ([], ["--resume"], ["--resume", "auto"])
    ]
    assert given == [False, True, "auto"]
    (tmp_path / "old.yaml").write_text("resume: false\nepochs: 2\n")
    assert read_arguments(["--config", str(tmp_path / "old.yaml")]).epochs == 2
    assert train_command(["--resume", "sometimes"]) == 2
    assert "resume must be one of false, true, auto, not 'sometimes'" in capsys.readouterr().err
    assert train_command(["--resume", "--data.source", "synthetic"]) == 2
    assert "--resume needs --output" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["imagenet_arsg", "cifar10"])
def test_a_recipe_for_a_tree_does_not_train_on_digits(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches hours of an ImageNet recipe on 1,442 handwritten digits, for want of one flag."""
    assert train_command(["--config", f"configs/{name}.yaml", "--output", str(tmp_path / "run")]) == 2
    assert "data.root is missing: give --data.root DIR" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert read_arguments(["--config", "configs/digits.yaml"]).data.root is None


@pytest.mark.ranks
def test_two_ranks_refuse_another_run_once_and_touch_nothing(recipe: list[str], tmp_path: Path) -> None:
    """Catches a rank that goes on alone, or a message of each."""
    job = ["warm horovodrun", 2, "tests/imagenet/jobs/imagenet_job.py", "--engine", "horovod", *recipe]
    assert launch(*job, "--max_updates", "1", variables={"ARSG_TEST_SMALL_NETWORK": "1"}).code == 0
    before = files_of(tmp_path / "run")
    other = launch(
        *(*job, "--resume", "auto", "--clip_grad_norm", "1"), variables={"ARSG_TEST_SMALL_NETWORK": "1"}
    )
    assert other.code == 2, other.output
    assert other.output.count("made with clip_grad_norm=0.0, not 1.0") == 1
    assert files_of(tmp_path / "run") == before
