"""Every setting of a training run. The fields are the keys of a recipe's YAML and, with dots, the CLI flags."""

import math
import unicodedata
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

Parameter: TypeAlias = bool | int | float | str | list[Any] | None
"""Of an optimizer; lists hold the same again, see `check_parameter`."""


MOST_PIXELS = 178_956_970
"""More than these Pillow refuses itself."""


def check_parameter(value: Any, name: str) -> Any:
    """Return a value from outside if it is plain: a number, boolean, text, null, or a list of such.

    Raises:
        ValueError: it is something else, a whole number of more than 64 bits, or text with control characters.
    """
    if isinstance(value, list | tuple):
        return [check_parameter(item, f"an item of {name}") for item in value]
    if isinstance(value, str) and any(unicodedata.category(character) == "Cc" for character in value):
        raise ValueError(f"{name} must not hold control characters: {value[:100]!r}")
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is too large a number")
    if not (value is None or type(value) in (bool, int, float, str)):
        kind = "mapping" if isinstance(value, dict) else type(value).__name__
        raise ValueError(
            f"{name} must be a number, true or false, text, null or a list of these, not a {kind}"
        )
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_values(section: Any, prefix: str) -> None:
    """A `null` in YAML is no setting, but where it is the default."""
    for known in fields(section):
        _require(
            getattr(section, known.name) is not None or known.default is None,
            f"{prefix}{known.name} must not be null",
        )


def _require_read(read: bool, section: Any, prefix: str, names: tuple[str, ...], where: str) -> None:
    """Settings that nothing reads here must keep their defaults: whoever gave another value expects it to do something.

    Args:
        read: whether they are read.
        section: holds them.
        prefix: of their names in messages.
        names: of the settings.
        where: they would have a meaning, for the message.
    """
    given = [
        f"{prefix}{known.name}={getattr(section, known.name)} (default {known.default})"
        for known in fields(section)
        if known.name in names and getattr(section, known.name) != known.default
    ]
    _require(read or not given, f"{', '.join(given)} has no meaning but {where}: leave it out")


@dataclass(kw_only=True)
class ProgressiveConfig:
    """Training on small images first: the size grows linearly over the epochs (validation keeps its own size).

    Attributes:
        start_size: height and width of the first epochs' training images, pixels; 0 for no progressive resizing.
        start_epoch: epochs done at `start_size` before the size begins to grow.
        end_epoch: epochs done when the full training size is reached.
        multiple: sizes in between are rounded to a multiple of this, pixels.
    """

    start_size: int = 0
    start_epoch: int = 0
    end_epoch: int = 0
    multiple: int = 32

    def __post_init__(self) -> None:
        _require_values(self, "data.progressive.")
        _require(
            self.start_size >= 0, f"data.progressive.start_size must be at least 0, not {self.start_size}"
        )
        _require(self.multiple >= 1, f"data.progressive.multiple must be at least 1, not {self.multiple}")
        _require(
            not self.start_size or 0 <= self.start_epoch < self.end_epoch,
            "data.progressive needs 0 <= start_epoch < end_epoch, "
            f"not {self.start_epoch} and {self.end_epoch}",
        )
        _require_read(
            bool(self.start_size),
            self,
            "data.progressive.",
            ("start_epoch", "end_epoch", "multiple"),
            "with start_size",
        )


@dataclass(kw_only=True)
class DataConfig:
    """Where the images are and how they become tensors.

    Attributes:
        source: "folder": a tree of image files; "shards": tar shards made from one by `arsg-imagenet shard`;
            "synthetic": random images made in memory, to measure everything but the data.
        root: directory with one subdirectory per split, each with one subdirectory per class (an ImageFolder tree) or
            with shards. None: scikit-learn's handwritten digits, written as such a tree on first use.
        train_split: name of the training split's directory.
        val_split: name of the validation split's directory.
        augmentation: "imagenet": RandomResizedCrop and flip, validation resized to 256/224 of `image_size` and
            centre-cropped; "crop": random crop of `crop_size` and flip, validation on the whole image (the paper's
            CIFAR-10 protocol); "none": resized only. Not for synthetic images, which nothing is done to.
        image_size: height and width of the images the network is validated on, pixels.
        train_image_size: height and width of the images it is trained on, pixels; 0: `image_size`. Not for "crop".
        crop_size: height and width of the training crop with augmentation "crop", pixels; not for another one.
        progressive: smaller training images in the first epochs.
        rand_augment: magnitude of RandAugment (two operations per training image), 1 to 30; 0 for none.
        random_erasing: probability that a rectangle of a training image is erased.
        mixup: α of mixup on training batches, 0 for none; with cutmix each update draws one of the two.
        cutmix: α of cutmix on training batches, 0 for none.
        synthetic_images: in each split of synthetic data.
        synthetic_classes: of synthetic data.
        workers: loader processes per rank for training, and as many again for validation; 0 loads in the training
            process.
        loader: what decodes: "pillow" in the loader processes, or "dali": NVIDIA DALI on the rank's GPU (extra
            `dali`), with the same order, crops and flips; "imagenet" and "none" augmentation only.
        on_bad_image: what a file that cannot be decoded does: "error" ends the run and names it, "skip" leaves it
            out and counts it.
        max_image_pixels: an image of more counts as one that cannot be decoded; decoding takes 4 bytes a pixel.
        max_image_bytes: likewise of a file, or an image in a shard, of more.
    """

    source: Literal["folder", "shards", "synthetic"] = "folder"
    root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    augmentation: Literal["imagenet", "crop", "none"] = "imagenet"
    image_size: int = 224
    train_image_size: int = 0
    crop_size: int = 28
    progressive: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    rand_augment: int = 0
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    synthetic_images: int = 12_800
    synthetic_classes: int = 1000
    workers: int = 4
    loader: Literal["pillow", "dali"] = "pillow"
    on_bad_image: Literal["error", "skip"] = "error"
    max_image_pixels: int = 64_000_000
    max_image_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        _require_values(self, "data.")
        _require(self.image_size >= 1, f"data.image_size must be at least 1, not {self.image_size}")
        _require(
            1 <= self.crop_size <= self.image_size or self.augmentation != "crop",
            f"data.crop_size must be between 1 and image_size={self.image_size}, not {self.crop_size}",
        )
        _require(
            self.source == "folder" or (self.root is None) == (self.source == "synthetic"),
            f"data.source {self.source} "
            + (
                "reads nothing: leave data.root out"
                if self.root
                else "needs data.root, the directory of the shards"
            ),
        )
        _require(
            1 <= self.max_image_pixels <= MOST_PIXELS,
            f"data.max_image_pixels must be 1 to {MOST_PIXELS} (Pillow's own bound), not {self.max_image_pixels}",
        )
        for name in ("synthetic_images", "synthetic_classes", "max_image_bytes"):
            _require(getattr(self, name) >= 1, f"data.{name} must be at least 1, not {getattr(self, name)}")
        for read, names, where in (
            (
                self.source != "synthetic",
                (
                    "augmentation",
                    "rand_augment",
                    "random_erasing",
                    "on_bad_image",
                    "max_image_pixels",
                    "max_image_bytes",
                ),
                "for images that are read, not with source: synthetic",
            ),
            (self.source == "synthetic", ("synthetic_images", "synthetic_classes"), "with source: synthetic"),
            (self.augmentation == "crop", ("crop_size",), "with augmentation: crop"),
        ):
            _require_read(read, self, "data.", names, where)
        _require(self.workers >= 0, f"data.workers must be at least 0, not {self.workers}")
        if self.loader == "dali":
            for offered, what in (
                (self.source != "synthetic", "source: synthetic, which decodes nothing"),
                (self.augmentation != "crop", "augmentation: crop"),
                (not self.rand_augment, "rand_augment"),
                (not self.random_erasing, "random_erasing"),
                (self.on_bad_image == "error", "on_bad_image: skip, since DALI gives up the whole batch"),
            ):
                _require(offered, f"data.loader dali does not offer {what}: use loader: pillow")
        _require(
            self.train_image_size >= 0 and (not self.train_image_size or self.augmentation != "crop"),
            "data.train_image_size must be at least 0, and 0 with augmentation 'crop', whose crop_size it is; "
            f"not {self.train_image_size}",
        )
        _require(0 <= self.rand_augment <= 30, f"data.rand_augment must be 0 to 30, not {self.rand_augment}")
        _require(
            0 <= self.random_erasing <= 1, f"data.random_erasing must be in [0, 1], not {self.random_erasing}"
        )
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            _require(math.isfinite(alpha) and alpha >= 0, f"data.{name} must be at least 0, not {alpha}")
        _require(
            self.progressive.start_size <= self.full_train_size,
            f"data.progressive.start_size={self.progressive.start_size} is larger than the training size "
            f"{self.full_train_size}",
        )

    @property
    def full_train_size(self) -> int:
        """Height and width of training images once progressive resizing is over, pixels."""
        return self.crop_size if self.augmentation == "crop" else self.train_image_size or self.image_size


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer, in the form of a DeepSpeed config.

    Attributes:
        type: "ARSG", or a class of `torch.optim` ("SGD", "Adam", ...) for baselines.
        params: keyword arguments of that class, numbers, booleans, text, null and lists of these; a key it does not
            have is an error.
        decay_norm_and_bias: whether weight decay also acts on parameters with one dimension (batch norm and biases),
            as in the paper; if not, they are a parameter group of their own.
    """

    type: str = "ARSG"
    params: dict[str, Parameter] = field(default_factory=dict)
    decay_norm_and_bias: bool = True

    def __post_init__(self) -> None:
        _require_values(self, "optimizer.")
        for name, value in self.params.items():
            _require(name.isidentifier(), f"optimizer.params.{name} is no name of a parameter")
            check_parameter(value, f"optimizer.params.{name}")


@dataclass(kw_only=True)
class ScheduleConfig:
    """The factor on the learning rate over the run.

    Attributes:
        name: "constant"; "step": times `gamma` at the start of each milestone; "cosine": to 0 at the end.
        milestones: for "step": number of epochs after which the factor applies, ascending.
        gamma: for "step".
        warmup_epochs: the factor first rises linearly from 0 (with linear scaling: from the unscaled learning rate)
            to 1; may be fractional.
        linear_scaling_from: batch size that the optimizer's lr is meant for: it is multiplied by
            batch_size / linear_scaling_from (Goyal et al. 2017); 0 for no scaling.
    """

    name: Literal["constant", "step", "cosine"] = "constant"
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    linear_scaling_from: int = 0

    def __post_init__(self) -> None:
        _require_values(self, "schedule.")
        _require(
            self.linear_scaling_from >= 0,
            f"schedule.linear_scaling_from must be at least 0, not {self.linear_scaling_from}",
        )
        _require(
            self.name == "step" or not self.milestones,
            f"schedule.milestones are for the schedule 'step', not {self.name!r}",
        )
        _require(
            self.name != "step" or bool(self.milestones),
            "schedule 'step' needs schedule.milestones; without any steps it is 'constant'",
        )
        _require_read(self.name == "step", self, "schedule.", ("gamma",), "with the schedule 'step'")
        _require(
            self.milestones == sorted(set(self.milestones)) and all(m > 0 for m in self.milestones),
            f"schedule.milestones must be positive and ascending, not {self.milestones}",
        )
        _require(self.gamma > 0, f"schedule.gamma must be positive, not {self.gamma}")
        _require(
            self.warmup_epochs >= 0, f"schedule.warmup_epochs must be at least 0, not {self.warmup_epochs}"
        )


@dataclass(kw_only=True)
class BoostConfig:
    """ARSG's observation boost (the paper's ARSGB): μ is multiplied, and the learning rate scaled to match.

    Attributes:
        milestones: numbers of epochs after which to boost, ascending; empty for none.
        plateau: boost when the training loss of the epochs flattens, instead of at milestones.
        factor: multiplier of μ, more than 1. It and the following are refused where there is no such boost.
        max_boosts: with `plateau`, how often at most.
        patience: with `plateau`, epochs without improvement that are tolerated.
        threshold: with `plateau`, smallest relative improvement that counts.
    """

    milestones: list[int] = field(default_factory=list)
    plateau: bool = False
    factor: float = 2.0
    max_boosts: int = 1
    patience: int = 2
    threshold: float = 0.01

    def __post_init__(self) -> None:
        _require_values(self, "boost.")
        _require(not (self.milestones and self.plateau), "boost takes milestones or plateau, not both")
        _require(
            self.milestones == sorted(set(self.milestones)) and all(m > 0 for m in self.milestones),
            f"boost.milestones must be positive and ascending, not {self.milestones}",
        )
        _require(self.factor > 1, f"boost.factor must be more than 1, not {self.factor}")
        _require(self.max_boosts >= 1, f"boost.max_boosts must be at least 1, not {self.max_boosts}")
        _require(self.patience >= 0, f"boost.patience must be at least 0, not {self.patience}")
        _require(0 <= self.threshold < 1, f"boost.threshold must be in [0, 1), not {self.threshold}")
        _require_read(self.wanted, self, "boost.", ("factor",), "with boost.milestones or boost.plateau")
        plateau_settings = ("max_boosts", "patience", "threshold")
        _require_read(self.plateau, self, "boost.", plateau_settings, "with boost.plateau")

    @property
    def wanted(self) -> bool:
        """Whether there is any boost."""
        return self.plateau or bool(self.milestones)


@dataclass(kw_only=True)
class TrainConfig:
    """One training run.

    Attributes:
        model: "resnet20" (the paper's CIFAR-10 network) or a classification model of torchvision ("resnet18",
            "resnet50", ...), or with "timm:" in front one of timm ("timm:resnet50d"); untrained.
        zero_init_gamma: the scale of the last batch norm in each residual branch starts at 0 (ResNets).
        precision: of forward and backward passes: "fp32"; "bf16" or "fp16": autocast, fp16 with dynamic loss scaling
            (under DeepSpeed its bf16 or fp16 section); "auto": fp32, under DeepSpeed what its config says.
        channels_last: images (and weights, but under DeepSpeed and replicated Horovod) in memory as NHWC, which GPUs
            with tensor cores prefer.
        compile: torch.compile the network.
        ema_decay: decay per update of a moving average of the weights, validated and exported besides; 0 for none.
        evaluate_at: "x": validate the weights as they are, at ARSG's observation point; "theta": at its base iterate.
        epochs: passes over the training split.
        batch_size: images per weight update over all ranks.
        accumulation_steps: micro-batches per update and rank; batch_size / (ranks × accumulation_steps) images each.
        val_batch_size: images per rank and forward pass in validation.
        clip_grad_norm: the gradient of an update is scaled down to this norm if it is larger; 0 for never.
        label_smoothing: of the training loss.
        seed: of initial weights, order of images and augmentation.
        log_every: updates between two records of training loss and learning rate.
        on_nonfinite: what a loss or gradient with NaN or infinity on any rank does: "stop" ends the run on all ranks,
            at the next record or checkpoint; "skip" leaves the update out on all of them, which costs looking at every
            gradient. fp16 has its own skipping, with the loss scale.
        max_skipped_updates: with on_nonfinite "skip", how many one after another do not end the run.
        straggler_factor: warn of a rank that takes more than this times as long as most others for its own part of an
            update, loading and forward pass; 0 for never.
        check_replicas_every: updates between two comparisons, bit by bit, of the ranks' weights; 0 for none.
        wandb_project: also log to this project of Weights & Biases (needs the package wandb).
        checkpoint_every: updates between two checkpoints inside an epoch; 0 for one after each epoch only.
        keep_checkpoints: how many to keep besides the one with the best validation accuracy.
        async_save: go on training while a checkpoint is written; takes a copy of the state in main memory meanwhile.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: str = "resnet50"
    zero_init_gamma: bool = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: bool = False
    compile: bool = False
    ema_decay: float = 0.0
    evaluate_at: Literal["x", "theta"] = "x"
    epochs: int = 90
    batch_size: int = 256
    accumulation_steps: int = 1
    val_batch_size: int = 128
    clip_grad_norm: float = 0.0
    label_smoothing: float = 0.0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    boost: BoostConfig = field(default_factory=BoostConfig)
    seed: int = 0
    log_every: int = 20
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped_updates: int = 10
    straggler_factor: float = 2.0
    check_replicas_every: int = 0
    wandb_project: str | None = None
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    async_save: bool = False

    def __post_init__(self) -> None:
        _require_values(self, "")
        for name in (
            "epochs",
            "batch_size",
            "accumulation_steps",
            "val_batch_size",
            "log_every",
            "keep_checkpoints",
            "max_skipped_updates",
        ):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        _require(
            math.isfinite(self.clip_grad_norm) and self.clip_grad_norm >= 0,
            f"clip_grad_norm must be at least 0, not {self.clip_grad_norm}",
        )
        _require(
            0 <= self.label_smoothing < 1, f"label_smoothing must be in [0, 1), not {self.label_smoothing}"
        )
        for name in ("checkpoint_every", "check_replicas_every"):
            _require(getattr(self, name) >= 0, f"{name} must be at least 0, not {getattr(self, name)}")
        _require(
            self.straggler_factor == 0 or 1 < self.straggler_factor < math.inf,
            f"straggler_factor must be more than 1, or 0 for no warning, not {self.straggler_factor}",
        )
        _require_read(
            self.on_nonfinite == "skip", self, "", ("max_skipped_updates",), "with on_nonfinite: skip"
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

        _require(0 <= self.ema_decay < 1, f"ema_decay must be in [0, 1), not {self.ema_decay}")
        _require(
            not self.boost.milestones or self.boost.milestones[-1] < self.epochs,
            f"boost.milestones {self.boost.milestones} must lie before the end, epochs={self.epochs}",
        )
        _require(
            self.data.progressive.end_epoch < self.epochs,
            f"data.progressive.end_epoch={self.data.progressive.end_epoch} must be less than epochs={self.epochs}",
        )
        for wanted, name in (
            (self.boost.wanted, "boost"),
            (self.evaluate_at == "theta", "evaluate_at: theta"),
        ):
            _require(
                not wanted or self.optimizer.type == "ARSG",
                f"{name} is for the optimizer ARSG, not {self.optimizer.type}",
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
