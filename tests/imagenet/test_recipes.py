"""Every file under configs/ trains as it stands, and says what its source says."""

import itertools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.deepspeed.build import settle_precision
from arsg_dist.engine import SingleProcessCommunicator, SingleProcessEngine, discover_ranks
from arsg_dist.imagenet.cli import train_command
from arsg_dist.imagenet.config import (
    BoostConfig,
    DataConfig,
    OptimizerConfig,
    ProgressiveConfig,
    ScheduleConfig,
    TrainConfig,
)
from arsg_dist.imagenet.data.transforms import train_size
from arsg_dist.imagenet.models import build_model
from arsg_dist.imagenet.training.engines import build_engine, prepare
from arsg_dist.imagenet.training.optimization import Schedules, build_optimizer, lr_factor, parameter_groups
from arsg_dist.theory import boost_ratio
from tests.imagenet.test_training import ENGINES, start
from tests.support.launchers import REPOSITORY

RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.fixture(scope="session")
def fake_trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two classes of tiny images in random colours, as ImageNet (train, val) and CIFAR-10 (train, test) trees."""
    root = tmp_path_factory.mktemp("fake")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder = root / "imagenet" / split / label
            folder.mkdir(parents=True)
            for index in range(4 if split == "train" else 1):
                pixels = torch.randint(256, (40, 48, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{index}.jpg")
    (root / "cifar").mkdir()
    (root / "cifar" / "train").symlink_to(root / "imagenet" / "train")
    (root / "cifar" / "test").symlink_to(root / "imagenet" / "val")
    return {"imagenet": root / "imagenet", "cifar": root / "cifar"}


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(
            path,
            id=path.stem,
            marks=[]
            if path.stem in ("digits", "cifar10", "imagenet_arsg")
            else [pytest.mark.turn(number % 3)],
        )
        for number, path in enumerate(RECIPES)
    ],
)
def test_every_recipe_makes_two_updates(recipe: Path, fake_trees: dict[str, Path], tmp_path: Path) -> None:
    """Catches a recipe with a key or value that no longer exists, and settings that fail once training begins."""
    tree = fake_trees["cifar" if recipe.stem.startswith("cifar") else "imagenet"]
    small = ["--data.image_size", "32", "--data.workers", "0", "--batch_size", "4", "--precision", "fp32"]
    if recipe.stem == "imagenet_short":
        small += ["--data.train_image_size", "32", "--data.progressive.start_size", "24"]
    described = yaml.safe_load(recipe.read_text())
    with torch.device("meta"):  # must be known; trained is a small one, but once
        build_model(described["model"], 2, zero_init_gamma=described.get("zero_init_gamma", False))
    if recipe.stem != "imagenet_large_batch":
        small += ["--model", "resnet20"]
    arguments = ["--config", str(recipe), "--data.root", str(tree), "--output", str(tmp_path / "run")]
    assert train_command([*arguments, *small, "--max_updates", "2", "--log_every", "1"]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == 2
    assert all(torch.isfinite(torch.tensor(losses)))
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["optimizer"]["params"] == described["optimizer"]["params"]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "engine"),
    [
        pytest.param(name, engine, marks=pytest.mark.turn(number % 3))
        for number, (name, engine) in enumerate(
            itertools.product(
                ["cifar10_arsgb", "cifar10_sgd", "cifar10_adam", "cifar10_fine_arsgb", "imagenet_short"],
                ENGINES,
            )
        )
    ],
)
def test_recipes_make_two_updates_on_two_ranks(
    name: str, engine: str, fake_trees: dict[str, Path], tmp_path: Path
) -> None:
    """Catches a recipe that one process can train and an engine refuses: its μ, ε, boost, groups, EMA, schedule."""
    tree = fake_trees["cifar" if name.startswith("cifar") else "imagenet"]
    small = ["--data.image_size", 32, "--data.workers", 0, "--batch_size", 4, "--precision", "fp32"]
    if name == "imagenet_short":
        small += ["--data.train_image_size", 32, "--data.progressive.start_size", 24, "--model", "resnet20"]
    job = start(
        engine,
        *("--config", f"configs/{name}.yaml", "--data.root", tree, "--output", tmp_path / "run"),
        *(*small, "--max_updates", 2, "--log_every", 1),
    )
    assert job.code == 0, job.output[-5000:]
    assert "ended after 2 updates" in job.output or "validation accuracy" in job.output


@pytest.mark.parametrize(
    ("name", "lr", "eps"),
    [("cifar10", 0.002, 1e-8), ("cifar10_fine", 0.05, 1e-3), ("cifar10_fine_arsgb", 0.05, 1e-3)],
)
def test_the_papers_protocol_on_cifar10(name: str, lr: float, eps: float) -> None:
    """Catches fast and fine mode mixed up, and another length or decay than iteration 12,000 of 80 epochs of 256."""
    config = recipe_of(name)
    assert (config.batch_size, config.epochs) == (256, 80)
    assert (config.optimizer.params["lr"], config.optimizer.params["eps"]) == (lr, eps)
    updates = 50_000 / 256
    factors = [lr_factor(config, updates, update) for update in range(int(80 * updates))]
    assert factors.index(min(factors)) == pytest.approx(12_000, rel=0.01)


def recipe_of(name: str) -> TrainConfig:
    described = yaml.safe_load((REPOSITORY / "configs" / f"{name}.yaml").read_text())
    sections = {
        "data": DataConfig,
        "optimizer": OptimizerConfig,
        "schedule": ScheduleConfig,
        "boost": BoostConfig,
    }
    if progressive := described["data"].get("progressive"):
        described["data"]["progressive"] = ProgressiveConfig(**progressive)
    return TrainConfig(
        **{key: sections[key](**value) if key in sections else value for key, value in described.items()}
    )


@pytest.mark.parametrize(
    ("name", "lr"), [("imagenet_arsg", 0.02), ("imagenet_sgd", 0.1), ("imagenet_adam", 2e-4)]
)
def test_the_papers_protocol_on_imagenet(name: str, lr: float) -> None:
    """Catches a baseline that does not get the same protocol: batch 256, 90 epochs, lr / 10 at epochs 31 and 61."""
    config = recipe_of(name)
    assert (config.batch_size, config.epochs) == (256, 90)
    assert config.optimizer.params["lr"] == lr
    assert config.optimizer.params["weight_decay"] == 1e-4
    factors = [lr_factor(config, 5004, epoch * 5004) for epoch in (0, 29, 30, 59, 60, 89)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_large_batch_warms_up_from_the_unscaled_learning_rate() -> None:
    """Catches linear scaling applied at once, which diverges, or lost after the warm-up."""
    config = recipe_of("imagenet_large_batch")
    updates = 1_281_167 // 8192
    factors = [lr_factor(config, updates, update) for update in range(90 * updates)]
    assert 1 < factors[0] < 1.1
    assert max(factors) == pytest.approx(32, rel=1e-3)
    assert factors.index(max(factors)) == pytest.approx(5 * updates, abs=1)
    assert factors[-1] < 1e-3


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (DataConfig, {"source": "synthetic", "rand_augment": 5}, "rand_augment=5"),
        (DataConfig, {"source": "synthetic", "random_erasing": 0.2}, "random_erasing=0.2"),
        (DataConfig, {"source": "synthetic", "augmentation": "none"}, "augmentation=none"),
        (DataConfig, {"source": "synthetic", "on_bad_image": "skip"}, "on_bad_image=skip"),
        (
            DataConfig,
            {"synthetic_images": 10, "synthetic_classes": 3},
            "synthetic_images=10 (default 12800), data.synthetic_",
        ),
        (DataConfig, {"crop_size": 20}, "crop_size=20"),
        (
            ProgressiveConfig,
            {"start_epoch": 2},
            "start_epoch=2 (default 0) has no meaning but with start_size",
        ),
        (ProgressiveConfig, {"end_epoch": 2}, "end_epoch=2"),
        (ProgressiveConfig, {"multiple": 16}, "multiple=16"),
        (ScheduleConfig, {"name": "step"}, "needs schedule.milestones"),
        (ScheduleConfig, {"name": "cosine", "gamma": 0.2}, "gamma=0.2"),
        (ScheduleConfig, {"name": "cosine", "milestones": [3]}, "milestones are for the schedule 'step'"),
        (BoostConfig, {"factor": 3.0}, "factor=3.0"),
        (BoostConfig, {"max_boosts": 2, "patience": 1}, "max_boosts=2 (default 1), boost.patience=1"),
        (
            BoostConfig,
            {"milestones": [3], "threshold": 0.1},
            "threshold=0.1 (default 0.01) has no meaning but with boost.plateau",
        ),
        (TrainConfig, {"max_skipped_updates": 3}, "max_skipped_updates=3"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(make: Any, given: dict[str, Any], message: str) -> None:
    """Catches a setting that does nothing where its writer expects that it does."""
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**given)


def test_settings_that_are_read_are_taken() -> None:
    """Catches a setting refused where it means something, and a default that counts as given."""
    taken: list[tuple[Any, dict[str, Any]]] = [
        (
            DataConfig,
            {"source": "synthetic", "synthetic_images": 10, "synthetic_classes": 3, "rand_augment": 0},
        ),
        (
            DataConfig,
            {
                "augmentation": "crop",
                "crop_size": 20,
                "rand_augment": 5,
                "random_erasing": 0.2,
                "on_bad_image": "skip",
            },
        ),
        (ProgressiveConfig, {"start_size": 64, "start_epoch": 2, "end_epoch": 4, "multiple": 16}),
        (ScheduleConfig, {"name": "step", "milestones": [3], "gamma": 0.2}),
        (ScheduleConfig, {"name": "cosine", "milestones": [], "gamma": 0.1}),
        (BoostConfig, {"milestones": [3], "factor": 3.0, "patience": 2}),
        (BoostConfig, {"plateau": True, "factor": 3.0, "max_boosts": 2, "patience": 1, "threshold": 0.1}),
        (TrainConfig, {"on_nonfinite": "skip", "max_skipped_updates": 3}),
    ]
    for section, settings in taken:
        made = section(**settings)
        assert {name: getattr(made, name) for name in settings} == settings


def test_progressive_sizes_grow_to_the_full_one() -> None:
    """Catches sizes that are no multiple, shrink, or never reach the full size."""
    data = recipe_of("imagenet_short").data
    assert [train_size(data, epoch) for epoch in range(18)] == [128] * 8 + [160] * 4 + [192] * 6
    assert train_size(DataConfig(), 3) == 224


def test_the_boost_doubles_mu_once_and_survives_a_resume() -> None:
    """Catches a schedule that writes the unboosted learning rate back, and a boost that is repeated after a resume."""
    config = recipe_of("cifar10_arsgb")

    def made() -> tuple[Schedules, torch.optim.Optimizer]:
        optimizer = build_optimizer(config.optimizer, [torch.nn.Parameter(torch.zeros(2))])
        schedules = Schedules(
            config, optimizer, updates_per_epoch=1, communicator=SingleProcessCommunicator()
        )
        return schedules, optimizer

    def epochs(
        schedules: Schedules, optimizer: torch.optim.Optimizer, count: int
    ) -> list[tuple[float, float]]:
        seen = []
        for _ in range(count):
            optimizer.step()
            schedules.after_update()
            schedules.after_epoch(1.0)
            seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["mu"]))
        return seen

    whole = epochs(*made(), 80)
    assert {mu for _, mu in whole[:19]} == {0.05}
    assert {mu for _, mu in whole[19:]} == {0.1}
    assert whole[0][0] == 0.005
    assert whole[30][0] == pytest.approx(0.005 * 0.248, rel=2e-3)  # the paper rounds to a quarter
    assert whole[70][0] == pytest.approx(whole[30][0] / 10)
    schedules, optimizer = made()
    first = epochs(schedules, optimizer, 40)
    resumed, other = made()
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedules.state_dict())
    assert first + epochs(resumed, other, 40) == whole


def test_the_boost_waits_for_a_plateau_and_survives_a_resume() -> None:
    """Catches a plateau that is never noticed or noticed too soon, settings that do not arrive, a loss that is not
    finite taken for one, and epochs of waiting that a resume forgets."""
    config = TrainConfig(
        optimizer=OptimizerConfig(params={"lr": 0.01, "mu": 0.05}),
        boost=BoostConfig(plateau=True, factor=3.0, max_boosts=2, patience=1, threshold=0.1),
    )
    # Their average, in which an epoch weighs twice as much as the one before, improves once: from 1 to 5/7. Two epochs
    # in a row without improvement are one more than tolerated.
    losses = [1.0, 1.0, 0.5, 5 / 7, 5 / 7, math.nan, 5 / 7, 5 / 7, 5 / 7, 5 / 7]
    expected = [0.05] * 4 + [0.15] * 3 + [0.45] * 3

    def made() -> tuple[Schedules, torch.optim.Optimizer]:
        optimizer = build_optimizer(config.optimizer, [torch.nn.Parameter(torch.zeros(2))])
        schedules = Schedules(
            config, optimizer, updates_per_epoch=1, communicator=SingleProcessCommunicator()
        )
        return schedules, optimizer

    schedules, optimizer = made()
    seen = []
    for loss in losses:
        old_schedules, old_optimizer = schedules.state_dict(), optimizer.state_dict()
        schedules, optimizer = made()
        optimizer.load_state_dict(old_optimizer)
        schedules.load_state_dict(old_schedules)
        optimizer.step()
        schedules.after_update()
        schedules.after_epoch(loss)
        seen.append(optimizer.param_groups[0]["mu"])
    assert seen == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * boost_ratio(0.999, 0.05, 0.45))


def test_norms_and_biases_are_a_group_without_decay() -> None:
    """Catches weight decay on batch norm, or a parameter that no group holds."""
    model = build_model("resnet18", 10)
    decayed, plain = parameter_groups(model, OptimizerConfig(decay_norm_and_bias=False))
    assert plain["weight_decay"] == 0
    assert "weight_decay" not in decayed
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(
        "bn" in names[id(p)] or "bias" in names[id(p)] or "downsample.1" in names[id(p)]
        for p in plain["params"]
    )
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert len(parameter_groups(model, OptimizerConfig())) == 1


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "timm:resnet10t"])
def test_residual_branches_can_start_as_identities(name: str) -> None:
    """Catches the option lost on one of the families of models."""
    zeros = []
    for wanted in (False, True):
        parameters = build_model(name, 3, zero_init_gamma=wanted).named_parameters()
        zeros.append(sum(bool((p == 0).all()) for key, p in parameters if key.endswith("weight")))
    assert zeros[1] >= 4


def test_models_that_are_not_known_or_have_no_such_start_are_named() -> None:
    """Catches a traceback from inside a model library."""
    with pytest.raises(ValueError, match="vgg11 has no such start"):
        build_model("vgg11", 3, zero_init_gamma=True)
    with pytest.raises(ValueError, match="has no model 'resnet5000'"):
        build_model("timm:resnet5000", 3)


def test_precision_of_recipe_and_deepspeed_config_must_agree() -> None:
    """Catches a run whose recipe says bf16 and that trains in fp32, or the other way round."""
    open_config: dict[str, object] = {}
    settle_precision(open_config, "bf16", "ds.json")
    assert open_config == {"bf16": {"enabled": True}}
    for precision in ("auto", "fp16"):
        given = {"fp16": {"enabled": True, "loss_scale": 128}}
        settle_precision(given, precision, "ds.json")
        assert given == {"fp16": {"enabled": True, "loss_scale": 128}}
    with pytest.raises(ValueError, match="has bf16 enabled but this run has precision: fp32"):
        settle_precision({"bf16": {"enabled": True}}, "fp32", "ds.json")


@pytest.mark.parametrize(("start_size", "expected"), [(0, True), (16, False)])
def test_cudnn_tries_its_kernels_out_where_images_have_one_size(
    start_size: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a GPU that computes convolutions as cuDNN guesses, or that tries out anew with every size."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not expected)
    progressive = ProgressiveConfig(start_size=start_size, end_epoch=3 if start_size else 0)
    config = TrainConfig(data=DataConfig(progressive=progressive))
    single = prepare("single", config, None, 1)
    build_engine(single, build_model("resnet20", 3), config, SingleProcessCommunicator(), discover_ranks())
    assert torch.backends.cudnn.benchmark is expected


@pytest.mark.parametrize("wanted", [True, False])
def test_a_deterministic_run_takes_no_algorithm_that_rounds_otherwise_next_time(
    wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a GPU whose cuDNN, cuBLAS or atomic sums choose freely though the run is to repeat itself, and a choice
    of the user's own program that is taken back."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", wanted)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    config = TrainConfig(deterministic=wanted)
    single = prepare("single", config, None, 1)
    calls: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", calls.append)
    build_engine(single, build_model("resnet20", 3), config, SingleProcessCommunicator(), discover_ranks())
    assert calls == [True] * wanted
    assert torch.backends.cudnn.benchmark is not wanted
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    if wanted:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        build_engine(
            single, build_model("resnet20", 3), config, SingleProcessCommunicator(), discover_ranks()
        )
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_loss_scaling_skips_an_overflow_and_changes_nothing_else() -> None:
    """Catches gradients that stay scaled, are clipped while scaled, or an infinite one that reaches the weights."""

    def weights(loss_scaling: bool, overflow: bool) -> torch.Tensor:
        module = torch.nn.Linear(3, 1, bias=False)
        torch.nn.init.ones_(module.weight)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        engine = SingleProcessEngine(
            module, optimizer, accumulation_steps=2, clip_grad_norm=0.5, loss_scaling=loss_scaling
        )
        for step in range(6):
            loss = module(torch.arange(3.0) + step).sum()
            engine.backward(loss * torch.inf if overflow and step == 2 else loss)
            engine.step()
        return module.weight.detach()

    assert torch.allclose(weights(True, False), weights(False, False), rtol=1e-6)
    skipped = weights(True, True)
    assert torch.isfinite(skipped).all()
    assert not torch.allclose(skipped, weights(True, False))


def test_a_resumed_run_keeps_its_loss_scale(tmp_path: Path) -> None:
    """Catches a scale that starts anew at 65536 after a resume and skips updates the whole run does not skip."""

    def engine() -> SingleProcessEngine:
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return SingleProcessEngine(module, optimizer, loss_scaling=True)

    first = engine()
    first.backward(first.module(torch.ones(3)).sum() * torch.inf)
    first.step()
    path = save_run(CheckpointStore(tmp_path, first.communicator), 1, first.state(), {}, first.communicator)
    second = engine()
    second.load_state(SavedRun(path))
    assert second._grad_scaler.get_scale() == first._grad_scaler.get_scale() == 65536 / 2


def test_the_factor_at_the_borders_of_warm_up_milestones_and_end() -> None:
    """Catches a milestone that takes effect an update late, a cosine that counts the warm-up, and a warm-up that starts
    at 0, which would waste the first update."""
    step = TrainConfig(epochs=4, schedule=ScheduleConfig(name="step", milestones=[2, 3], gamma=0.1))
    factors = [
        lr_factor(step, 2.5, update) for update in range(10)
    ]  # epochs end with updates 2.5, 5, 7.5 and 10
    assert factors == pytest.approx([1.0] * 5 + [0.1] * 3 + [0.01] * 2)
    cosine = TrainConfig(epochs=4, schedule=ScheduleConfig(name="cosine", warmup_epochs=1))
    factors = [lr_factor(cosine, 4, update) for update in (0, 1, 2, 3, 4, 10, 16)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.5, 0.0])
    scaled = TrainConfig(
        epochs=4, batch_size=512, schedule=ScheduleConfig(warmup_epochs=1, linear_scaling_from=128)
    )
    factors = [lr_factor(scaled, 2, update) for update in (0, 1, 2, 7)]
    assert factors == pytest.approx([2.0, 3.0, 4.0, 4.0])


def test_a_resume_right_after_a_boost_keeps_the_boosted_learning_rate() -> None:
    """Catches the schedule's last learning rate, of before the boost, written over the one that was loaded: the next
    update would be four times too large."""
    config = TrainConfig(
        epochs=4,
        optimizer=OptimizerConfig(params={"lr": 0.01, "mu": 0.05}),
        boost=BoostConfig(milestones=[1]),
    )

    def made() -> tuple[Schedules, torch.optim.Optimizer]:
        optimizer = build_optimizer(config.optimizer, [torch.nn.Parameter(torch.zeros(2))])
        communicator = SingleProcessCommunicator()
        return Schedules(config, optimizer, updates_per_epoch=1, communicator=communicator), optimizer

    schedules, optimizer = made()
    optimizer.step()
    schedules.after_update()
    schedules.after_epoch(1.0)
    resumed, other = made()
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedules.state_dict())
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert other.param_groups[0]["lr"] == pytest.approx(0.01 * boost_ratio(0.999, 0.05, 0.1))


@pytest.mark.parametrize(
    ("borders", "last", "beyond"),
    [
        (lambda n: {"schedule": ScheduleConfig(name="step", milestones=[n])}, 2, 3),
        (lambda n: {"schedule": ScheduleConfig(warmup_epochs=n)}, 2.9, 3.0),
        (lambda n: {"boost": BoostConfig(milestones=[n])}, 2, 3),
        (lambda n: {"data": DataConfig(progressive=ProgressiveConfig(start_size=8, end_epoch=n))}, 2, 3),
        (lambda n: {"data": DataConfig(progressive=ProgressiveConfig(start_size=n, end_epoch=1))}, 224, 225),
        (lambda n: {"data": DataConfig(augmentation="crop", crop_size=n)}, 224, 225),
        (lambda n: {"data": DataConfig(rand_augment=n)}, 30, 31),
        (lambda n: {"data": DataConfig(random_erasing=n)}, 1.0, 1.01),
        (lambda n: {"ema_decay": n}, 0.99, 1.0),
        (lambda n: {"label_smoothing": n}, 0.99, 1.0),
        (lambda n: {"straggler_factor": n}, 1.01, 1.0),
        (lambda n: {"batch_size": n}, 1, 0),
        (lambda n: {"seed": n}, 0, -1),
    ],
)
def test_settings_end_where_they_say(borders: Any, last: float, beyond: float) -> None:
    """Catches a border that is one off: a milestone that no epoch reaches, a decay that never takes anything in."""
    TrainConfig(epochs=3, **borders(last))
    with pytest.raises(ValueError, match=r"must|larger"):
        TrainConfig(epochs=3, **borders(beyond))
