"""Wrap methods of DeepSpeed's classes, and know which of them a release has changed."""

import functools
import hashlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Final

import deepspeed
from packaging.version import Version
from torch.optim import Optimizer

from arsg_dist.deepspeed.known_sources import KNOWN_SOURCES
from arsg_dist.optim.by_name import OURS

Method = Callable[..., Any]

OLDEST: Final = "0.18.0"
NEWEST: Final = "0.19.8"  # tested; a later one is taken as long as it has not changed what is repaired
ABSENT: Final = "absent"
ALLOW_UNKNOWN: Final = "ARSG_UNKNOWN_DEEPSPEED"

_MARK: Final = "_wrapped_for_arsg"
_sources: dict[str, str] = {}
_others: tuple[type[Optimizer], ...] = ()


def wrap_once(owner: type, name: str, wrap: Callable[[Method], Method]) -> None:
    """Replace a method of DeepSpeed by ``wrap(method)``, unless that was done before.

    Raises:
        RuntimeError: this DeepSpeed has no such method.
    """
    method = getattr(owner, name, None)
    if method is None:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} has no {owner.__name__}.{name}; arsg_dist works with "
            f"{OLDEST} to {NEWEST}"
        )
    if not hasattr(method, _MARK):
        wrapper = functools.wraps(method)(wrap(method))
        setattr(wrapper, _MARK, True)
        setattr(owner, name, wrapper)


def repair_once(
    owner: type,
    name: str,
    wrap: Callable[[Method], Method],
    *,
    relies_on: Iterable[str] = (),
    since: str = OLDEST,
    until: str | None = None,
) -> None:
    """Wrap a method that does something wrong, in the versions of DeepSpeed that need it.

    A repair undoes what one text of a method does; around another text it could make it worse. So the texts it was
    tested with are known by their digests (`known_sources`), and `check_known` refuses to train with others.

    Args:
        owner: a class of DeepSpeed.
        name: of its method.
        wrap: see `wrap_once`.
        relies_on: other methods of the class that the repair depends on; that a version has none is known like a text.
        since: first version that needs the repair.
        until: last one; default all later ones.

    Raises:
        RuntimeError: this DeepSpeed has no such method.
    """
    version = Version(deepspeed.__version__)
    if version < Version(since) or (until is not None and version > Version(until)):
        return
    for needed in (name, *relies_on):
        _sources[f"{owner.__name__}.{needed}"] = digest(owner, needed)
    wrap_once(owner, name, wrap)


def digest(owner: type, name: str) -> str:
    """Return what tells the text of a method, before anybody wrapped it, from any other, or that there is none."""
    if not hasattr(owner, name):
        return ABSENT
    method = inspect.unwrap(getattr(owner, name))
    while method.__name__ != name:  # DeepSpeed's own decorators do not say what they wrap
        inside = [cell.cell_contents for cell in method.__closure__ or ()]
        wrapped = next((one for one in inside if inspect.isfunction(one)), None)
        if wrapped is None:
            break
        method = inspect.unwrap(wrapped)
    return hashlib.sha256(inspect.getsource(method).encode()).hexdigest()[:16]


def sources() -> dict[str, str]:
    """Map each method that is repaired, or relied on, to the digest of its text in this DeepSpeed."""
    return dict(_sources)


def check_known() -> None:
    """Refuse a DeepSpeed that has changed what the repairs are made for.

    Raises:
        ValueError: naming what has changed, unless the environment allows it.
    """
    unknown = [name for name, found in _sources.items() if found not in KNOWN_SOURCES.get(name, {})]
    if not unknown:
        return
    found = (
        f"DeepSpeed {deepspeed.__version__} has changed {', '.join(unknown)}, which arsg_dist corrects; its "
        f"corrections were tested with {OLDEST} to {NEWEST}"
    )
    if os.environ.get(ALLOW_UNKNOWN) != "1":
        raise ValueError(
            f"{found}: install one of these, or set {ALLOW_UNKNOWN}=1 on every rank to apply them as they are and "
            "compare a short training with one process (docs/deepspeed.md)"
        )
    warnings.warn(f"{found} ({ALLOW_UNKNOWN}=1: applied as they are)", stacklevel=2)


def repair(optimizers: Iterable[type[Optimizer]] = ()) -> None:
    """Correct DeepSpeed's training for engines of other optimizers, too.

    What DeepSpeed gets wrong under ARSG it gets wrong under others: docs/deepspeed-defects.md has each defect, with
    what it does to AdamW. To be called before `deepspeed.initialize`, on every rank. ARSG's engines are always
    repaired, all others only if asked for here.

    Args:
        optimizers: classes, as `torch.optim.AdamW`; classes derived from them are meant, too. These are all: calling
            this again without any leaves other engines as DeepSpeed has them.

    Raises:
        TypeError: something else than classes of optimizers.
        ValueError: DeepSpeed has changed what the repairs are made for.
    """
    global _others
    classes = tuple(optimizers) if isinstance(optimizers, Iterable) else (optimizers,)
    for one in classes:
        if not (isinstance(one, type) and issubclass(one, Optimizer)):
            raise TypeError(
                "repair takes classes of optimizers, as in repair(optimizers=(torch.optim.AdamW,)), "
                f"and got {one!r}"
            )
    if classes:
        check_known()
    _others = classes


def is_repaired(optimizer: Any) -> bool:
    """Tell whether engines of an optimizer are corrected."""
    return isinstance(optimizer, (*OURS, *_others))
