"""Write a run's weights for any PyTorch program: weights/{last,best,ema}.safetensors."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from arsg_dist.checkpoint.safetensors_file import write_safetensors
from arsg_dist.imagenet.output.run_directory import WEIGHTS, directory_of
from arsg_dist.safe_io.documents import parse_json
from arsg_dist.safe_io.files import make_directory, open_regular, remove_partial_files
from arsg_dist.safe_io.text import printable

LAST, BEST, EMA = "last", "best", "ema"
POINTS = {"x": "as trained (observation point x)", "theta": "base iterate θ", "ema": "moving average (EMA)"}
"""What weights can be, as the metadata of a file and as a reader is told."""


class WeightFiles:
    """The weight files of a run; used on rank 0 only.

    Args:
        run: directory of the run.
        resumed_epoch: epochs done before this start.

    Raises:
        ValueError: a file of the run's that is none of ours.
    """

    def __init__(self, run: Path, *, resumed_epoch: int) -> None:
        self._run, self._directory = run, directory_of(run, WEIGHTS)
        self._best = -1.0
        if not self._directory.is_dir():
            return
        remove_partial_files(self._directory)
        # All are read for the card at the run's end: what is wrong with one is said now.
        known = {
            name: read_metadata(path)
            for name in (LAST, BEST, EMA)
            if os.path.lexists(path := self._file(name))
        }
        if BEST in known and known[BEST]["epoch"] <= resumed_epoch:
            self._best = known[BEST]["val_top1"]

    def save(self, name: str, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write NAME.safetensors, and best.safetensors if no epoch before was as good.

        Args:
            name: `LAST` or `EMA`.
            weights: from `Engine.whole_weights`.
            metadata: with `epoch`, `val_top1` and `weights` ("x", "theta" or "ema"); written into the file.
        """
        self._write(name, weights, metadata)
        if metadata["val_top1"] > self._best:
            self._best = metadata["val_top1"]
            self._write(BEST, weights, metadata)

    def _write(self, name: str, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        make_directory(self._run, WEIGHTS)
        path = self._file(name)
        layout = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in weights.items()}
        about = {"format": "pt", "arsg_dist": json.dumps(metadata)}
        write_safetensors(path, layout, weights.values(), about)

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.safetensors"


def read_metadata(path: Path) -> dict[str, Any]:
    """Read "epoch", "val_top1" and "weights", written beside the weights.

    Args:
        path: of the file.

    Raises:
        ValueError: another program's file, a damaged one, or a link.
    """
    open_regular(path).close()
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("arsg_dist")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {printable(error)}") from error
    if text is None:
        raise ValueError(f"{path} was not written by arsg-imagenet train")
    metadata = parse_json(text, f"the header of {path}")
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} was not written by arsg-imagenet train")
    epoch, top1, point = (metadata.get(key) for key in ("epoch", "val_top1", "weights"))
    if not isinstance(epoch, int) or not isinstance(top1, float) or point not in list(POINTS):
        raise ValueError(f"{path} does not say the epoch, the accuracy and the kind of its weights")
    return metadata
