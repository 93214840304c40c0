"""Explain what a DeepSpeed config will do with ARSG: `arsg-dist check-config`."""

import argparse
import contextlib
import dataclasses
import json
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

from arsg_dist.engine.job import BAD_INPUT
from arsg_dist.safe_io.text import printable

if TYPE_CHECKING:
    from arsg_dist.deepspeed.config.explain import Explanation

SUMMARY: Final = (
    "say what a DeepSpeed config does with ARSG: bytes and messages per rank, and what is refused"
)
REFUSED: Final = 1
_LONGEST: Final = 2000
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run`."""
    parser.add_argument("file", type=Path, help="the DeepSpeed config, JSON")
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--parameters", default="1e9", help="number of trained parameters, as 124e6 (default: 1e9)"
    )
    model.add_argument(
        "--model",
        help="the model itself, for exact padding: torchvision:NAME, or MODULE:FUNCTION that returns one",
    )
    parser.add_argument("--world-size", type=int, default=1, help="number of ranks (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Print the explanation.

    Returns:
        0; 1 if the config is refused; 2 if the file, the model or a number cannot be read.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where DeepSpeed logs; stdout is for the answer
            from arsg_dist.deepspeed.config.explain import explain
            from arsg_dist.deepspeed.config.resolve import read_config
        config = read_config(arguments.file)
        parameters = _numels(arguments.model) if arguments.model else [_number(arguments.parameters)]
        explanation = explain(config, parameters=parameters, world_size=arguments.world_size)
    except (ValueError, ImportError) as error:
        print(f"error: {printable(error, limit=_LONGEST)}", file=sys.stderr)  # noqa: T201
        return BAD_INPUT
    as_json = json.dumps(dataclasses.asdict(explanation), indent=2) if arguments.json else None
    print(as_json or as_text(explanation))  # noqa: T201
    return REFUSED if explanation.refused else 0


def _number(text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not number.is_integer():
        raise ValueError(f"--parameters {text}: give a whole number, as 124e6")
    return int(number)


def _numels(name: str) -> list[int]:
    """Return the sizes of a model's trained parameters, which take no memory where it can be built so."""
    import torch

    package, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"--model {name}: write torchvision:NAME or MODULE:FUNCTION")
    if package == "torchvision":
        from arsg_dist.imagenet.torchvision_compat import torchvision

        build = partial(torchvision.models.get_model, attribute, weights=None)
    else:
        build = getattr(import_module(package), attribute, None)  # type: ignore[assignment]
        if build is None:
            raise ValueError(f"--model {name}: {package} has no {attribute}")
    try:
        with torch.device("meta"):
            model = build()
    except NotImplementedError:  # one that computes its widths by tensors, as RegNet does
        model = build()
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"--model {name} gave {type(model).__name__}, not a torch module")
    return [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]


def as_text(explanation: "Explanation") -> str:
    """Return the explanation for people."""
    if explanation.refused:
        return f"REFUSED: {printable(explanation.refused, limit=_LONGEST)}"
    ranks = f"{explanation.world_size} rank" + ("s" if explanation.world_size > 1 else "")
    lines = [
        f"ZeRO stage {explanation.stage}, {explanation.precision}, {explanation.parameters:,} parameters on {ranks}",
        "",
        "Memory of one rank, without activations:",
    ]
    totals: dict[str, int] = {}
    for entry in explanation.memory:
        totals[entry.where] = totals.get(entry.where, 0) + entry.bytes
        note = f"  ({entry.note})" if entry.note else ""
        lines.append(f"  {entry.where:8}{readable(entry.bytes):>12}  {entry.what}{note}")
    lines += [f"  {where:8}{readable(total):>12}  in all" for where, total in totals.items()]
    lines += ["", "Communication for one weight update:"]
    for message in explanation.communication:
        times = f"{message.times}" + (
            f" to {message.most_times}" if message.most_times > message.times else ""
        )
        lines.append(
            f"  {message.operation:15}{readable(message.bytes):>12}  × {times}  {message.what}; "
            f"each rank sends {readable(message.sent)}"
        )
    if not explanation.communication:
        lines.append("  none")
    if explanation.notes:
        lines += ["", "Notes:", *(f"  - {note}" for note in explanation.notes)]
    return "\n".join(lines)


def readable(count: int) -> str:
    """Return bytes in the unit that fits, as 1.50 GiB."""
    size, unit = float(count), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{size:.2f} {_UNITS[unit]}"
