"""Define every setting of a training run.

The fields are the keys of a recipe's YAML and, with dots, the CLI flags; the string below a field is its help.
"""

import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

Parameter: TypeAlias = bool | int | float | str | list[Any] | None
"""Of an optimizer; lists hold the same again, see `check_parameter`."""


MOST_PIXELS = 178_956_970
"""More than these Pillow refuses itself."""


def check_parameter(value: Any, name: str) -> Any:
    """Return a value from outside if it is plain, in lists or not.

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


@dataclass(frozen=True)
class Must:
    """The range of a setting's values, in its type: `Annotated[int, Must(...)]`.

    Attributes:
        be: the range, as a message says it.
        holds: whether a value is in it.
    """

    be: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Must("at least 1", lambda value: value >= 1)]
Whole = Annotated[int, Must("at least 0", lambda value: value >= 0)]
Amount = Annotated[float, Must("at least 0", lambda value: 0 <= value < math.inf)]
Share = Annotated[float, Must("in [0, 1)", lambda value: 0 <= value < 1)]
Milestones = Annotated[
    list[int],
    Must(
        "positive and ascending",
        lambda value: value == sorted(set(value)) and all(epochs > 0 for epochs in value),
    ),
]


def _takes_null(kind: Any) -> bool:
    return type(None) in get_args(get_args(kind)[0] if get_origin(kind) is Annotated else kind)


@dataclass(kw_only=True)
class Section:
    """Settings, each in its range; `prefix` is that of their names."""

    prefix = ""

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self), include_extras=True)
        for known in fields(self):
            value, name = getattr(self, known.name), f"{self.prefix}{known.name}"
            # A `null` in YAML is no setting, but where its type has it.
            _require(value is not None or _takes_null(kinds[known.name]), f"{name} must not be null")
            for must in getattr(kinds[known.name], "__metadata__", ()):
                _require(must.holds(value), f"{name} must be {must.be}, not {value}")

    def _require_read(self, read: bool, names: tuple[str, ...], where: str) -> None:
        """Refuse values other than the defaults that have no effect here.

        Args:
            read: whether they are read.
            names: of the settings.
            where: they would have a meaning, for the message.
        """
        given = [
            f"{self.prefix}{known.name}={getattr(self, known.name)} (default {known.default})"
            for known in fields(self)
            if known.name in names and getattr(self, known.name) != known.default
        ]
        _require(read or not given, f"{', '.join(given)} has no meaning but {where}: leave it out")


@dataclass(kw_only=True)
class ProgressiveConfig(Section):
    """Training on small images first: the size grows linearly over the epochs (validation keeps its own size)."""

    prefix = "data.progressive."

    start_size: Whole = 0
    """height and width of the first epochs' training images, pixels; 0 for no progressive resizing."""
    start_epoch: int = 0
    """epochs done at `start_size` before the size begins to grow."""
    end_epoch: int = 0
    """epochs done when the full training size is reached."""
    multiple: Count = 32
    """sizes in between are rounded to a multiple of this, pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            not self.start_size or 0 <= self.start_epoch < self.end_epoch,
            "data.progressive needs 0 <= start_epoch < end_epoch, "
            f"not {self.start_epoch} and {self.end_epoch}",
        )
        self._require_read(bool(self.start_size), ("start_epoch", "end_epoch", "multiple"), "with start_size")


@dataclass(kw_only=True)
class DataConfig(Section):
    """Where the images are and how they become tensors."""

    prefix = "data."

    source: Literal["folder", "shards", "synthetic"] = "folder"
    """"folder": a tree of image files; "shards": tar shards made from one by `arsg-imagenet shard`; "synthetic": random
    images made in memory, to measure everything but the data."""
    root: str | None = ""
    """directory with one subdirectory per split, each with one subdirectory per class (an ImageFolder tree) or with
    shards. It must be given; null stands for scikit-learn's handwritten digits, written as such a tree on first use."""
    train_split: str = "train"
    """name of the training split's directory."""
    val_split: str = "val"
    """name of the validation split's directory."""
    augmentation: Literal["imagenet", "crop", "none"] = "imagenet"
    """"imagenet": RandomResizedCrop and flip, validation resized to 256/224 of `image_size` and centre-cropped; "crop":
    random crop of `crop_size` and flip, validation on the whole image (the paper's CIFAR-10 protocol); "none": resized
    only. Not for synthetic images, which nothing is done to."""
    image_size: Count = 224
    """height and width of the images the network is validated on, pixels."""
    train_image_size: int = 0
    """height and width of the images it is trained on, pixels; 0: `image_size`. Not for "crop"."""
    crop_size: int = 28
    """height and width of the training crop with augmentation "crop", pixels; not for another one."""
    progressive: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    """smaller training images in the first epochs."""
    rand_augment: Annotated[int, Must("0 to 30", lambda value: 0 <= value <= 30)] = 0
    """magnitude of RandAugment (two operations per training image), 1 to 30; 0 for none."""
    random_erasing: Annotated[float, Must("in [0, 1]", lambda value: 0 <= value <= 1)] = 0.0
    """probability that a rectangle of a training image is erased."""
    mixup: Amount = 0.0
    """α of mixup on training batches, 0 for none; with cutmix each update draws one of the two."""
    cutmix: Amount = 0.0
    """α of cutmix on training batches, 0 for none."""
    synthetic_images: Count = 12_800
    """in each split of synthetic data."""
    synthetic_classes: Count = 1000
    """of synthetic data."""
    workers: Whole = 4
    """loader processes per rank for training, and as many again for validation; 0 loads in the training process."""
    timeout: Amount = 300.0
    """seconds that a rank waits for a batch of its loader processes before it ends the run with the reason; 0 for ever.
    Not with workers: 0, where nobody would notice."""
    loader: Literal["pillow", "dali"] = "pillow"
    """what decodes: "pillow" in the loader processes, or "dali": NVIDIA DALI on the rank's GPU (extra `dali`), with the
    same order, crops and flips; "imagenet" and "none" augmentation only."""
    on_bad_image: Literal["error", "skip"] = "error"
    """what a file that cannot be decoded does: "error" ends the run and names it, "skip" leaves it out and counts
    it."""
    max_image_pixels: Annotated[
        int, Must(f"1 to {MOST_PIXELS} (Pillow's own bound)", lambda value: 1 <= value <= MOST_PIXELS)
    ] = 64_000_000
    """an image of more counts as one that cannot be decoded; decoding takes 4 bytes a pixel."""
    max_image_bytes: Count = 256 * 2**20
    """likewise of a file, or an image in a shard, of more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            1 <= self.crop_size <= self.image_size or self.augmentation != "crop",
            f"data.crop_size must be between 1 and image_size={self.image_size}, not {self.crop_size}",
        )
        _require(
            self.source == "folder" or (not self.root) == (self.source == "synthetic"),
            f"data.source {self.source} "
            + (
                "reads nothing: leave data.root out"
                if self.root
                else "needs data.root, the directory of the shards"
            ),
        )
        decoding = ("augmentation", "rand_augment", "random_erasing", "on_bad_image", "max_image_pixels")
        synthetic = self.source == "synthetic"
        for read, names, where in (
            (
                not synthetic,
                (*decoding, "max_image_bytes"),
                "for images that are read, not with source: synthetic",
            ),
            (synthetic, ("synthetic_images", "synthetic_classes"), "with source: synthetic"),
            (self.augmentation == "crop", ("crop_size",), "with augmentation: crop"),
            (self.workers > 0, ("timeout",), "for loader processes, not with workers: 0"),
        ):
            self._require_read(read, names, where)
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
        _require(
            self.progressive.start_size <= self.full_train_size,
            f"data.progressive.start_size={self.progressive.start_size} is larger than the training size "
            f"{self.full_train_size}",
        )

    def require_root(self) -> None:
        """Refuse a start that does not say where its images are.

        Raises:
            ValueError: it does not; not even that they are the digits.
        """
        _require(
            self.source != "folder" or self.root != "",
            "data.root is missing: give --data.root DIR, the directory with the images' splits "
            f"(DIR/{self.train_split}/CLASS/*.JPEG), or --data.root null for scikit-learn's handwritten digits",
        )

    @property
    def full_train_size(self) -> int:
        """Height and width of training images once progressive resizing is over, pixels."""
        return self.crop_size if self.augmentation == "crop" else self.train_image_size or self.image_size


@dataclass(kw_only=True)
class OptimizerConfig(Section):
    """The optimizer, in the form of a DeepSpeed config."""

    prefix = "optimizer."

    type: str = "ARSG"
    """"ARSG"; "RemoteObservation" around another optimizer; "Lion" or a class of `torch.optim` ("SGD", "Adam", ...) for
    baselines."""
    params: dict[str, Parameter] = field(default_factory=dict)
    """keyword arguments of that class, numbers, booleans, text, null and lists of these; a key it does not have is an
    error. Of RemoteObservation: `inner`, the name of the optimizer inside, whose own settings stand beside it, and
    `remote_mu`, `remote_beta1`, `remote_cautious_weight_decay`."""
    decay_norm_and_bias: bool = True
    """whether weight decay also acts on parameters with one dimension (batch norm and biases), as in the paper; if not,
    they are a parameter group of their own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self.params.items():
            _require(name.isidentifier(), f"optimizer.params.{name} is no name of a parameter")
            check_parameter(value, f"optimizer.params.{name}")


@dataclass(kw_only=True)
class ScheduleConfig(Section):
    """The factor on the learning rate over the run."""

    prefix = "schedule."

    name: Literal["constant", "step", "cosine"] = "constant"
    """"constant"; "step": times `gamma` at the start of each milestone; "cosine": to 0 at the end."""
    milestones: Milestones = field(default_factory=list)
    """for "step": number of epochs after which the factor applies, ascending."""
    gamma: Annotated[float, Must("positive", lambda value: value > 0)] = 0.1
    """for "step"."""
    warmup_epochs: Annotated[float, Must("at least 0", lambda value: value >= 0)] = 0.0
    """the factor first rises linearly from 0 (with linear scaling: from the unscaled learning rate) to 1; may be
    fractional."""
    linear_scaling_from: Whole = 0
    """batch size that the optimizer's lr is meant for: it is multiplied by batch_size / linear_scaling_from (Goyal et
    al. 2017); 0 for no scaling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.name == "step" or not self.milestones,
            f"schedule.milestones are for the schedule 'step', not {self.name!r}",
        )
        _require(
            self.name != "step" or bool(self.milestones),
            "schedule 'step' needs schedule.milestones; without any steps it is 'constant'",
        )
        self._require_read(self.name == "step", ("gamma",), "with the schedule 'step'")


@dataclass(kw_only=True)
class BoostConfig(Section):
    """ARSG's observation boost (the paper's ARSGB): μ is multiplied, and the learning rate scaled to match."""

    prefix = "boost."

    milestones: Milestones = field(default_factory=list)
    """numbers of epochs after which to boost, ascending; empty for none."""
    plateau: bool = False
    """boost when the training loss of the epochs flattens, instead of at milestones."""
    factor: Annotated[float, Must("more than 1", lambda value: value > 1)] = 2.0
    """multiplier of μ, more than 1. It and the following are refused where there is no such boost."""
    max_boosts: Count = 1
    """with `plateau`, how often at most."""
    patience: Whole = 2
    """with `plateau`, epochs without improvement that are tolerated."""
    threshold: Share = 0.01
    """with `plateau`, smallest relative improvement that counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(not (self.milestones and self.plateau), "boost takes milestones or plateau, not both")
        self._require_read(self.wanted, ("factor",), "with boost.milestones or boost.plateau")
        self._require_read(self.plateau, ("max_boosts", "patience", "threshold"), "with boost.plateau")

    @property
    def wanted(self) -> bool:
        """Whether there is any boost."""
        return self.plateau or bool(self.milestones)


@dataclass(kw_only=True)
class TrainConfig(Section):
    """One training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: str = "resnet50"
    """"resnet20" (the paper's CIFAR-10 network) or a classification model of torchvision ("resnet18", "resnet50", ...),
    or with "timm:" in front one of timm ("timm:resnet50d"); untrained."""
    zero_init_gamma: bool = False
    """the scale of the last batch norm in each residual branch starts at 0 (ResNets)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of forward and backward passes: "fp32"; "bf16" or "fp16": autocast, fp16 with dynamic loss scaling (under
    DeepSpeed its bf16 or fp16 section); "auto": fp32, under DeepSpeed what its config says."""
    channels_last: bool = False
    """images (and weights, but under DeepSpeed and replicated Horovod) in memory as NHWC, which GPUs with tensor cores
    prefer."""
    compile: bool = False
    """torch.compile the network."""
    deterministic: bool = False
    """on a GPU, take only algorithms that round alike in every run, which are slower; an operation that has none is an
    error. Without it two runs, or an interrupted one and one that was not, are equal to rounding there. A CPU needs no
    such choice."""
    ema_decay: Share = 0.0
    """decay per update of a moving average of the weights, validated and exported besides; 0 for none."""
    evaluate_at: Literal["x", "theta"] = "x"
    """"x": validate the weights as they are, at the observation point; "theta": at the base iterate of ARSG or
    RemoteObservation."""
    epochs: Count = 90
    """passes over the training split."""
    batch_size: Count = 256
    """images per weight update over all ranks."""
    accumulation_steps: Count = 1
    """micro-batches per update and rank; batch_size / (ranks × accumulation_steps) images each."""
    val_batch_size: Count = 128
    """images per rank and forward pass in validation."""
    clip_grad_norm: Amount = 0.0
    """the gradient of an update is scaled down to this norm if it is larger; 0 for never."""
    label_smoothing: Share = 0.0
    """of the training loss."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    boost: BoostConfig = field(default_factory=BoostConfig)
    seed: Whole = 0
    """of initial weights, order of images and augmentation."""
    log_every: Count = 20
    """updates between two records of training loss and learning rate."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """what a loss or gradient with NaN or infinity on any rank does: "stop" ends the run on all ranks, at the next
    record or checkpoint; "skip" leaves the update out on all of them, which costs looking at every gradient. fp16 has
    its own skipping, with the loss scale."""
    max_skipped_updates: Count = 10
    """with on_nonfinite "skip", how many one after another do not end the run."""
    straggler_factor: Annotated[
        float, Must("more than 1, or 0 for no warning", lambda value: value == 0 or 1 < value < math.inf)
    ] = 2.0
    """warn of a rank that takes more than this times as long as most others for its own part of an update, loading and
    forward pass; 0 for never."""
    check_replicas_every: Whole = 0
    """updates between two comparisons, bit by bit, of the ranks' weights; 0 for none."""
    engine_options: dict[str, Parameter] = field(default_factory=dict)
    """of the engine alone (docs/engines.md): backend; find_unused_parameters, shard_update; activation_checkpointing,
    cpu_offload, param_dtype, reduce_dtype, reshard_after_forward, shard_group. An option that the chosen engine does
    not have is an error."""
    wandb_project: str | None = None
    """also log to this project of Weights & Biases (needs the package wandb)."""
    checkpoint_every: Whole = 0
    """updates between two checkpoints inside an epoch; 0 for one after each epoch only."""
    keep_checkpoints: Count = 2
    """how many to keep besides the one with the best validation accuracy."""
    async_save: bool = False
    """go on training while a checkpoint is written; takes a copy of the state in main memory meanwhile."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_read(self.on_nonfinite == "skip", ("max_skipped_updates",), "with on_nonfinite: skip")
        _require(
            not self.schedule.milestones or self.schedule.milestones[-1] < self.epochs,
            f"schedule.milestones {self.schedule.milestones} must lie before the end, epochs={self.epochs}: give "
            "schedule.milestones that fit",
        )
        _require(
            math.isfinite(self.schedule.warmup_epochs) and self.schedule.warmup_epochs < self.epochs,
            f"schedule.warmup_epochs={self.schedule.warmup_epochs} must be less than epochs={self.epochs}",
        )
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
                not wanted or self.optimizer.type in ("ARSG", "RemoteObservation"),
                f"{name} is for the optimizers ARSG and RemoteObservation, not {self.optimizer.type}",
            )

    def micro_batch_size(self, world_size: int) -> int:
        """Return the images per rank and micro-batch.

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
