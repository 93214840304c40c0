"""`manifest.json`: what a checkpoint holds, in which file every part of it lies, and the digest of each part."""

import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from arsg_dist.checkpoint.safetensors_file import DTYPES
from arsg_dist.engine.state import Group, TensorSpec

NAME: Final = "manifest.json"
FORMAT: Final = "arsg_dist checkpoint"
VERSION: Final = 1

_DTYPES: Final = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_SHARD: Final = re.compile(r"shard-\d{5,9}\.safetensors")


@dataclass(frozen=True)
class StoredPiece:
    """Where consecutive elements of a tensor lie.

    Attributes:
        shard: name of the file.
        start: first element, counted in the tensor's order.
        numel: how many.
        digest: SHA-256 of their bytes, in hexadecimal.
    """

    shard: str
    start: int
    numel: int
    digest: str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and its pieces, which cover it in ascending order."""

    spec: TensorSpec
    pieces: list[StoredPiece]


@dataclass
class Manifest:
    """The content of `manifest.json`; the attributes of `EngineState` mean the same here.

    Attributes:
        world_size: ranks that wrote it.
        packages: name → version, where it was written.
        progress: of the program that saved: anything JSON knows.
        shards: file name → bytes.
        tensors: key → what and where it is.
    """

    engine: str
    world_size: int
    packages: dict[str, str]
    groups: list[Group]
    numbers: dict[str, dict[str, Any]]
    aliases: dict[str, str]
    loss_scale: dict[str, Any] | None
    counters: dict[str, int]
    progress: dict[str, Any]
    shards: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Writes the file; raises OSError."""
        content: dict[str, Any] = {
            "engine": self.engine,
            "world_size": self.world_size,
            "packages": self.packages,
            "progress": self.progress,
            "groups": [{"settings": g.settings, "parameters": g.parameters} for g in self.groups],
            "numbers": encode_numbers(self.numbers),
            "aliases": self.aliases,
            "loss_scale": self.loss_scale,
            "counters": self.counters,
            "shards": self.shards,
            "tensors": {key: encode_tensor(tensor) for key, tensor in self.tensors.items()},
        }
        head = {"format": FORMAT, "version": VERSION, "digest": _digest(content)}
        (directory / NAME).write_text(_readable(head | content), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Reads and checks the file.

        Raises:
            ValueError: it is missing, damaged, or of another format; the message says which.
        """
        path = directory / NAME
        if not path.is_file():
            raise ValueError(_not_a_checkpoint(directory))
        try:
            content = json.loads(path.read_bytes())
            if content.pop("format") != FORMAT:
                raise KeyError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: it is no manifest of a checkpoint") from error
        version = content.pop("version", None)
        if version != VERSION:
            raise ValueError(
                f"{path} is of format version {version}, and this arsg-dist reads version {VERSION}"
            )
        if content.pop("digest", None) != _digest(content):
            raise ValueError(f"{path} is damaged: its digest does not match")
        try:
            return cls._parse(content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} does not describe a checkpoint: {error}") from error

    @classmethod
    def _parse(cls, content: dict[str, Any]) -> "Manifest":
        manifest = cls(
            engine=str(content["engine"]),
            world_size=int(content["world_size"]),
            packages=dict(content["packages"]),
            groups=[Group(dict(group["settings"]), list(group["parameters"])) for group in content["groups"]],
            numbers=decode_numbers(content["numbers"]),
            aliases=dict(content["aliases"]),
            loss_scale=content["loss_scale"],
            counters=dict(content["counters"]),
            progress=dict(content["progress"]),
            shards={name: int(size) for name, size in content["shards"].items()},
            tensors={key: decode_tensor(tensor) for key, tensor in content["tensors"].items()},
        )
        manifest.check()
        return manifest

    def check(self) -> None:
        """Raises ValueError unless every element of every tensor is in exactly one piece of a known shard."""
        for name in self.shards:
            if not _SHARD.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a shard")
        if self.loss_scale is not None and not (
            isinstance(self.loss_scale.get("kind"), str) and isinstance(self.loss_scale.get("scale"), float)
        ):
            raise ValueError(f"the loss scale is {self.loss_scale}")
        for key, tensor in self.tensors.items():
            end = 0
            for piece in tensor.pieces:
                if piece.start != end or piece.numel < 1 or piece.shard not in self.shards:
                    raise ValueError(f"the pieces of {key!r} do not fit together at element {end}")
                end += piece.numel
            if end != tensor.spec.numel:
                raise ValueError(f"{key!r} has {tensor.spec.numel} elements, of which {end} are there")


def encode_tensor(tensor: StoredTensor) -> dict[str, Any]:
    """For JSON."""
    spec = tensor.spec
    return {
        "dtype": str(spec.dtype).removeprefix("torch."),
        "shape": list(spec.shape),
        **({"order": list(spec.order)} if spec.order else {}),
        "pieces": [[piece.shard, piece.start, piece.numel, piece.digest] for piece in tensor.pieces],
    }


def decode_tensor(content: dict[str, Any]) -> StoredTensor:
    """From JSON.

    Raises:
        ValueError: content that is no tensor; or KeyError, TypeError.
    """
    shape, order = tuple(map(int, content["shape"])), tuple(map(int, content.get("order", ())))
    if any(size < 0 for size in shape) or (order and sorted(order) != list(range(len(shape)))):
        raise ValueError(f"shape {shape} and order {order}")
    pieces = [StoredPiece(str(s), int(start), int(numel), str(d)) for s, start, numel, d in content["pieces"]]
    return StoredTensor(TensorSpec(_DTYPES[content["dtype"]], shape, order), pieces)


def encode_numbers(numbers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For JSON; tensors without dimensions keep their dtype."""
    return {
        name: {
            key: {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
            if isinstance(value, Tensor)
            else value
            for key, value in entries.items()
        }
        for name, entries in numbers.items()
    }


def decode_numbers(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """From JSON."""
    return {
        name: {
            key: torch.tensor(value["value"], dtype=_DTYPES[value["dtype"]])
            if isinstance(value, dict)
            else value
            for key, value in entries.items()
        }
        for name, entries in content.items()
    }


def merge_tensors(parts: list[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """The tensors of all ranks, their pieces in ascending order.

    Raises:
        ValueError: two ranks describe a tensor differently.
    """
    merged: dict[str, StoredTensor] = {}
    for key, tensor in itertools.chain.from_iterable(part.items() for part in parts):
        known = merged.setdefault(key, StoredTensor(tensor.spec, []))
        if known.spec != tensor.spec:
            raise ValueError(f"ranks have {key!r} as {known.spec} and as {tensor.spec}")
        known.pieces.extend(tensor.pieces)
    for tensor in merged.values():
        tensor.pieces.sort(key=lambda piece: piece.start)
    return merged


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _readable(content: dict[str, Any]) -> str:
    """JSON with one line per tensor."""
    tensors = content["tensors"]
    head = json.dumps({**content, "tensors": {}}, indent=1, ensure_ascii=False)
    lines = ",\n".join(
        f"  {json.dumps(key, ensure_ascii=False)}: {json.dumps(value)}" for key, value in tensors.items()
    )
    assert head.endswith('"tensors": {}\n}')
    return head.removesuffix("{}\n}") + "{\n" + lines + "\n }\n}\n"


def _not_a_checkpoint(directory: Path) -> str:
    if not directory.is_dir():
        return f"checkpoint {directory} does not exist"
    if (directory / "replicated.pt").is_file() or (directory / "deepspeed").is_dir():
        return (
            f"{directory} is of an earlier version of arsg-dist, whose checkpoints are not read. One that DeepSpeed "
            f"wrote can be converted: arsg-dist checkpoint convert {directory / 'deepspeed'} OUTPUT"
        )
    return f"{directory} holds no checkpoint: {NAME} is missing"
