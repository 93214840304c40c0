"""Read any part of a checkpoint on any rank, checked against its digest."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arsg_dist.checkpoint.manifest import Manifest, StoredPiece, StoredTensor
from arsg_dist.checkpoint.writer import digest_of, piece_name
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import BUFFER, EXTRA, PARAMETER, TensorSpec, from_order, in_order, key_of
from arsg_dist.safe_io.files import open_regular


class SavedRun(SavedState):
    """Read a checkpoint directory; nothing in it is executed, whoever wrote it.

    Args:
        directory: of the checkpoint. It may be a link, its files may not.

    Raises:
        ValueError: there is none, its manifest is damaged, or it is of another format.

    Attributes:
        manifest: what it holds.
        progress: of the program that saved it.
    """

    def __init__(self, directory: str | Path) -> None:
        self.where = Path(directory)
        self.manifest = Manifest.read(self.where)
        self.groups = [group.settings for group in self.manifest.groups]
        self.group_of = {
            name: index for index, group in enumerate(self.manifest.groups) for name in group.parameters
        }
        self.aliases, self.loss_scale = self.manifest.aliases, self.manifest.loss_scale
        self.counters = self.manifest.counters
        self.progress = self.manifest.progress
        self._open: dict[str, Any] = {}
        self._checked: set[tuple[str, int]] = set()
        self._last: tuple[str, Tensor] | None = None

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """Entry → names of parameters, buffers or extras."""
        names: dict[str, list[str]] = {}
        for key in self.manifest.tensors:
            entry, _, name = key.partition(":")
            names.setdefault(entry, []).append(name)
        return names

    @cached_property
    def _entries(self) -> dict[str, set[str]]:
        entries: dict[str, set[str]] = {name: set(held) for name, held in self.manifest.numbers.items()}
        for entry, names in self._names.items():
            if entry not in (PARAMETER, BUFFER, EXTRA):
                for name in names:
                    entries.setdefault(name, set()).add(entry)
        return entries

    @property
    def parameters(self) -> list[str]:
        """See `SavedState`."""
        return self._names.get(PARAMETER, [])

    @property
    def trained(self) -> list[str]:
        """See `SavedState`."""
        assert self.group_of is not None
        return list(self.group_of)

    @property
    def buffers(self) -> list[str]:
        """See `SavedState`."""
        return self._names.get(BUFFER, [])

    @property
    def extras(self) -> list[str]:
        """List the tensors that the program added to the engine's."""
        return self._names.get(EXTRA, [])

    def entries(self, name: str) -> set[str]:
        """See `SavedState`."""
        return self._entries.get(name, set())

    def spec(self, entry: str, name: str) -> TensorSpec | None:
        """See `SavedState`."""
        tensor = self.manifest.tensors.get(key_of(entry, name))
        return tensor.spec if tensor else None

    def number(self, name: str, entry: str) -> Any:
        """See `SavedState`."""
        value = self.manifest.numbers[name][entry]
        return value.clone() if isinstance(value, Tensor) else value

    def read(
        self, entry: str, name: str, start: int = 0, numel: int | None = None, order: tuple[int, ...] = ()
    ) -> Tensor:
        """See `SavedState`."""
        key = key_of(entry, name)
        tensor = self.manifest.tensors.get(key)
        if tensor is None:
            raise ValueError(f"{self.where} has no {entry} of {name!r}")
        numel = tensor.spec.numel - start if numel is None else numel
        if order == tensor.spec.order:
            return self._range(key, tensor, start, numel)
        if self._last is None or self._last[0] != key:
            self._last = key, self._range(key, tensor, 0, tensor.spec.numel)
        whole = from_order(self._last[1], tensor.spec.shape, tensor.spec.order)
        return in_order(whole, order).narrow(0, start, numel)

    def damage(self, shard: str | None = None) -> list[str]:
        """Read everything and say what is wrong, one line each.

        Args:
            shard: this file only.
        """
        found = []
        for name in [shard] if shard else self.manifest.shards:
            try:
                self._file(name)
                for key, tensor in self.manifest.tensors.items():
                    for piece in tensor.pieces:
                        if piece.shard == name:
                            self._piece(key, tensor, piece)
            except ValueError as error:
                found.append(str(error))
        return found

    def _range(self, key: str, tensor: StoredTensor, start: int, numel: int) -> Tensor:
        parts = []
        for piece in tensor.pieces:
            first, last = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if first < last:
                parts.append(self._piece(key, tensor, piece).narrow(0, first - piece.start, last - first))
        if not parts:
            return torch.empty(0, dtype=tensor.spec.dtype)
        try:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        except RuntimeError as error:  # how torch says that there is no memory
            size = numel * tensor.spec.dtype.itemsize
            raise ValueError(f"{self.where}: there is no memory for the {size:,} bytes of {key!r}") from error

    def _piece(self, key: str, tensor: StoredTensor, piece: StoredPiece) -> Tensor:
        path = self.where / piece.shard
        try:
            values: Tensor = self._file(piece.shard).get_tensor(piece_name(key, piece.start))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or of another checkpoint: it has no {key!r}") from error
        if values.dtype != tensor.spec.dtype or values.shape != (piece.numel,):
            raise ValueError(f"{path} is damaged, or of another checkpoint: {key!r} is of another size")
        if (key, piece.start) not in self._checked:
            if digest_of(values) != piece.digest:
                raise ValueError(
                    f"{path} is damaged, or of another checkpoint: the digest of {key!r} does not match"
                )
            self._checked.add((key, piece.start))
        return values

    def _file(self, shard: str) -> Any:
        if shard not in self._open:
            path, size = self.where / shard, self.manifest.shards[shard]
            try:
                with open_regular(path) as file:
                    found = os.fstat(file.fileno()).st_size
                if found != size:
                    raise ValueError(f"{path} is damaged: it has {found} bytes and had {size}")
                self._open[shard] = safe_open(path, framework="pt")
            except FileNotFoundError as error:
                raise ValueError(f"{path} is missing") from error
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is damaged: {error}") from error
        return self._open[shard]
