"""Write a run's weights in the formats of other programs, each loaded back and compared before it is kept."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn

from arsg_dist.imagenet.data.transforms import MEAN, STD, val_resize
from arsg_dist.imagenet.models import TIMM, build_model
from arsg_dist.imagenet.output.export import Extra, export
from arsg_dist.imagenet.output.run_directory import read_classes, read_config
from arsg_dist.imagenet.trained import open_trained
from arsg_dist.safe_io.files import replacing, write_text

Format = Literal["safetensors", "torchvision", "timm", "onnx"]
FORMATS: Final[tuple[Format, ...]] = get_args(Format)
_PAPERS: Final = "resnet20"
_TOLERANCE: Final = 1e-4
"""Largest difference of a logit from that of the run's network, relative to the largest logit."""


@dataclass(frozen=True)
class _Source:
    """A run's network with its weights, and the settings of its images."""

    name: str
    module: nn.Module
    classes: list[str]
    image_size: int
    cropped: bool

    def images(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, 3, self.image_size, self.image_size, generator=generator)


def export_as(format_: Format, run: Path, output: Path, weights: str) -> Path:
    """Export a run's weights, in safetensors and besides in a format.

    Args:
        format_: "safetensors" for nothing besides; "torchvision": a state dict for a model of it; "timm": a directory
            that timm loads as "local-dir:DIRECTORY"; "onnx".
        run: as for `export`.
        output: as for `export`.
        weights: as for `export`.

    Returns:
        Path of the file in the format.

    Raises:
        ValueError: as for `export`; or the library has no such network, or computes something else with the weights.
        ImportError: a package is missing; the message says which.
        OSError: a file cannot be read or written.
    """
    if format_ == "safetensors":
        return export(run, output, weights)
    made: list[str] = []

    def besides(file: Path) -> list[Extra]:
        extras = _MAKERS[format_](_source(run, file))
        made.extend(extra.name for extra in extras)
        return extras

    path = export(run, output, weights, besides)
    return path.with_name(made[0]) if made else path


def _source(run: Path, weights: Path) -> _Source:
    config, classes = read_config(run), read_classes(run)
    module = build_model(config["model"], len(classes))
    open_trained(weights).load_into(module, "x")
    data = config["data"]
    return _Source(
        config["model"], module.eval(), classes, data["image_size"], data["augmentation"] == "imagenet"
    )


def _torchvision(source: _Source) -> list[Extra]:
    name = source.name.removeprefix(TIMM)
    if source.name == _PAPERS:
        raise ValueError(
            "resnet20 is the paper's network for CIFAR-10, which torchvision does not have: use onnx"
        )
    _require_equal(source, name, "torchvision")
    lines = [
        "import torch",
        "import torchvision",
        "",
        f"model = torchvision.models.get_model({name!r}, num_classes={len(source.classes)})",
        'model.load_state_dict(torch.load("model.pth", weights_only=True))',
    ]

    def write(path: Path) -> None:
        state = {key: tensor.contiguous() for key, tensor in source.module.state_dict().items()}
        with replacing(path) as partial:
            torch.save(state, partial)

    return [Extra("model.pth", write, lines)]


def _timm(source: _Source) -> list[Extra]:
    name = source.name.removeprefix(TIMM)
    if source.name == _PAPERS:
        raise ValueError("resnet20 is the paper's network for CIFAR-10, which timm does not have: use onnx")
    _require_equal(source, TIMM + name, "timm")
    size = source.image_size
    about = {
        "architecture": name,
        "num_classes": len(source.classes),
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "crop_mode": "center" if source.cropped else "squash",
            "crop_pct": size / val_resize(size) if source.cropped else 1.0,
            "interpolation": "bilinear",
            "mean": list(MEAN),
            "std": list(STD),
            "num_classes": len(source.classes),
            "label_names": source.classes,
        },
    }
    lines = ["import timm", "", 'model = timm.create_model("local-dir:.", pretrained=True)']
    return [Extra("config.json", lambda path: write_text(path, json.dumps(about, indent=2) + "\n"), lines)]


def _require_equal(source: _Source, name: str, library: str) -> None:
    """Refuse a library's network that is not the run's, by its names and by what it computes."""
    other = build_model(name, len(source.classes))
    mine, theirs = (
        {key: tensor.shape for key, tensor in module.state_dict().items()}
        for module in (source.module, other)
    )
    if mine != theirs:
        raise ValueError(
            f"{library} has a {name.removeprefix(TIMM)} with other tensors than {source.name}, that the run trained: "
            "export it as onnx, or leave --format out"
        )
    other.load_state_dict(source.module.state_dict())
    _compare(source, other.eval(), f"{library}'s {name.removeprefix(TIMM)}")


def _compare(source: _Source, compute: Callable[[Tensor], Any], what: str) -> None:
    images = source.images(2)
    with torch.no_grad():
        right, found = source.module(images), compute(images)
    difference = float((found - right).abs().max() / right.abs().max().clamp(min=1e-12))
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"{what} computes other logits from these weights than {source.name}, off by {difference:.2g}"
        )


def _onnx(source: _Source) -> list[Extra]:
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise ImportError(f"--format onnx needs {', '.join(missing)}: pip install 'arsg-dist[onnx]'")
    lines = [
        "import onnxruntime",
        "",
        'session = onnxruntime.InferenceSession("model.onnx")',
        '(logits,) = session.run(["logits"], {"images": images})  # float32 (any number, 3, '
        f"{source.image_size}, {source.image_size})",
    ]

    def write(path: Path) -> None:
        import onnxruntime

        with replacing(path) as partial:
            torch.onnx.export(
                source.module,
                (source.images(2),),
                partial,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            session = onnxruntime.InferenceSession(str(partial))

            def compute(images: Tensor) -> Tensor:
                # One by one: a number of images that was built in would be another one.
                outputs = [session.run(["logits"], {"images": image[None].numpy()})[0] for image in images]
                return torch.cat([torch.from_numpy(output) for output in outputs])

            _compare(source, compute, "the ONNX file")

    return [Extra("model.onnx", write, lines)]


_MAKERS: Final[dict[str, Callable[[_Source], list[Extra]]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "onnx": _onnx,
}
