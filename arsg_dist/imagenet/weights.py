"""Weights as files any PyTorch program reads: RUN/weights/{last,best,ema}.safetensors, after every epoch."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from arsg_dist.checkpoint.durable import sync

DIRECTORY = "weights"
LAST, BEST, EMA = "last", "best", "ema"


def whole_weights(model: nn.Module, *, leader: bool) -> dict[str, Tensor]:
    """The model's state dict as contiguous CPU tensors, floating ones float32. Every rank must call it.

    Args:
        model: as an engine trains it; parameters partitioned by ZeRO stage 3 are gathered.
        leader: whether this rank wants them; the others get an empty dict.
    """
    with _gathered(model):
        if not leader:
            return {}
        return {
            name: (tensor.detach().float() if tensor.is_floating_point() else tensor.detach())
            .to("cpu", copy=True)
            .contiguous()
            for name, tensor in model.state_dict().items()
        }


@contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    partitioned = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


class WeightFiles:
    """The weight files of a run; used on rank 0 only.

    Args:
        run: directory of the run.
        resumed_epoch: epochs done before this start.
    """

    def __init__(self, run: Path, *, resumed_epoch: int) -> None:
        self._directory = run / DIRECTORY
        self._best = -1.0
        if (self._directory / f"{BEST}.safetensors").is_file():
            known = read_metadata(self._directory / f"{BEST}.safetensors")
            if known["epoch"] <= resumed_epoch:
                self._best = known["val_top1"]

    def save(self, name: str, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Writes NAME.safetensors, and best.safetensors if no epoch before had this validation accuracy.

        Args:
            name: `LAST` or `EMA`.
            weights: from `whole_weights`.
            metadata: with `epoch`, `val_top1` and `weights` ("x", "theta" or "ema"); written into the file.
        """
        self._write(name, weights, metadata)
        if metadata["val_top1"] > self._best:
            self._best = metadata["val_top1"]
            self._write(BEST, weights, metadata)

    def _write(self, name: str, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        self._directory.mkdir(exist_ok=True)
        partial = self._directory / f".{name}.safetensors.partial"
        try:
            save_file(weights, partial, metadata={"format": "pt", "arsg_dist": json.dumps(metadata)})
        except Exception as error:  # safetensors' own class of errors, also for a full disk
            raise OSError(f"cannot write {partial}: {error}") from error
        sync(partial)
        partial.rename(self._directory / f"{name}.safetensors")
        sync(self._directory)


def read_metadata(path: Path) -> dict[str, Any]:
    """What `WeightFiles.save` wrote beside the weights.

    Raises:
        ValueError: another program's file.
    """
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("arsg_dist")
    if text is None:
        raise ValueError(f"{path} was not written by arsg-imagenet train")
    metadata: dict[str, Any] = json.loads(text)
    return metadata
