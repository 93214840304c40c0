"""Read a trained network's weights: from a checkpoint, a run, or a file of anybody's.

None of them is executed. What lies beside them, settings and names of classes, comes along where there is any.
"""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from arsg_dist.checkpoint import SavedRun
from arsg_dist.checkpoint.export import weights_of
from arsg_dist.checkpoint.pickles import read_pickle
from arsg_dist.checkpoint.store import complete_in
from arsg_dist.engine.state import EXTRA
from arsg_dist.imagenet.output.run_directory import (
    CHECKPOINTS,
    CLASSES,
    CONFIG,
    directory_of,
    read_classes,
    read_settings,
)
from arsg_dist.imagenet.training.rank_state import mean_buffers
from arsg_dist.safe_io.files import open_regular
from arsg_dist.safe_io.text import printable

At = Literal["x", "theta", "ema"]
"""Which weights of a checkpoint: at the observation point, at the base iterate θ, or their moving average."""

_MANIFEST: Final = "manifest.json"
_SAFE: Final = ".safetensors"
_AVERAGE: Final = "ema"
_WRAPPED: Final = {"state_dict": ("state_dict_ema",), "model": ("model_ema",)}
"""Where programs put the weights in a file of more (timm, torchvision's references), and their average."""
_COUNTER: Final = "num_batches_tracked"
"""Of batch norm, of which weights of earlier torch have none, and evaluation asks nothing."""
_SHOWN: Final = 3


@dataclass(frozen=True)
class Trained:
    """Weights that can be loaded, and what is known of them.

    Attributes:
        where: what messages call them.
        settings: of the run that they are of, from outside and unchecked; empty if there is none.
        classes: names, in the order of the labels; None if nobody says.
        saved: the checkpoint; None for a file.
        weights: of a file: name → tensor.
        average: of a file with a moving average beside the weights.
    """

    where: Path
    settings: Mapping[Any, Any]
    classes: list[str] | None
    saved: SavedRun | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] | None = None

    def load_into(self, module: nn.Module, at: At) -> None:
        """Give a network these weights.

        Args:
            module: of the same names and shapes, on the CPU.
            at: a point that a file does not have is an error.

        Raises:
            ValueError: the weights are of another network, damaged, or not there at this point.
        """
        self.require(at)
        if self.saved is None:
            weights = self.weights if at == "x" else self.average
            assert weights is not None
        elif at == "ema":
            weights = {
                name.removeprefix(f"{_AVERAGE} "): self.saved.whole(EXTRA, name)
                for name in self.saved.extras
                if name.startswith(f"{_AVERAGE} ") and name != f"{_AVERAGE} updates"
            }
            weights |= {name: weights[source] for name, source in self.saved.aliases.items()}
        else:
            weights = dict(weights_of(self.saved, at))
        _check(weights, module, self.where, buffers=self.saved is None)
        if self.saved is not None:
            weights |= mean_buffers(self.saved, _AVERAGE if at == "ema" else "model", module)
            _check(weights, module, self.where, buffers=True)
        own = module.state_dict()
        module.load_state_dict({name: weights.get(name, own[name]) for name in own})

    def require(self, at: At) -> None:
        """Refuse a point at which there are no weights; raise ValueError."""
        if self.saved is not None:
            if at == "ema" and f"{_AVERAGE} updates" not in self.saved.extras:
                raise ValueError(f"{self.where} has no moving average: it was trained without ema_decay")
        elif at == "theta":
            raise ValueError(
                f"{self.where} holds weights without the optimizer's state, from which θ is made: give a checkpoint, "
                "or leave --at out"
            )
        elif at == "ema" and self.average is None:
            raise ValueError(
                f"{self.where} has no moving average beside its weights; of a run, give RUN, or "
                "RUN/weights/ema.safetensors"
            )


def open_trained(path: Path) -> Trained:
    """Open what a user names.

    Args:
        path: of a run (its newest checkpoint), of a checkpoint, or of a file of weights: safetensors, or a state dict
            that `torch.save` wrote.

    Raises:
        ValueError: it is none of them, or damaged, or would have to be executed.
        OSError: it cannot be read.
    """
    path = located(path)
    if path.is_dir():
        return _open_checkpoint(path)
    run = next((place for place in (path.parent, path.parent.parent) if (place / CONFIG).is_file()), None)
    weights, average = (_safetensors(path), None) if path.suffix == _SAFE else _pickled(path)
    return Trained(path, *_run(run), weights=weights, average=average)


def located(path: Path) -> Path:
    """Return the path of a checkpoint or of a file; of a run that of its newest checkpoint.

    Raises:
        ValueError: it is none of these.
    """
    if not path.exists():
        raise ValueError(f"there is no {path}: give a run, a checkpoint of one, or a file of weights")
    return _checkpoint_in(path) if path.is_dir() else path


def _checkpoint_in(path: Path) -> Path:
    if (path / _MANIFEST).is_file():
        return path
    if (path / CONFIG).is_file() or (path / CHECKPOINTS).is_dir():
        if newest := next(reversed(complete_in(directory_of(path, CHECKPOINTS))), None):
            return newest
        if (path / "model.safetensors").is_file():
            raise ValueError(f"{path} is an export: give {path / 'model.safetensors'}")
        raise ValueError(f"{path} has no complete checkpoint yet")
    if (path / "latest").is_file():
        raise ValueError(
            f"{path} holds DeepSpeed's own checkpoints: make one of this project's of it by "
            f"'arsg-dist checkpoint convert {path} OUTPUT', and give OUTPUT with --model and --data.root"
        )
    raise ValueError(f"{path} is no run (no {CONFIG}) and no checkpoint (no {_MANIFEST})")


def _open_checkpoint(path: Path) -> Trained:
    saved = SavedRun(path)
    run = path.resolve().parent.parent
    return Trained(path, *_run(run if (run / CONFIG).is_file() else None), saved=saved)


def _run(run: Path | None) -> tuple[Mapping[Any, Any], list[str] | None]:
    """Read settings and classes of a run, or of an export."""
    if run is None:
        return {}, None
    return read_settings(run), read_classes(run) if (run / CLASSES).is_file() else None


def _safetensors(path: Path) -> dict[str, Tensor]:
    open_regular(path, follow=True).close()
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {printable(error)}") from error


def _pickled(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Read a state dict that `torch.save` wrote, or one among other things, and its average."""
    with open_regular(path, follow=True) as file:
        packed = file.read(2) == b"PK"
        file.seek(0)
        if not packed:
            raise ValueError(
                f"{path} is neither a .safetensors file nor in torch.save's format since torch 1.6. If it is of an "
                "earlier torch, write it anew: python -c \"import torch; torch.save(torch.load('OLD.pth', "
                "weights_only=True), 'NEW.pth')\""
            )
        advice = (
            'If you trust its writer as you trust a program of theirs, take the weights out: python -c "import torch; '
            "torch.save(torch.load('OLD.pth', weights_only=False)['state_dict'], 'NEW.pth')\""
        )
        content = read_pickle(file, path, known=[argparse.Namespace], advice=advice)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, and no weights by their names")
    if _is_state(content):
        return _plain(content), None
    for name, averages in _WRAPPED.items():
        if _is_state(content.get(name)):
            average = next((content[key] for key in averages if _is_state(content.get(key))), None)
            return _plain(content[name]), None if average is None else _plain(average)
    keys = printable(", ".join(sorted(map(str, content))), limit=200)
    raise ValueError(
        f"{path} holds no weights by their names, itself or under {' or '.join(_WRAPPED)}; it has {keys}"
    )


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    )


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the prefix off that DistributedDataParallel gives all names."""
    wrapped = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in state.items()}


def _check(weights: Mapping[str, Tensor], module: nn.Module, where: Path, *, buffers: bool) -> None:
    """Refuse weights of another network, naming the first differences; raise ValueError.

    Args:
        weights: by name.
        module: to get them.
        where: of the weights.
        buffers: whether they are among the weights.
    """
    wanted = module.state_dict() if buffers else dict(module.named_parameters(remove_duplicate=False))
    missing = [name for name in wanted if name not in weights and not name.endswith(_COUNTER)]
    unknown = [name for name in weights if name not in module.state_dict()]
    others = [
        f"{name} has shape {tuple(weights[name].shape)} and not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    found = [
        *([f"it lacks {_some(missing)}"] if missing else []),
        *([f"the network has no {_some(unknown)}"] if unknown else []),
        *([_some(others, "; ")] if others else []),
    ]
    if found:
        raise ValueError(
            f"{where} does not fit the network: {'; '.join(found)}. Give the --model that it was trained as, and data "
            "with as many classes"
        )
    if not all(torch.isfinite(tensor).all() for tensor in weights.values() if tensor.is_floating_point()):
        raise ValueError(f"{where} has weights that are NaN or infinite")


def _some(names: Iterable[str], between: str = ", ") -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return printable(between.join(names[:_SHOWN]), limit=500) + more
