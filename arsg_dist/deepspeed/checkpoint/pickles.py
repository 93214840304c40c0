"""Read DeepSpeed's checkpoint files, which are pickles, as data alone.

Nothing that they name is run or imported. `torch.load` is called here and in `arsg_dist/checkpoint/pickles.py` only.
DeepSpeed 0.19.8 writes tensors, plain values and four classes of its own (stages 0 to 3, fp32, bf16 and fp16, any
optimizer, mixtures of experts and pipelines). Objects of these classes become a `Record` here: the classes themselves
can be harmed by what a file sets, as the members of an enumeration can.
"""

import argparse
import math
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import torch
from torch import Tensor

from arsg_dist.checkpoint.pickles import check_archive
from arsg_dist.safe_io.files import MiB, open_regular
from arsg_dist.safe_io.text import printable

Reader = Callable[[Path], Any]
"""What turns a file of a checkpoint into its content: `load`, or `look_into`."""

_NEVER_DATA: Final = ("nt", "os", "posix", "sys")
_SHOWN: Final = 5
_SMALL: Final = 64 * MiB

_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trust_pickles() -> Iterator[None]:
    """Let `load_checkpoint` look into universal checkpoints with a user's own objects.

    DeepSpeed executes what a checkpoint names in any case when it loads it; our look before that does not, and some
    classes (those derived from dict and list) cannot be passed over::

        with arsg_dist.deepspeed.trust_pickles():
            engine.load_checkpoint("checkpoints")
    """
    token = _trusted.set(True)
    try:
        yield
    finally:
        _trusted.reset(token)


class Record:
    """Hold the attributes that a file gives an object whose class is not built."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("attributes that are no dictionary")
        vars(self).update({str(key): value for key, value in state.items()})

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError("an object of DeepSpeed's own is in the client state: add --trust-pickle to keep it")


class _Placeholder:
    """Stand for whatever a file names, however it is called, built and filled.

    torch's reader asks by `==` whether it may call or build something; what calling a placeholder gave is one, too.
    """

    def __new__(cls, *_: Any) -> "_Placeholder":
        return object.__new__(_Placeholder)

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, *_: Any) -> "_Placeholder":
        return self

    def __eq__(self, other: object) -> bool:
        return other is _Placeholder

    def __hash__(self) -> int:
        return hash(_Placeholder)

    def __setstate__(self, state: Any) -> None: ...


class _Dtype:
    """Build a dtype of numpy's with a number in each element; refuse all others."""

    _CODE: Final = re.compile(r"[biufc](1|2|4|8|16)")

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not self._CODE.fullmatch(code):
            raise pickle.UnpicklingError(f"numpy's dtype {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _, order, subdtype, names, fields, *_ = state
        if (subdtype, names, fields) != (None, None, None) or order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("numpy's dtype with parts")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray[Any, Any]):
    """Fill an array of numbers without numpy's own reader, which trusts the file."""

    def __new__(cls, *_: Any) -> "_Array":
        return np.ndarray.__new__(cls, (0,))

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        sized = isinstance(dtype, _Dtype) and isinstance(content, bytes) and all(size >= 0 for size in shape)
        if not sized or math.prod(shape) * dtype.dtype.itemsize != len(content):
            raise pickle.UnpicklingError("an array of numpy's that is not its bytes")
        super().__setstate__((1, tuple(shape), dtype.dtype, bool(fortran), content))  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return np.array(self).__reduce_ex__(protocol)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _scalar(dtype: _Dtype, content: bytes) -> Any:
    return np.frombuffer(content, dtype.dtype, count=1)[0]


_ALLOWED: Final[list[Any]] = [
    (Record, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Record, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (Record, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Record, "deepspeed.utils.tensor_fragment.fragment_address"),
    # Not DeepSpeed's: what programs keep in its client state most.
    argparse.Namespace,
    (_Dtype, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *[(_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")],
    *[(_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")],
]


class RefusedPickleError(ValueError):
    """Report a file with more than data; `names` is what it would have executed."""

    def __init__(self, path: Path, names: list[str], reason: str = "") -> None:
        listed = ", ".join(printable(name, limit=100) for name in names[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        what = (
            f"names {listed}{more}, which loading it would execute"
            if names
            else "cannot be read as data alone"
        )
        super().__init__(
            f"{path} is a pickle and {what}{reason and f' ({reason})'}: refused. If you trust its writer as you trust "
            "a program of theirs, add --trust-pickle (in Python trust_pickle=True; around engine.load_checkpoint "
            "arsg_dist.deepspeed.trust_pickles())"
        )
        self.names = names


def load(path: Path, *, trust_pickle: bool = False) -> Any:
    """Read a file that `torch.save` wrote, with its tensors mapped into memory.

    Args:
        path: of the file; not a link.
        trust_pickle: execute what it names; otherwise it is refused.

    Raises:
        FileNotFoundError: it does not exist.
        RefusedPickleError: it names something that would be executed.
        ValueError: it is no regular file, or damaged.
    """
    with open_regular(path) as file:
        return _load(file, path, trust_pickle=trust_pickle)


def look_into(path: Path) -> Any:
    """Read a file for what is known in it, with placeholders for all other objects.

    For checks before DeepSpeed itself loads a checkpoint, which executes what is in it, and which follows links.

    Raises:
        FileNotFoundError: it does not exist.
        RefusedPickleError: its objects cannot be passed over, as those of a class derived from dict.
        ValueError: it is no regular file, or damaged, or names functions of the operating system.
    """
    with open_regular(path, follow=True) as file:
        try:
            return _load(file, path, trust_pickle=_trusted.get())
        except RefusedPickleError as error:
            if not error.names:
                raise
            if any(name.split(".")[0] in _NEVER_DATA for name in error.names):
                raise ValueError(str(error)) from error
            return _load(file, path, known=[*_ALLOWED, *((_Placeholder, name) for name in error.names)])


def _load(file: IO[bytes], path: Path, *, trust_pickle: bool = False, known: list[Any] = _ALLOWED) -> Any:
    size = check_archive(file, path)
    opened = f"/proc/self/fd/{file.fileno()}"  # torch maps files by their path only: this one is still the same file
    with torch.serialization.safe_globals(known):
        try:
            names = [] if trust_pickle else torch.serialization.get_unsafe_globals_in_checkpoint(opened)
            if names:
                raise RefusedPickleError(path, sorted(names))
            content = torch.load(opened, map_location="cpu", mmap=True, weights_only=not trust_pickle)
        except RefusedPickleError:
            raise
        except pickle.UnpicklingError as error:
            raise RefusedPickleError(path, [], _reason(error)) from error
        except Exception as error:  # whatever damaged content makes torch raise
            raise ValueError(
                f"{path} cannot be read: it is damaged, or not torch.save's ({_reason(error)})"
            ) from error
    _check_tensors(content, path, max(size, _SMALL))
    return content


def _reason(error: Exception) -> str:
    said = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return printable(said.splitlines()[0] if said else type(error).__name__, limit=200)


def _check_tensors(content: Any, path: Path, limit: int) -> None:
    """Refuse tensors that show one element of the file again and again."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout == torch.strided and value.numel() * value.element_size() > limit:
                raise ValueError(
                    f"{path} is damaged: a tensor of shape {tuple(value.shape)} is larger than the file"
                )
        elif isinstance(value, dict | list | tuple | set | Record) and id(value) not in seen:
            seen.add(id(value))
            members = vars(value) if isinstance(value, Record) else value
            waiting.extend(members.values() if isinstance(members, dict) else members)
