"""Encode what ranks tell each other: JSON, with the bytes of tensors behind it.

A message is data only, whoever sent it: reading one builds the kinds of values named in `encode` and nothing else.
Lists, texts, numbers, booleans and None are JSON's own; each other kind is an object with one key that names it.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from arsg_dist.engine.state import from_order, in_order, order_of
from arsg_dist.safe_io.documents import parse_json

MAX_BYTES: Final = 1 << 30
"""Bytes that a message may have."""
MAX_TEXT: Final = 1 << 26
"""Bytes that its JSON may have."""

_MAX_DEPTH: Final = 12  # of what is sent; a dictionary takes three levels of JSON
_HEAD: Final = 8  # bytes that tell the length of the JSON
_DTYPES: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    )
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}


def encode(value: Any) -> Tensor:
    """Write a value as a message.

    Args:
        value: None, booleans, numbers, texts, torch dtypes, tensors, and lists, tuples and dictionaries of them. A
            tensor arrives on the CPU, in the order of its strides and without gaps; one on the device "meta" as such.

    Returns:
        The message, 1-D, uint8, on the CPU. Of a value of another kind, or too large, it says that, and `decode`
        raises it: the others, who wait for a message, would wait for ever if it was raised here.
    """
    tensors: list[Tensor] = []
    try:
        return _joined({"value": _outline(value, tensors, 1)}, tensors)
    except (TypeError, ValueError) as error:
        return _joined({"refused": str(error)}, [])


def decode(messages: Sequence[Tensor]) -> list[Any]:
    """Read the messages of all ranks.

    Args:
        messages: as `encode` made them, in rank order.

    Returns:
        What each rank sent.

    Raises:
        TypeError: a rank had a value that cannot be sent; raised by all that read the messages.
        ValueError: one is no message.
    """
    values, refused = [], []
    for rank, message in enumerate(messages):
        where = f"what rank {rank} sent"
        content = _split(message, where)
        if "refused" in content:
            refused.append(f"rank {rank} cannot send its value: {content['refused']}")
        values.append(content.get("value"))
    if refused:
        raise TypeError("\n".join(refused))
    return values


def check_sizes(sizes: Sequence[int]) -> None:
    """Check the sizes of messages before memory is taken for them.

    Args:
        sizes: bytes, in rank order, as the ranks announced them.

    Raises:
        ValueError: one cannot be the size of a message.
    """
    for rank, size in enumerate(sizes):
        if not _HEAD <= size <= MAX_BYTES:
            raise ValueError(f"rank {rank} announced a message of {size} bytes")


def _outline(value: Any, tensors: list[Tensor], depth: int) -> Any:
    """The value as JSON knows it; the tensors whose bytes follow are added to `tensors`."""
    if depth > _MAX_DEPTH:
        raise TypeError(f"it is nested deeper than {_MAX_DEPTH} levels")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if type(value) is list:
        return [_outline(item, tensors, depth + 1) for item in value]
    if type(value) in (tuple, torch.Size):
        return {"tuple": [_outline(item, tensors, depth + 1) for item in value]}
    if type(value) is dict:
        return {
            "dict": [
                [_outline(part, tensors, depth + 1) for part in (key, item)] for key, item in value.items()
            ]
        }
    if isinstance(value, torch.dtype) and value in _NAMES:
        return {"dtype": _NAMES[value]}
    if isinstance(value, Tensor) and value.dtype in _NAMES and value.layout == torch.strided:
        order = order_of(value.stride(), value.shape)
        if value.is_meta:
            return {"meta": [_NAMES[value.dtype], list(value.shape), list(order)]}
        tensors.append(in_order(value.detach(), order))
        return {"tensor": [_NAMES[value.dtype], list(value.shape), list(order)]}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise TypeError(
        f"{kind} is none of the kinds that ranks tell each other (None, booleans, numbers, texts, torch dtypes, "
        "tensors, and lists, tuples and dictionaries of them)"
    )


def _joined(outline: dict[str, Any], tensors: Sequence[Tensor]) -> Tensor:
    text = json.dumps(outline).encode()
    size = _HEAD + len(text) + sum(tensor.nbytes for tensor in tensors)
    if size > MAX_BYTES or len(text) > MAX_TEXT:
        raise ValueError(f"a message of {size:,} bytes, {len(text):,} of them without tensors, is too large")
    head = len(text).to_bytes(_HEAD, "little")
    written = torch.frombuffer(bytearray(head + text), dtype=torch.uint8)
    return torch.cat([written, *(tensor.cpu().contiguous().view(torch.uint8) for tensor in tensors)])


def _split(message: Tensor, where: str) -> dict[str, Any]:
    """The content of a message: "value" or "refused"."""
    size = int.from_bytes(bytes(message[:_HEAD].tolist()), "little")
    if message.numel() < _HEAD or size > min(message.numel() - _HEAD, MAX_TEXT):
        raise ValueError(f"{where} is no message")
    try:
        text = message[_HEAD : _HEAD + size].numpy().tobytes().decode()
        outline = parse_json(text, where)
        reader = _Reader(message[_HEAD + size :])
        (kind, inner), *others = outline.items()
        if others or kind not in ("value", "refused"):
            raise ValueError(kind)
        return {kind: reader.value(inner)}
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{where} is no message: {error}") from error


class _Reader:
    """Build values from an outline; the bytes of its tensors come in the same order."""

    def __init__(self, rest: Tensor) -> None:
        self._rest = rest

    def value(self, outline: Any) -> Any:
        if isinstance(outline, list):
            return [self.value(item) for item in outline]
        if not isinstance(outline, dict):
            return outline
        ((kind, inner),) = outline.items()
        if kind == "tuple":
            return tuple(self.value(item) for item in inner)
        if kind == "dict":
            return {self.value(key): self.value(item) for key, item in inner}
        if kind == "dtype":
            return _DTYPES[inner]
        name, shape, order = inner
        if any(type(number) is not int or number < 0 for number in (*shape, *order)):
            raise ValueError("a tensor without a shape")
        numel = math.prod(shape)
        if kind == "meta":
            flat = torch.empty(numel, dtype=_DTYPES[name], device="meta")
        elif kind == "tensor":
            size = numel * _DTYPES[name].itemsize
            flat, self._rest = self._rest[:size].clone().view(_DTYPES[name]), self._rest[size:]
        else:
            raise ValueError(f"an unknown kind {kind!r}")
        return from_order(flat, tuple(shape), tuple(order))
