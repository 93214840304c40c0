"""Build networks by name: torchvision's, timm's, and the paper's ResNet-20."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, cast

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from arsg_dist.imagenet.torchvision_compat import torchvision

TIMM = "timm:"

_AUXILIARY: Final = {"aux_logits": 0.4, "aux_logits1": 0.3, "aux_logits2": 0.3}
"""Share in the loss of a network's further classifiers, by their names in torchvision's outputs: the usual ones of
Inception v3 and of GoogLeNet."""
_WITH_AUXILIARY: Final = ("googlenet", "inception_v3")


def build_model(name: str, num_classes: int, *, zero_init_gamma: bool = False) -> nn.Module:
    """Build an untrained network.

    Args:
        name: "resnet20", a classification model of `torchvision.models`, or "timm:NAME" for one of timm.
        num_classes: size of its output, shape (batch, num_classes).
        zero_init_gamma: the scale of the last batch norm in each residual branch starts at 0, so that the branches
            start as identities (Goyal et al. 2017, section 5.1). False leaves the library's own start.

    Raises:
        ValueError: no such model, or one that cannot start with zeros.
        ImportError: a model of timm, which is not installed.
    """
    if name == "resnet20":
        return ResNet20(num_classes, zero_init_gamma=zero_init_gamma)
    if name.startswith(TIMM):
        create, options = _timm_model(name.removeprefix(TIMM)), {"zero_init_last": True}
    else:
        known = torchvision.models.list_models(module=torchvision.models)
        if name not in known:
            raise ValueError(
                f"model {name!r} is not known; use resnet20, timm:NAME, or one of torchvision's: {', '.join(known)}"
            )
        # Their own initial weights, without the warning that another version may choose others.
        own = {"init_weights": True} if name in _WITH_AUXILIARY else {}
        create, options = (
            partial(torchvision.models.get_model, name, weights=None, **own),
            {"zero_init_residual": True},
        )
    try:
        model: nn.Module = create(num_classes=num_classes, **(options if zero_init_gamma else {}))
    except TypeError as error:
        if not zero_init_gamma or next(iter(options)) not in str(error):
            raise
        raise ValueError(
            f"zero_init_gamma is for residual networks with batch norm; {name} has no such start: leave it out"
        ) from None
    return model


def build_shapes(name: str, num_classes: int) -> nn.Module:
    """Build a network of which only shapes are wanted, without memory for its weights where it can be built so.

    Args:
        name: as for `build_model`.
        num_classes: likewise.

    Raises:
        ValueError: no such model.
        ImportError: a model of timm, which is not installed.
    """
    try:
        with torch.device("meta"):
            return build_model(name, num_classes)
    except NotImplementedError:  # one that computes its widths by tensors, as RegNet does
        return build_model(name, num_classes)


def _timm_model(name: str) -> Callable[..., nn.Module]:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"model timm:{name} needs timm: pip install 'arsg-dist[timm]', or choose a model of torchvision"
        ) from error
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name}*")[:5]
        raise ValueError(
            f"timm {timm.__version__} has no model {name!r}"
            + (f"; it has {', '.join(similar)}" if similar else "")
        )
    return partial(timm.create_model, name, pretrained=False)


def weighted_logits(outputs: Any) -> list[tuple[float, torch.Tensor]]:
    """Tell the logits in what a network returns while it trains, each with its share in the loss.

    Args:
        outputs: logits, or a named tuple of `logits` and those of further classifiers.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(outputs, torch.Tensor):
        return [(1.0, outputs)]
    shares = {"logits": 1.0, **_AUXILIARY}
    names = getattr(outputs, "_fields", ())
    if "logits" not in names or not set(names) <= set(shares):
        raise ValueError(f"it returns {type(outputs).__name__}, which is no output of a classifier")
    return [(shares[name], getattr(outputs, name)) for name in names if getattr(outputs, name) is not None]


def require_image_sizes(
    model: nn.Module, name: str, *, train: Iterable[int], batch_size: int, val: int | None
) -> None:
    """Refuse a network that cannot take the images of a run, before anything is computed.

    Shapes are passed through it, without values. What they cannot pass is tried out with values too, since not every
    network can be computed without.

    Args:
        model: as it was built, on the CPU; neither it nor the random numbers to come are changed.
        name: of it, for messages.
        train: sides of the training images, pixels.
        batch_size: of training images at a time on this rank.
        val: side of the validation images, pixels; None where there are none.

    Raises:
        ValueError: it raised something, in which case training would.
    """
    was_training = model.training
    try:
        validated = [] if val is None else [(False, val)]
        for training, size in [*((True, size) for size in sorted(set(train))), *validated]:
            model.train(training)
            images = batch_size if training else 1
            if _passes(model, images, size, "meta") is not None and (
                error := _passes(model, min(images, 2), size, "cpu")
            ):
                what = "train" if training else "be validated"
                shown = f"{images} image{'s' if images > 1 else ''} of {size} × {size} pixels"
                raise ValueError(
                    f"model {name} cannot {what} on {shown} at a time: {_first_line(error)}; {_advice(error)}"
                )
    finally:
        model.train(was_training)


def _passes(model: nn.Module, images: int, size: int, device: str) -> Exception | None:
    """Call the network on copies of its buffers; return what it raised."""
    given: dict[str, torch.Tensor] = {}
    copies: dict[torch.Tensor, torch.Tensor] = {}
    # Each module by one name, each tensor of it by all: functional_call, which finds further names of a module by its
    # tensors, would leave the copies there.
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            given[name] = copies.setdefault(parameter, parameter.detach().to(device))
        for name, buffer in module.named_buffers(prefix, recurse=False, remove_duplicate=False):
            given[name] = copies.setdefault(buffer, buffer.to(device, copy=True))
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        try:
            zeros = torch.zeros(images, 3, size, size, device=device)
            weighted_logits(functional_call(model, given, (zeros,), tie_weights=False))
        except Exception as error:  # of whatever a network checks
            return error
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _advice(error: Exception) -> str:
    if "more than 1 value per channel" in str(error):
        return "batch norm needs two values: choose a larger batch_size / (ranks × accumulation_steps) or image size"
    return "choose other sizes (data.image_size, train_image_size, crop_size, progressive), or another model"


class ResNet20(nn.Module):
    """The 20-layer residual network for CIFAR-10 (He et al. 2016, section 4.2; shortcuts without parameters).

    Takes images of shape (batch, 3, height, width) of any size from 4×4 on; 272,474 parameters for 10 classes.
    """

    def __init__(self, num_classes: int, *, zero_init_gamma: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        blocks = []
        for width_in, width, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
            blocks += [_Block(width_in, width, stride), _Block(width, width, 1), _Block(width, width, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, _Block) and zero_init_gamma:
                nn.init.zeros_(cast(nn.BatchNorm2d, module.residual[-1]).weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute logits, shape (batch, num_classes)."""
        features = self.blocks(self.stem(images)).mean(dim=(2, 3))
        logits: torch.Tensor = self.classifier(features)
        return logits


class _Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.stride, self.padding = stride, (width - width_in) // 2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        shortcut = features
        if self.padding:
            shortcut = functional.pad(
                features[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding)
            )
        return functional.relu(self.residual(features) + shortcut)
