"""Read the index of a checkpoint of `torch.distributed.checkpoint`, which is a pickle, as data alone.

Nothing that it names is run or imported: it is taken apart into `Record`s, whatever classes it names, and must name
those of torch's own format only. The tensors beside it are read by `pickles.read_value`.
"""

import io
import pickle
from pathlib import Path
from typing import IO, Any, Final

import torch

from arsg_dist.safe_io.files import MiB, read_bytes
from arsg_dist.safe_io.text import printable

_PICKLE_LIMIT: Final = 256 * MiB

_METADATA: Final = "torch.distributed.checkpoint.metadata"
_KNOWN: Final = frozenset(
    {
        *(
            (_METADATA, name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
        ("pathlib._local", "PosixPath"),
        ("pathlib._local", "WindowsPath"),
        ("collections", "OrderedDict"),
    }
)


class Record:
    """Hold what a pickle gives an object: arguments and state. Its class is another one in each file."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        vars(self)["state"] = state

    def __setitem__(self, key: Any, value: Any) -> None:
        raise pickle.UnpicklingError("an object is filled as a dictionary")

    def get(self, name: str) -> Any:
        """Return an attribute; None if the file gives none of this name."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class _Reader(pickle.Unpickler):
    """Build a class of `Record` for each known name, and refuse all others."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._classes: dict[tuple[str, str], type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"names {module}.{name}, which reading it would execute")
        # A class of its own in each file: what a file does to it is gone with the file.
        return self._classes.setdefault((module, name), type(name, (Record,), {}))

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("refers to something outside")


def read_index(path: Path) -> Record:
    """Read `.metadata`, the index of a checkpoint.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is no regular file, damaged, or names something that is not the format's.
    """
    content = read_bytes(path, limit=_PICKLE_LIMIT)
    try:
        index = _Reader(io.BytesIO(content)).load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is a pickle and {printable(error, limit=300)}: refused, or it is damaged"
        ) from error
    except Exception as error:  # whatever damaged content makes the reader raise
        raise ValueError(f"{path} is damaged, or no index of torch.distributed.checkpoint") from error
    if not isinstance(index, Record) or type(index).__name__ != "Metadata":
        raise ValueError(f"{path} is no index of torch.distributed.checkpoint")
    return index
