"""Read what `torch.save` wrote, which are pickles, as data alone.

The only place of the project that calls `torch.load`. Nothing that a file names is run or imported, but the classes
that the caller lists.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import Tensor

from arsg_dist.safe_io.files import MiB
from arsg_dist.safe_io.text import printable

_PICKLE_LIMIT: Final = 256 * MiB
_SHOWN: Final = 5
_SMALL: Final = 64 * MiB


class RefusedPickleError(ValueError):
    """Report a file with more than data; `names` is what it would have executed.

    Args:
        path: of the file.
        names: what it names beyond data.
        reason: why it cannot be read, where it names nothing.
        advice: what its reader can do.
    """

    def __init__(self, path: Path, names: list[str], reason: str = "", *, advice: str) -> None:
        listed = ", ".join(printable(name, limit=100) for name in names[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        what = (
            f"names {listed}{more}, which loading it would execute"
            if names
            else "cannot be read as data alone"
        )
        super().__init__(f"{path} is a pickle and {what}{reason and f' ({reason})'}: refused. {advice}")
        self.names = names


def read_pickle(
    file: IO[bytes],
    path: Path,
    *,
    known: list[Any],
    advice: str,
    trust_pickle: bool = False,
    records: tuple[type, ...] = (),
) -> Any:
    """Read an open file that `torch.save` wrote, with its tensors mapped into memory.

    Args:
        file: the open file.
        path: of it, for messages.
        known: classes and functions that it may name, as of `torch.serialization.safe_globals`.
        advice: for the message of a file that names more.
        trust_pickle: execute what it names; otherwise it is refused.
        records: classes of `known` whose attributes may hold tensors.

    Raises:
        RefusedPickleError: it names something that would be executed.
        ValueError: it is damaged, or none of torch's.
    """
    size = check_archive(file, path)
    opened = f"/proc/self/fd/{file.fileno()}"  # torch maps files by their path only: this one is still the same file
    with torch.serialization.safe_globals(known):
        try:
            names = [] if trust_pickle else torch.serialization.get_unsafe_globals_in_checkpoint(opened)
            if names:
                raise RefusedPickleError(path, sorted(names), advice=advice)
            content = torch.load(opened, map_location="cpu", mmap=True, weights_only=not trust_pickle)
        except RefusedPickleError:
            raise
        except pickle.UnpicklingError as error:
            raise RefusedPickleError(path, [], _reason(error), advice=advice) from error
        except Exception as error:  # whatever damaged content makes torch raise
            raise ValueError(
                f"{path} cannot be read: it is damaged, or not torch.save's ({_reason(error)})"
            ) from error
    _check_tensors(content, path, max(size, _SMALL), records)
    return content


def read_value(content: bytes, what: str) -> Any:
    """Read a tensor or plain values from what `torch.save` wrote.

    Args:
        content: of the file, or of the part of a file.
        what: what messages call it.

    Raises:
        ValueError: it is damaged, or more than data.
    """
    file = io.BytesIO(content)
    check_archive(file, what)
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{what} is a pickle of more than tensors and plain values: refused") from error
    except Exception as error:  # whatever damaged content makes torch raise
        raise ValueError(f"{what} is damaged ({printable(type(error).__name__)})") from error


def _reason(error: Exception) -> str:
    said = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return printable(said.splitlines()[0] if said else type(error).__name__, limit=200)


def check_archive(file: IO[bytes], what: str | Path) -> int:
    """Refuse what unpacks to more than it is; return the file's bytes.

    Raises:
        ValueError: it is packed, or no archive of `torch.save`.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise ValueError(
            f"{what} is damaged, or not in torch.save's format (a zip archive): {error}"
        ) from error
    for member in members:
        large = member.filename.endswith("/data.pkl") and member.file_size > _PICKLE_LIMIT
        if member.compress_type != zipfile.ZIP_STORED or large:
            raise ValueError(
                f"{what} is not as torch.save writes it: {printable(member.filename)} is packed or large"
            )
    return file.seek(0, 2)


def _check_tensors(content: Any, path: Path, limit: int, records: tuple[type, ...]) -> None:
    """Refuse tensors that show one element of the file again and again."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout == torch.strided and value.numel() * value.element_size() > limit:
                raise ValueError(
                    f"{path} is damaged: a tensor of shape {tuple(value.shape)} is larger than the file"
                )
        elif isinstance(value, (dict, list, tuple, set, *records)) and id(value) not in seen:
            seen.add(id(value))
            members: Any = vars(value) if isinstance(value, records) else value
            waiting.extend(members.values() if isinstance(members, dict) else members)
