"""Read and write checkpoints of `torch.distributed.checkpoint` (DCP), as a script of one's own under FSDP2 makes them.

Read are the two common layouts: a model and an optimizer under names of their own, ``{"model": ..., "optim": ...}`` of
`get_state_dict` (also inside a further dictionary, as ``{"app": ...}``), and torchtitan's, whose model lies beside
"optimizer". Parameter groups may be a list, or flat by the names of parameters.
"""

import math
import re
import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from arsg_dist.checkpoint.convert import check_new, members_of, number_or_tensor
from arsg_dist.checkpoint.dcp_index import Record, read_index
from arsg_dist.checkpoint.pickles import read_value
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import BUFFER, PARAMETER, TensorSpec, in_order
from arsg_dist.safe_io.files import inside, new_directory, open_regular
from arsg_dist.safe_io.text import printable

INDEX: Final = ".metadata"

_OPTIMIZER: Final = re.compile(r"(?P<root>(?:.*\.)?)(?P<name>optim|optimizer)\.(?:state|param_groups)\.")
_TITAN: Final = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")
"""What torchtitan keeps beside the model's tensors."""

_STATISTICS: Final = frozenset({"running_mean", "running_var", "num_batches_tracked"})
_SHOWN: Final = 5

# What optimizers have in their groups and our format leaves out: a load asks for it.
_IMPLEMENTATION: Final = {
    "foreach": None,
    "fused": None,
    "capturable": False,
    "differentiable": False,
    "master": None,
}


class DCPCheckpoint(SavedState):
    """Read a checkpoint that `torch.distributed.checkpoint` wrote, of any number of ranks.

    A state dict does not tell what is no parameter of the optimizer: batch norm's statistics and what is not floating
    point are buffers, a tensor with the values of a trained parameter is a further name of it, others must be named.

    Args:
        directory: with the file `.metadata`.
        buffers: names of buffers, or patterns with ``*``.
        frozen: names of frozen parameters, or patterns.

    Raises:
        ValueError: there is no such checkpoint, its index is damaged or names what is not the format's, it has no
            optimizer, or it does not tell what some tensors are.

    Attributes:
        left_out: names of what the checkpoint has besides model and optimizer.
    """

    def __init__(self, directory: Path, *, buffers: Iterable[str] = (), frozen: Iterable[str] = ()) -> None:
        self.where = directory
        try:
            index = read_index(directory / INDEX)
        except FileNotFoundError as error:
            raise ValueError(f"{directory} holds no checkpoint of torch.distributed.checkpoint") from error
        self._stored, self._plain, self._where = _parse(index, directory)
        keys = [*self._stored, *self._plain]
        found = next((match for key in keys if (match := _OPTIMIZER.match(key))), None)
        if found is None:
            raise ValueError(
                f"{directory} has no optimizer's state under 'optim' or 'optimizer': save "
                '{"model": ..., "optim": ...} of torch.distributed.checkpoint.state_dict.get_state_dict'
            )
        root, optimizer = found["root"], f"{found['root']}{found['name']}."
        beside = f"{root}model."
        if any(key.startswith(beside) for key in keys):
            of_model = {key.removeprefix(beside): key for key in self._stored if key.startswith(beside)}
        else:
            skipped = (optimizer, *(f"{root}{name}" for name in _TITAN))
            of_model = {
                key.removeprefix(root): key
                for key in self._stored
                if key.startswith(root) and not key.startswith(skipped)
            }
        self._model = of_model
        known = set(of_model.values())
        self.left_out = [key for key in keys if key not in known and not key.startswith(optimizer)]
        self._state = self._state_keys(optimizer)
        self.groups, self.group_of = self._read_groups(optimizer, keys)
        self._trained = list(self.group_of)
        self.aliases, self._buffers, self._frozen = self._sort_rest([*buffers], [*frozen])
        self.loss_scale = None

    @property
    def parameters(self) -> list[str]:
        """See `SavedState`."""
        return [*self._trained, *self._frozen]

    @property
    def trained(self) -> list[str]:
        """See `SavedState`."""
        return self._trained

    @property
    def buffers(self) -> list[str]:
        """See `SavedState`."""
        return self._buffers

    def entries(self, name: str) -> set[str]:
        """See `SavedState`."""
        return set(self._state.get(name, ()))

    def spec(self, entry: str, name: str) -> TensorSpec | None:
        """See `SavedState`."""
        if entry in (PARAMETER, BUFFER):
            known = self._buffers if entry == BUFFER else self.parameters
            return self._stored[self._model[name]][0] if name in known else None
        stored = self._stored.get(self._state.get(name, {}).get(entry, ""))
        return stored[0] if stored and stored[0].shape else None

    def number(self, name: str, entry: str) -> Any:
        """See `SavedState`."""
        return self._value(self._state[name][entry])

    def read(
        self, entry: str, name: str, start: int = 0, numel: int | None = None, order: tuple[int, ...] = ()
    ) -> Tensor:
        """See `SavedState`."""
        if self.spec(entry, name) is None:
            raise ValueError(f"{self.where} has no {entry} of {name!r}")
        key = self._model[name] if entry in (PARAMETER, BUFFER) else self._state[name][entry]
        flat = in_order(self._tensor(key), order)
        return flat.narrow(0, start, flat.numel() - start if numel is None else numel)

    def _state_keys(self, optimizer: str) -> dict[str, dict[str, str]]:
        """Find parameter → entry of its state → key."""
        found: dict[str, dict[str, str]] = {}
        prefix = f"{optimizer}state."
        for key in (*self._stored, *self._plain):
            if key.startswith(prefix):
                name, entry = self._split(key.removeprefix(prefix))
                found.setdefault(name, {})[entry] = key
        return found

    def _split(self, rest: str) -> tuple[str, str]:
        """Take the longest name of a parameter off "a.weight.exp_avg"."""
        at = rest.rfind(".")
        while at > 0:
            if rest[:at] in self._model:
                return rest[:at], rest[at + 1 :]
            at = rest.rfind(".", 0, at)
        raise ValueError(
            f"{self.where} has state of {printable(rest, limit=100)!r}, and the model no such parameter"
        )

    def _read_groups(self, optimizer: str, keys: list[str]) -> tuple[list[dict[str, Any]], dict[str, int]]:
        prefix = f"{optimizer}param_groups."
        given = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
        if any(re.fullmatch(r"\d+\.params", key) for key in given):
            listed: dict[int, dict[str, Any]] = {}
            for key in given:
                number, _, setting = key.partition(".")
                if not number.isdecimal() or len(number) > 6:
                    raise ValueError(f"{self.where} is damaged: parameter group {printable(number)!r}")
                listed.setdefault(int(number), {})[setting] = self._value(f"{prefix}{key}")
            groups = [listed[number] for number in sorted(listed)]
            members = [group.pop("params", []) for group in groups]
        else:
            by_name: dict[str, dict[str, Any]] = {}
            for key in given:
                name, setting = self._split(key)
                by_name.setdefault(name, {})[setting] = self._value(f"{prefix}{key}")
            groups, members = [], []
            for name, settings in by_name.items():
                place = next((i for i, group in enumerate(groups) if group == settings), len(groups))
                if place == len(groups):
                    groups.append(settings)
                    members.append([])
                members[place].append(name)
        group_of: dict[str, int] = {}
        for index, listed_names in enumerate(members):
            for member in listed_names if isinstance(listed_names, list) else [None]:
                if not isinstance(member, str) or member not in self._model or member in group_of:
                    raise ValueError(
                        f"{self.where} has {printable(member, limit=100)!r} in parameter group {index}, which is no "
                        "parameter of the model, or in two groups"
                    )
                group_of[member] = index
        return groups, group_of

    def _sort_rest(
        self, buffers: list[str], frozen: list[str]
    ) -> tuple[dict[str, str], list[str], list[str]]:
        """Tell further names, buffers and frozen parameters among what the optimizer does not have."""
        assert self.group_of is not None
        same: dict[TensorSpec, list[str]] = {}
        for name in self._trained:
            same.setdefault(self._stored[self._model[name]][0], []).append(name)
        found: tuple[dict[str, str], list[str], list[str]] = ({}, [], [])
        unknown = []
        for name in (name for name in self._model if name not in self.group_of):
            spec = self._stored[self._model[name]][0]
            if any(fnmatchcase(name, pattern) for pattern in frozen):
                found[2].append(name)
            elif (
                name.rpartition(".")[2] in _STATISTICS
                or not (spec.dtype.is_floating_point or spec.dtype.is_complex)
                or any(fnmatchcase(name, pattern) for pattern in buffers)
            ):
                found[1].append(name)
            elif tied := self._equal(name, same.get(spec, [])):
                found[0][name] = tied
            else:
                unknown.append(name)
        if unknown:
            more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
            raise ValueError(
                f"{self.where} does not tell whether {', '.join(map(printable, unknown[:_SHOWN]))}{more} are frozen "
                "parameters or buffers, since the optimizer has none of them: add --frozen NAMES or --buffers NAMES "
                "(patterns with *, separated by commas)"
            )
        return found

    def _equal(self, name: str, candidates: list[str]) -> str | None:
        """Find the trained parameter that a tensor is a further name of, by its values."""
        if not candidates:
            return None
        values = self._tensor(self._model[name])
        if bool((values == values.reshape(-1)[0]).all()):  # as biases that start at 0
            return None
        return next(
            (other for other in candidates if torch.equal(self._tensor(self._model[other]), values)), None
        )

    def _value(self, key: str) -> Any:
        return self._tensor(key) if key in self._stored else self._load(key, ())

    def _tensor(self, key: str) -> Tensor:
        spec, chunks = self._stored[key]
        parts = []
        for offsets, sizes in chunks:
            part = self._load(key, offsets)
            if not isinstance(part, Tensor) or part.dtype != spec.dtype or tuple(part.shape) != sizes:
                raise ValueError(f"{self.where} is damaged: a part of {printable(key)!r} is of another size")
            parts.append(part)
        if len(parts) == 1 and tuple(parts[0].shape) == spec.shape:
            return parts[0].contiguous()
        whole = torch.empty(spec.shape, dtype=spec.dtype)
        filled = torch.zeros(spec.shape, dtype=torch.bool)
        for (offsets, sizes), part in zip(chunks, parts, strict=True):
            place = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
            whole[place] = part
            filled[place] = True
        if not bool(filled.all()):
            raise ValueError(f"{self.where} is incomplete: parts of {printable(key)!r} are missing")
        return whole

    def _load(self, key: str, offsets: tuple[int, ...]) -> Any:
        name, start, length = self._where[key, offsets]
        path = inside(self.where, name)
        try:
            with open_regular(path) as file:
                file.seek(start)
                content = file.read(length)
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing") from error
        if len(content) != length:
            raise ValueError(f"{path} is damaged: it ends within {printable(key)!r}")
        return read_value(content, f"{path}, {printable(key)!r},")


_Chunks = list[tuple[tuple[int, ...], tuple[int, ...]]]


def _parse(
    index: Record, directory: Path
) -> tuple[
    dict[str, tuple[TensorSpec, _Chunks]],
    list[str],
    dict[tuple[str, tuple[int, ...]], tuple[str, int, int]],
]:
    """Check an index: tensors with their parts, other values, and where each part lies.

    Raises:
        ValueError: it is not as torch writes it.
    """
    try:
        stored: dict[str, tuple[TensorSpec, _Chunks]] = {}
        plain = []
        where = {}
        for place, info in index.get("storage_data").items():
            if info.get("transform_descriptors"):
                raise ValueError("its parts are compressed, which is not read: save it without extensions")
            offsets = place.get("offset")
            where[str(place.get("fqn")), _size(offsets) if offsets is not None else ()] = (
                str(info.get("relative_path")),
                _count(info.get("offset")),
                _count(info.get("length")),
            )
        for key, described in index.get("state_dict_metadata").items():
            if type(described).__name__ == "BytesStorageMetadata":
                where[key, ()]
                plain.append(str(key))
                continue
            properties, shape = described.get("properties"), _size(described.get("size"))
            dtype = properties.get("dtype") or properties.state[0]
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{key!r} has no dtype")
            chunks = [
                (_size(chunk.get("offsets")), _size(chunk.get("sizes"))) for chunk in described.get("chunks")
            ]
            for offsets, sizes in chunks:
                if not len(offsets) == len(sizes) == len(shape) or any(
                    at + size > whole for at, size, whole in zip(offsets, sizes, shape, strict=True)
                ):
                    raise ValueError(f"a part of {key!r} lies outside of it")
                if math.prod(sizes) * dtype.itemsize > where[key, offsets][2]:
                    raise ValueError(f"a part of {key!r} is larger than its bytes")
            if sum(math.prod(sizes) for _, sizes in chunks) != math.prod(shape):
                raise ValueError(f"parts of {key!r} are missing")
            stored[str(key)] = TensorSpec(dtype, shape), chunks
    except ValueError as error:
        raise ValueError(f"{directory / INDEX} is not as torch writes it: {printable(error)}") from error
    except (LookupError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{directory / INDEX} is not as torch writes it: {printable(said)}") from error
    return stored, plain, where


def _size(value: Any) -> tuple[int, ...]:
    if isinstance(value, Record):
        (value,) = value.arguments or ((),)
    return tuple(_count(item) for item in value)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError(f"a size is {value!r}")
    return value


class _Planner(DefaultSavePlanner):
    """Read each tensor when it is written: one at a time is in memory."""

    def __init__(self, saved: SavedState, sources: dict[int, tuple[str, str]]) -> None:
        super().__init__()
        self._saved, self._sources = saved, sources

    def lookup_object(self, index: Any) -> Any:
        value = super().lookup_object(index)
        source = self._sources.get(id(value))
        return value if source is None else self._saved.whole(*source).contiguous()


def to_dcp(saved: SavedState, target: Path, *, titan: bool = False) -> None:
    """Write a checkpoint for `torch.distributed.checkpoint.load`, as one process.

    Args:
        saved: any saved run that tells the group of each parameter.
        target: a directory that does not exist; it appears when it is complete.
        titan: torchtitan's layout, the model's tensors beside "optimizer", whose entries are flat; else "model" and
            "optim", as `get_state_dict` gives them.

    Raises:
        ValueError: the target exists, or the run lacks something, or is damaged.
        OSError: it cannot be written.
    """
    check_new(target)
    members = members_of(saved)
    sources: dict[int, tuple[str, str]] = {}
    kept = []  # so that no other object gets the number of one of these

    def later(entry: str, name: str) -> Tensor:
        spec = saved.spec(entry, name)
        assert spec is not None
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        sources[id(tensor)] = entry, name
        kept.append(tensor)
        return tensor

    model = {name: later(PARAMETER, name) for name in saved.parameters}
    model |= {alias: later(PARAMETER, name) for alias, name in saved.aliases.items()}
    model |= {name: later(BUFFER, name) for name in saved.buffers}
    groups = [
        {**_IMPLEMENTATION, **{k: tuple(v) if isinstance(v, list) else v for k, v in group.items()}}
        for group in saved.groups
    ]
    state = {
        name: {
            entry: later(entry, name) if saved.spec(entry, name) else number_or_tensor(saved, name, entry)
            for entry in sorted(saved.entries(name))
        }
        for names in members
        for name in names
        if saved.entries(name)
    }
    content: dict[str, Any]
    if titan:
        flat = {
            f"state.{name}.{entry}": value for name, held in state.items() for entry, value in held.items()
        }
        flat |= {
            f"param_groups.{name}.{setting}": value
            for group, names in zip(groups, members, strict=True)
            for name in names
            for setting, value in group.items()
        }
        content = {**model, "optimizer": flat}
    else:
        listed = [{**group, "params": names} for group, names in zip(groups, members, strict=True)]
        content = {"model": model, "optim": {"state": state, "param_groups": listed}}
    with new_directory(target) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process")
        try:
            save(
                content,
                storage_writer=FileSystemWriter(partial),
                planner=_Planner(saved, sources),
                no_dist=True,
            )
        except CheckpointException as error:
            first: Any = next(iter(error.failures.values()))[0]
            if isinstance(first, ValueError | OSError):
                raise first from error
            raise OSError(f"cannot write {target}: {str(first).splitlines()[0]}") from error
