"""Whole runs of a linear network, in this process, against the same training written down in a few lines.

Runs that are compared with each other can be wrong alike; this compares every number that a run records with one worked
out another way: full gradients, the paper's formula in float64, means over the images themselves.
"""

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from arsg_dist import theory
from arsg_dist.checkpoint import memory
from arsg_dist.engine import Ranks, SingleProcessCommunicator
from arsg_dist.imagenet.config import BoostConfig, DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from arsg_dist.imagenet.data.builtin import SyntheticSplit
from arsg_dist.imagenet.data.sampler import TrainingSampler
from arsg_dist.imagenet.output import run_log
from arsg_dist.imagenet.output.weights import WeightFiles, read_metadata
from arsg_dist.imagenet.training import setup as training
from arsg_dist.imagenet.training.metrics import Evaluation
from arsg_dist.imagenet.training.parts import Start
from arsg_dist.imagenet.training.trainer import EpochLoop

IMAGES, CLASSES, SIZE, EPOCHS, BATCH = 10, 3, 4, 3, 4
LR, BETA1, BETA2, MU, EPS = 0.004, 0.9, 0.99, 0.2, 1e-3
EMA = 0.75
# 10 images and 4 an update: epochs end with updates 3, 5 and 8, and the last update has two images only.
ENDS = (3, 5, 8)


def build_model(*_: Any, **__: Any) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES))


def recipe(**settings: Any) -> TrainConfig:
    """Every setting that makes a difference has another value than its default, and sizes that do not divide."""
    given: dict[str, Any] = {
        "data": DataConfig(
            source="synthetic",
            synthetic_images=IMAGES,
            synthetic_classes=CLASSES,
            image_size=SIZE,
            workers=0,
        ),
        "model": "resnet20",
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "accumulation_steps": 2,
        "val_batch_size": 3,
        "optimizer": OptimizerConfig(
            params={"lr": LR, "betas": [BETA1, BETA2], "mu": MU, "eps": EPS},
        ),
        "schedule": ScheduleConfig(name="step", milestones=[2], gamma=0.5),
        "boost": BoostConfig(milestones=[1]),
        "ema_decay": EMA,
        "log_every": 3,
        "checkpoint_every": 2,
        "keep_checkpoints": 20,
        **settings,
    }
    return TrainConfig(**given)


def start(output: Path, config: TrainConfig, **settings: Any) -> int:
    communicator = SingleProcessCommunicator()
    return training.train(config, Start("single", output, **settings), Ranks(0, 1, 0, "none"), communicator)


@pytest.fixture(autouse=True)
def _linear_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "build_model", build_model)
    monkeypatch.setattr(run_log, "draw_learning_curve", lambda directory: directory / "none")


class ByHand:
    """The recipe, written down: what the run should record."""

    def __init__(self, config: TrainConfig) -> None:
        model = build_model()
        self.weight, self.bias = (parameter.detach().double() for parameter in model[1].parameters())
        self.ema: list[Tensor] = []
        self.m = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.v = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.v_hat = [torch.full_like(tensor, EPS) for tensor in self.tensors]
        self.train = self.images_of(config, train=True)
        self.val = self.images_of(config, train=False)
        self.records: list[dict[str, float]] = []
        order = TrainingSampler(
            IMAGES,
            epochs=EPOCHS,
            batch_size=BATCH,
            accumulation_steps=1,
            rank=0,
            world_size=1,
            seed=config.seed,
        )
        self.batches = [[key.image for key in batch if key.counts] for batch in order]
        assert [len(batch) for batch in self.batches] == [4] * 7 + [2]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight, self.bias]

    @staticmethod
    def images_of(config: TrainConfig, *, train: bool) -> tuple[Tensor, Tensor]:
        split = SyntheticSplit(config.data, train=train, seed=config.seed)
        pairs = [split[(0, index, True, 0)] for index in range(IMAGES)]  # type: ignore[index]
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        images = torch.stack([image.double() / 255 for image, _ in pairs])
        images = (images - mean.double().view(3, 1, 1)) / std.double().view(3, 1, 1)
        return images.flatten(1), torch.tensor([label for _, label in pairs])

    def evaluate(self, weight: Tensor, bias: Tensor) -> dict[str, float]:
        images, labels = self.val
        logits = images @ weight.T + bias
        return {
            "loss": functional.cross_entropy(logits, labels).item(),
            "top1": (logits.argmax(1) == labels).double().mean().item(),
        }

    def run(self, *, theta: bool = False, stopped_after: int = 0, factor: float = 1.0) -> "ByHand":
        """Makes all updates; where the run is stopped it records one more time, and lr and μ are multiplied."""
        lr, mu, since_record, since_epoch = LR, MU, [], []
        for update, batch in enumerate(self.batches, 1):
            images, labels = self.train[0][batch], self.train[1][batch]
            for tensor in self.tensors:
                tensor.requires_grad_(True)
            logits = images @ self.weight.T + self.bias
            losses = functional.cross_entropy(logits, labels, reduction="none")
            gradients = torch.autograd.grad(losses.mean(), self.tensors)
            since_record += losses.tolist()
            since_epoch += losses.tolist()
            thetas = []
            with torch.no_grad():
                moments = zip(self.tensors, gradients, self.m, self.v, self.v_hat, strict=True)
                for x, g, m, v, v_hat in moments:
                    m.mul_(BETA1).add_((1 - BETA1) * g)
                    v.mul_(BETA2).add_((1 - BETA2) * g * g)
                    v_hat.copy_(torch.maximum(v_hat, v))
                    x -= lr * ((1 - mu) * m + mu * g) / v_hat.sqrt()
                    thetas.append(x + lr * mu * BETA1 / (1 - BETA1) * m / v_hat.sqrt())
                now = [tensor.detach().clone() for tensor in self.tensors]
                averages = zip(self.ema or now, now, strict=True)
                self.ema = [EMA * old + (1 - EMA) * new for old, new in averages]
            epoch_ended = update in ENDS
            used = {"lr": lr, "mu": mu}  # in this update; what follows is for the next one
            # The schedule halves lr with the first update at or after the second epoch: 2 × 10/4 = 5 updates.
            if update == 5:
                lr *= 0.5
            if update == stopped_after:
                lr, mu = lr * factor, mu * factor
            if update % 3 == 0 or epoch_ended or update == stopped_after:
                mean = sum(since_record) / len(since_record)
                self.records.append({"update": update, "loss": mean, **used})
                since_record = []
            if epoch_ended:
                if update == ENDS[0]:
                    lr, mu = lr * theory.boost_ratio(BETA1, MU, 2 * MU), 2 * MU
                evaluated = self.evaluate(*(thetas if theta else now))
                ema = self.evaluate(*self.ema)
                self.records.append(
                    {
                        "update": update,
                        "train_loss": sum(since_epoch) / len(since_epoch),
                        "val_loss": evaluated["loss"],
                        "val_top1": evaluated["top1"],
                        "ema_val_loss": ema["loss"],
                        "ema_val_top1": ema["top1"],
                        "val_images": IMAGES,
                        **used,
                    }
                )
                since_epoch = []
                self.final = thetas if theta else now
        return self


def records_of(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_as_by_hand(output: Path, expected: ByHand) -> None:
    recorded = records_of(output)
    assert [record["update"] for record in recorded] == [record["update"] for record in expected.records]
    for record, right in zip(recorded, expected.records, strict=True):
        assert {key: record[key] for key in right} == pytest.approx(right, rel=1e-4), record["update"]
    for name, tensors in (("last", expected.final), ("ema", expected.ema)):
        weights = load_file(output / "weights" / f"{name}.safetensors")
        for key, tensor in zip(("1.weight", "1.bias"), tensors, strict=True):
            torch.testing.assert_close(weights[key].double(), tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("theta", [False, True])
def test_every_number_of_a_run_is_the_one_worked_out(theta: bool, tmp_path: Path) -> None:
    """Catches losses counted twice at a checkpoint between two records, sums or counts that a record or an epoch does
    not reset, filled-up places that count, a last update that weighs too little, weights saved at another point than
    they were validated at, a schedule or boost an update early or late, a record with the next update's learning rate,
    and an average of other weights."""
    config = recipe(evaluate_at="theta" if theta else "x")
    assert start(tmp_path / "run", config) == 0
    assert_as_by_hand(tmp_path / "run", ByHand(config).run(theta=theta))


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_records_the_numbers_worked_out(stop: int, tmp_path: Path) -> None:
    """Catches sums of losses, a boost, an average or a place in the data that a checkpoint inside an epoch (updates 2
    and 4), or at the end of one (3), lacks; and `max_updates` that ends without one (1)."""
    config = recipe()
    assert start(tmp_path / "run", config, max_updates=stop) == 0
    assert start(tmp_path / "run", config, resume=True) == 0
    assert_as_by_hand(tmp_path / "run", ByHand(config).run(stopped_after=stop))
    seconds = [record["seconds"] for record in records_of(tmp_path / "run")]
    assert seconds == sorted(seconds), "the clock of a run goes on after a resume"


class Killed(BaseException):
    """What nobody handles."""


@pytest.mark.parametrize("unwritten", ["last", "ema"])
def test_weights_that_a_kill_left_unwritten_are_there_after_the_next_start(
    unwritten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches weights/ and its card left as an epoch before had them, the last checkpoint saying that all is done."""
    config, real = recipe(), WeightFiles.save

    def killed(files: WeightFiles, name: str, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
        if about["epoch"] == EPOCHS and name == unwritten:
            raise Killed
        real(files, name, weights, about)

    with monkeypatch.context() as patch:
        patch.setattr(WeightFiles, "save", killed)
        with pytest.raises(Killed):
            start(tmp_path / "run", config)
    before = read_metadata(tmp_path / "run" / "weights" / f"{unwritten}.safetensors")
    assert before["epoch"] == EPOCHS - 1
    assert start(tmp_path / "run", config, resume=True) == 0
    assert_as_by_hand(tmp_path / "run", ByHand(config).run())
    assert f"| {EPOCHS} |" in (tmp_path / "run" / "weights" / "README.md").read_text()


def test_the_best_epoch_is_that_of_the_highest_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the best chosen by the largest loss, by top-5, by the average's accuracy, or the last of equals."""
    scripted = [
        (Evaluation(3.0, 0.25, 0.5, IMAGES), Evaluation(9.0, 0.125, 0.5, IMAGES)),
        (Evaluation(1.0, 0.5, 0.75, IMAGES), Evaluation(8.0, 0.375, 0.5, IMAGES)),
        (Evaluation(2.0, 0.5, 1.0, IMAGES), Evaluation(7.0, 0.4375, 0.5, IMAGES)),
    ]
    evaluations = iter([evaluation for pair in scripted for evaluation in pair])
    monkeypatch.setattr(EpochLoop, "evaluate", lambda *_: next(evaluations))
    run = tmp_path / "run"
    assert start(run, recipe()) == 0
    about = read_metadata(run / "weights" / "best.safetensors")
    assert (about["epoch"], about["val_top1"], about["weights"]) == (2, 0.5, "x")
    assert read_metadata(run / "weights" / "ema.safetensors")["val_top1"] == 0.4375
    best = (run / "checkpoints" / "best").resolve().name
    assert int(best.removeprefix("step-")) == ENDS[1]


def test_nothing_is_learned_from_without_a_learning_rate(tmp_path: Path) -> None:
    """Catches a mean over batches in place of images: with weights that stay, every epoch has the same mean."""
    config = recipe(
        optimizer=OptimizerConfig(type="SGD", params={"lr": 0.0}),
        boost=BoostConfig(),
        schedule=ScheduleConfig(),
        ema_decay=0.0,
    )
    assert start(tmp_path / "run", config) == 0
    hand = ByHand(config)
    images, labels = hand.train
    losses = functional.cross_entropy(images @ hand.weight.T + hand.bias, labels, reduction="none")
    recorded = [record["train_loss"] for record in records_of(tmp_path / "run") if record["kind"] == "epoch"]
    of_epochs, first = [], 0
    for end in ENDS:
        seen = [image for batch in hand.batches[first:end] for image in batch]
        of_epochs.append(losses[seen].mean().item())
        first = end
    assert recorded == pytest.approx(of_epochs, rel=1e-5)
    assert not math.isclose(of_epochs[0], of_epochs[1])


def test_a_run_that_saves_in_the_background_prepares_its_memory_and_saves_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches memory prepared for another state than the one that is saved, and preparing that changes the run."""
    allocated = list[int]()
    real = memory._allocate

    def counted(numel: int, *arguments: Any) -> Tensor:
        if threading.current_thread() is threading.main_thread():
            allocated.append(numel)
        return real(numel, *arguments)

    monkeypatch.setattr(memory, "_allocate", counted)
    for name, background in (("background", True), ("plain", False)):
        assert start(tmp_path / name, recipe(async_save=background)) == 0
    assert allocated == []
    saved, plain = (
        {path.parent.name: path.read_bytes() for path in (tmp_path / name).glob("checkpoints/step-*/shard*")}
        for name in ("background", "plain")
    )
    assert len(saved) == 6  # after updates 2, 4, 6 and each epoch
    assert saved == plain
