"""Every setting of a training run. The fields are the keys of a recipe's YAML and, with dots, the CLI flags."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(kw_only=True)
class DataConfig:
    """Where the images are and how they become tensors.

    Attributes:
        root: directory with one subdirectory per split, each with one subdirectory per class (an ImageFolder tree).
            None: scikit-learn's handwritten digits, written as such a tree on first use.
        train_split: name of the training split's directory.
        val_split: name of the validation split's directory.
        augmentation: "imagenet": RandomResizedCrop and flip, validation resized to 256/224 of `image_size` and
            centre-cropped; "crop": random crop of `crop_size` and flip, validation on the whole image (the paper's
            CIFAR-10 protocol); "none": resized only.
        image_size: height and width of the images the network is validated on, pixels.
        crop_size: height and width of the training crop with augmentation "crop", pixels.
        workers: loader processes per rank; 0 loads in the training process.
        on_bad_image: what a file that cannot be decoded does: "error" ends the run and names it, "skip" leaves it
            out and counts it.
    """

    root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    augmentation: Literal["imagenet", "crop", "none"] = "imagenet"
    image_size: int = 224
    crop_size: int = 28
    workers: int = 4
    on_bad_image: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        _require(self.image_size >= 1, f"data.image_size must be at least 1, not {self.image_size}")
        _require(
            1 <= self.crop_size <= self.image_size or self.augmentation != "crop",
            f"data.crop_size must be between 1 and image_size={self.image_size}, not {self.crop_size}",
        )
        _require(self.workers >= 0, f"data.workers must be at least 0, not {self.workers}")


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer, in the form of a DeepSpeed config.

    Attributes:
        type: "ARSG", or a class of `torch.optim` ("SGD", "Adam", ...) for baselines.
        params: keyword arguments of that class; a key it does not have is an error.
    """

    type: str = "ARSG"
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class ScheduleConfig:
    """The factor on the learning rate over the run.

    Attributes:
        name: "constant"; "step": times `gamma` at the start of each milestone; "cosine": to 0 at the end.
        milestones: for "step": number of epochs after which the factor applies, ascending.
        gamma: for "step".
        warmup_epochs: the factor first rises linearly from 0 to 1; may be fractional.
    """

    name: Literal["constant", "step", "cosine"] = "constant"
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        _require(
            self.name == "step" or not self.milestones,
            f"schedule.milestones are for the schedule 'step', not {self.name!r}",
        )
        _require(
            self.milestones == sorted(set(self.milestones)) and all(m > 0 for m in self.milestones),
            f"schedule.milestones must be positive and ascending, not {self.milestones}",
        )
        _require(self.gamma > 0, f"schedule.gamma must be positive, not {self.gamma}")
        _require(
            self.warmup_epochs >= 0, f"schedule.warmup_epochs must be at least 0, not {self.warmup_epochs}"
        )


@dataclass(kw_only=True)
class TrainConfig:
    """One training run.

    Attributes:
        model: "resnet20" (the paper's CIFAR-10 network) or a classification model of torchvision ("resnet18",
            "resnet50", ...), untrained.
        epochs: passes over the training split.
        batch_size: images per weight update over all ranks.
        accumulation_steps: micro-batches per update and rank; batch_size / (ranks × accumulation_steps) images each.
        val_batch_size: images per rank and forward pass in validation.
        clip_grad_norm: the gradient of an update is scaled down to this norm if it is larger; 0 for never.
        label_smoothing: of the training loss.
        seed: of initial weights, order of images and augmentation.
        log_every: updates between two records of training loss and learning rate.
        keep_checkpoints: how many to keep; one is written after every epoch.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: str = "resnet50"
    epochs: int = 90
    batch_size: int = 256
    accumulation_steps: int = 1
    val_batch_size: int = 128
    clip_grad_norm: float = 0.0
    label_smoothing: float = 0.0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    seed: int = 0
    log_every: int = 20
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "batch_size",
            "accumulation_steps",
            "val_batch_size",
            "log_every",
            "keep_checkpoints",
        ):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        _require(
            math.isfinite(self.clip_grad_norm) and self.clip_grad_norm >= 0,
            f"clip_grad_norm must be at least 0, not {self.clip_grad_norm}",
        )
        _require(
            0 <= self.label_smoothing < 1, f"label_smoothing must be in [0, 1), not {self.label_smoothing}"
        )
        _require(self.seed >= 0, f"seed must be at least 0, not {self.seed}")
        _require(
            not self.schedule.milestones or self.schedule.milestones[-1] < self.epochs,
            f"schedule.milestones {self.schedule.milestones} must lie before the end, epochs={self.epochs}",
        )
        _require(
            math.isfinite(self.schedule.warmup_epochs) and self.schedule.warmup_epochs < self.epochs,
            f"schedule.warmup_epochs={self.schedule.warmup_epochs} must be less than epochs={self.epochs}",
        )

    def micro_batch_size(self, world_size: int) -> int:
        """Images per rank and micro-batch.

        Raises:
            ValueError: `batch_size` cannot be divided evenly.
        """
        parts = world_size * self.accumulation_steps
        if self.batch_size % parts:
            lower = self.batch_size // parts * parts
            raise ValueError(
                f"batch_size={self.batch_size} does not divide into {world_size} ranks × "
                f"{self.accumulation_steps} accumulation steps; use "
                + (f"{lower} or {lower + parts}" if lower else str(parts))
            )
        return self.batch_size // parts
