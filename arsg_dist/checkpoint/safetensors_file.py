"""Write a safetensors file one tensor at a time, never a model twice in memory.

The safetensors library (0.8) writes from a dictionary of all tensors. The format is a header length, a JSON header and
the tensors' bytes: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from arsg_dist.safe_io.files import writing

DTYPES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write all or nothing: the file appears when it is complete and on disk.

    Args:
        path: of the file; an existing one is replaced.
        layout: name → dtype and shape, in the order of `tensors`.
        tensors: asked for one after another.
        metadata: strings for the header.

    Raises:
        ValueError: a dtype the format does not have.
        OSError: the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in layout.items():
        if dtype not in DTYPES:
            raise ValueError(f"{name!r} is of {dtype}, which safetensors does not have")
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with writing(path) as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for (name, (dtype, shape)), tensor in zip(layout.items(), tensors, strict=True):
            assert tensor.dtype == dtype, f"{name}: {tensor.dtype}"
            assert tuple(tensor.shape) == tuple(shape), f"{name}: {tuple(tensor.shape)}"
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
