"""Wrap methods of DeepSpeed's classes."""

import functools
from collections.abc import Callable
from typing import Any

import deepspeed

Method = Callable[..., Any]


def wrap_once(owner: type, name: str, wrap: Callable[[Method], Method]) -> None:
    """Replace a method of DeepSpeed by ``wrap(method)``, unless that was done before.

    Raises:
        RuntimeError: this DeepSpeed has no such method.
    """
    method = getattr(owner, name, None)
    if method is None:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} has no {owner.__name__}.{name}; arsg_dist works with 0.19.8"
        )
    if not hasattr(method, "_wrapped_for_arsg"):
        wrapper = functools.wraps(method)(wrap(method))
        wrapper._wrapped_for_arsg = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapper)
