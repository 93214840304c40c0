"""Write and read `manifest.json`: a checkpoint's tensors, files and digests.

A manifest may come from anybody: every value is checked for its kind, and every size against the shards' before memory
is asked for.
"""

import hashlib
import itertools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from arsg_dist.checkpoint.safetensors_file import DTYPES
from arsg_dist.engine.state import BUFFER, EXTRA, PARAMETER, Group, TensorSpec, key_of
from arsg_dist.safe_io.documents import parse_json
from arsg_dist.safe_io.files import MiB, read_text, write_text
from arsg_dist.safe_io.text import printable

NAME: Final = "manifest.json"
FORMAT: Final = "arsg_dist checkpoint"
VERSION: Final = 1
LIMIT: Final = 128 * MiB
"""Bytes that a manifest may have; 4,096 ranks with the statistics of a ResNet-50 each make as many."""

_MAX_DIMS: Final = 64
_MAX_NUMEL: Final = 1 << 48
"""Elements of a tensor, dimensions of size 0 counted as 1: torch's strides fit in their integers."""
_DTYPES: Final = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_SHARD: Final = re.compile(r"shard-[0-9]{5,9}\.safetensors")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredPiece:
    """Say where consecutive elements of a tensor lie.

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
    """Describe a tensor and its pieces, which cover it in ascending order."""

    spec: TensorSpec
    pieces: list[StoredPiece]


@dataclass
class Manifest:
    """Hold the content of `manifest.json`; attributes of `EngineState` mean the same.

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
        """Write the file.

        Raises:
            OSError: it cannot be written.
            ValueError: it would be larger than `LIMIT`, and not be read again.
        """
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
        text = _readable(head | content)
        if len(text.encode()) > LIMIT:
            raise ValueError(
                f"the manifest of this checkpoint would have more than {LIMIT // MiB} MiB: save from fewer ranks, or "
                "tensors in fewer pieces"
            )
        write_text(directory / NAME, text)

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read and check the file.

        Raises:
            ValueError: it is missing, damaged, or of another format; the message says which.
        """
        path = directory / NAME
        try:
            text = read_text(path, limit=LIMIT)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(_not_a_checkpoint(directory)) from error
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        try:
            content = _mapping(parse_json(text, str(path)), "it")
            if content.pop("format", None) != FORMAT:
                raise ValueError("it does not name the format")
        except ValueError as error:
            raise ValueError(f"{path} is damaged: it is no manifest of a checkpoint ({error})") from error
        version = content.pop("version", None)
        if version != VERSION:
            raise ValueError(
                f"{path} is of format version {printable(version, limit=20)}, and this arsg-dist reads version "
                f"{VERSION}"
            )
        if content.pop("digest", None) != _digest(content):
            raise ValueError(f"{path} is damaged: its digest does not match")
        try:
            return cls._parse(content)
        except KeyError as error:
            raise ValueError(f"{path} does not describe a checkpoint: it lacks {error}") from error
        except ValueError as error:
            raise ValueError(f"{path} does not describe a checkpoint: {error}") from error

    @classmethod
    def _parse(cls, content: dict[str, Any]) -> "Manifest":
        manifest = cls(
            engine=_text(content["engine"], "engine"),
            world_size=_count(content["world_size"], "world_size"),
            packages={name: _text(v, name) for name, v in _mapping(content["packages"], "packages").items()},
            groups=[_group(group) for group in _list(content["groups"], "groups")],
            numbers=decode_numbers(_mapping(content["numbers"], "numbers")),
            aliases={name: _text(v, name) for name, v in _mapping(content["aliases"], "aliases").items()},
            loss_scale=None
            if content["loss_scale"] is None
            else _mapping(content["loss_scale"], "loss_scale"),
            counters={name: _count(v, name) for name, v in _mapping(content["counters"], "counters").items()},
            progress=_mapping(content["progress"], "progress"),
            shards={name: _count(v, name) for name, v in _mapping(content["shards"], "shards").items()},
            tensors={
                k: decode_tensor(tensor) for k, tensor in _mapping(content["tensors"], "tensors").items()
            },
        )
        manifest.check()
        return manifest

    def check(self) -> None:
        """Check that the parts make a whole.

        Raises:
            ValueError: an element of a tensor is in no piece of a known shard or in several, the pieces of a shard have
                more bytes than it, or a name stands for nothing or for two things.
        """
        for name in self.shards:
            if not _SHARD.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a shard")
        if len(self.shards) != self.world_size:
            raise ValueError(f"{self.world_size} ranks wrote it, but it has {len(self.shards)} shards")
        if self.loss_scale is not None and not (
            isinstance(self.loss_scale.get("kind"), str) and isinstance(self.loss_scale.get("scale"), float)
        ):
            raise ValueError(f"the loss scale is {printable(self.loss_scale, limit=100)}")
        self._check_names()
        self._check_pieces()

    def _check_names(self) -> None:
        names: dict[str, set[str]] = {PARAMETER: set(), BUFFER: set(), EXTRA: set()}
        for key in self.tensors:
            entry, _, name = key.partition(":")
            if not (entry and name):
                raise ValueError(f"{key!r} is no key of a tensor")
            names.setdefault(entry, set()).add(name)
        parameters = names[PARAMETER]
        states = set().union(
            *(held for entry, held in names.items() if entry not in (PARAMETER, BUFFER, EXTRA))
        )
        grouped = [name for group in self.groups for name in group.parameters]
        for what, found in (
            ("the optimizer's state", states | self.numbers.keys()),
            ("a group", grouped),
            ("the tied names", self.aliases.values()),
        ):
            if unknown := set(found) - parameters:
                raise ValueError(f"{what} is of {min(unknown)!r}, which is no parameter")
        if len(grouped) != len(set(grouped)):
            raise ValueError("a parameter is in two groups")
        for name, entries in self.numbers.items():
            if both := [entry for entry in entries if key_of(entry, name) in self.tensors]:
                raise ValueError(f"{both[0]!r} of {name!r} is a number and a tensor")
        if twice := self.aliases.keys() & parameters or names[BUFFER] & (parameters | self.aliases.keys()):
            raise ValueError(f"{min(twice)!r} is the name of two tensors")

    def _check_pieces(self) -> None:
        held = dict.fromkeys(self.shards, 0)
        for key, tensor in self.tensors.items():
            end = 0
            for piece in tensor.pieces:
                if piece.start != end or piece.numel < 1 or piece.shard not in self.shards:
                    raise ValueError(f"the pieces of {key!r} do not fit together at element {end}")
                end += piece.numel
                held[piece.shard] += piece.numel * tensor.spec.dtype.itemsize
            if end != tensor.spec.numel:
                raise ValueError(f"{key!r} has {tensor.spec.numel} elements, of which {end} are there")
        for name, size in held.items():
            if size > self.shards[name]:
                raise ValueError(f"{name} has {self.shards[name]} bytes, of which its pieces take {size}")


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
    """Decode what `encode_tensor` made.

    Raises:
        ValueError: content that is no tensor, or larger than any.
        KeyError: a part is missing.
    """
    content = _mapping(content, "a tensor")
    shape, order = _counts(content["shape"], "a shape"), _counts(content.get("order", []), "an order")
    if len(shape) > _MAX_DIMS or math.prod(max(size, 1) for size in shape) > _MAX_NUMEL:
        raise ValueError(f"no tensor has the shape {printable(list(shape), limit=100)}")
    if order and sorted(order) != list(range(len(shape))):
        raise ValueError(f"shape {list(shape)} and order {printable(list(order), limit=100)}")
    pieces = [_piece(piece) for piece in _list(content["pieces"], "the pieces of a tensor")]
    return StoredTensor(TensorSpec(_dtype(content["dtype"]), shape, order), pieces)


def _piece(content: Any) -> StoredPiece:
    if len(_list(content, "a piece")) != 4:
        raise ValueError("a piece is a shard, a start, a number of elements and a digest")
    shard, start, numel, digest = content
    if not _DIGEST.fullmatch(_text(digest, "a digest")):
        raise ValueError(f"{printable(digest, limit=80)!r} is no digest")
    return StoredPiece(_text(shard, "a shard"), _count(start, "a start"), _count(numel, "a size"), digest)


def _group(content: Any) -> Group:
    content = _mapping(content, "a group")
    settings = _mapping(content["settings"], "the settings of a group")
    for key, value in settings.items():
        _check_setting(key, value)
    return Group(settings, [_text(name, "a name") for name in _list(content["parameters"], "a group")])


def _check_setting(key: str, value: Any) -> None:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, list):
            _check_setting(key, item)
        elif not (item is None or isinstance(item, str | bool | float) or _is_int64(item)):
            raise ValueError(f"the setting {key!r} of a group is {printable(item, limit=100)}")


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
    """Decode what `encode_numbers` made.

    Raises:
        ValueError: something that is no number, or one that its dtype does not hold.
        KeyError: a part is missing.
    """
    return {
        name: {key: _number(key, value) for key, value in _mapping(entries, name).items()}
        for name, entries in content.items()
    }


def _number(key: str, value: Any) -> Any:
    plain = value["value"] if isinstance(value, dict) else value
    if not (plain is None or isinstance(plain, bool | float) or _is_int64(plain)):
        raise ValueError(f"{key!r} is {printable(plain, limit=100)}, and no number")
    if not isinstance(value, dict):
        return plain
    try:
        return torch.tensor(plain, dtype=_dtype(value["dtype"]))
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{key!r} is {printable(plain, limit=100)}, which {value['dtype']} does not hold"
        ) from error


def _is_int64(value: Any) -> bool:
    return isinstance(value, int) and -(1 << 63) <= value < 1 << 63


def _dtype(name: Any) -> torch.dtype:
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"{printable(name, limit=40)!r} is no dtype")
    return _DTYPES[name]


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no mapping")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is no list")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is no text")
    return value


def _count(value: Any, what: str) -> int:
    if isinstance(value, bool) or not _is_int64(value) or value < 0:
        raise ValueError(f"{printable(what, limit=100)} is no number of things")
    return int(value)


def _counts(value: Any, what: str) -> tuple[int, ...]:
    return tuple(_count(item, what) for item in _list(value, what))


def merge_tensors(parts: list[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """Merge the tensors of all ranks, their pieces in ascending order.

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
            f"wrote can be converted: arsg-dist checkpoint convert {directory / 'deepspeed'} OUTPUT (its files are "
            "pickles: the command takes data alone from them and executes nothing)"
        )
    return f"{directory} holds no checkpoint: {NAME} is missing"
