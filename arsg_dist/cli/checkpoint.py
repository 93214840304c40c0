"""Show, verify, convert and export checkpoints: `arsg-dist checkpoint`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arsg_dist.checkpoint.convert import TRUST_HELP
from arsg_dist.engine.job import BAD_INPUT, FAILED
from arsg_dist.safe_io.text import printable, printable_lines

SUMMARY = "Shows, verifies, converts and exports the checkpoint of a run."
_LINE = 4000  # characters of a line that are shown
_NAMES = 20  # of tensors in a line
_TARGETS = ("portable", "torch", "dcp", "torchtitan", "deepspeed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands."""
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, help_text: str, what: str = "checkpoint, as RUN/checkpoints/step-000001234") -> Any:
        command = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        command.add_argument("path", type=Path, metavar="PATH", help=f"directory of the {what}")
        return command

    show = add("show", "Says what a checkpoint holds and what wrote it.")
    show.add_argument("--tensors", action="store_true", help="also every tensor")
    add("verify", "Reads everything and compares the digests; exit code 1 if something is damaged.")
    convert = add(
        "convert",
        "From this format, DeepSpeed's own checkpoints or those of torch.distributed.checkpoint to any of them. Theirs "
        "are pickles: data alone is taken from them, and nothing that they name is executed unless you add "
        "--trust-pickle.",
        "checkpoint, or what DeepSpeed's save_checkpoint or torch.distributed.checkpoint.save wrote",
    )
    convert.add_argument("output", type=Path, metavar="OUTPUT", help="directory or file to make")
    convert.add_argument(
        "--to",
        choices=list(_TARGETS),
        default="portable",
        help="portable: a checkpoint directory; torch: one file of state dicts for torch.load(weights_only=True); dcp: "
        'a directory for torch.distributed.checkpoint.load, {"model": ..., "optim": ...} of get_state_dict; '
        "torchtitan: the same in torchtitan's layout; deepspeed: a universal checkpoint for DeepSpeed's load_universal",
    )
    for name, what in (("buffers", "buffers"), ("frozen", "frozen parameters")):
        convert.add_argument(
            f"--{name}",
            type=lambda text: [part for part in text.split(",") if part],
            default=[],
            metavar="NAMES",
            help=f"from torch.distributed.checkpoint, which does not tell them: names of {what}, or patterns with *, "
            "separated by commas",
        )
    convert.add_argument(
        "--trust-pickle",
        action="store_true",
        help=TRUST_HELP,
    )
    export = add("export", "Writes the model's weights as one safetensors file.")
    export.add_argument(
        "output", type=Path, metavar="OUTPUT", help="file to make, best ending in .safetensors"
    )
    export.add_argument(
        "--at", choices=["x", "theta"], default="x", help="x (default), or the base iterate theta"
    )
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")


def run(options: argparse.Namespace) -> int:
    """Run the command; return 0, 1 for a damaged checkpoint, or 2 for bad input."""
    try:
        return _COMMANDS[options.command](options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {printable_lines(error)}", file=sys.stderr)  # noqa: T201
        return BAD_INPUT


def _show(options: argparse.Namespace) -> int:
    from arsg_dist.checkpoint import SavedRun

    saved = SavedRun(options.path)
    manifest = saved.manifest
    size = sum(manifest.shards.values())
    values = sum(manifest.tensors[f"parameter:{name}"].spec.numel for name in saved.parameters)
    lines = [
        f"{options.path}: engine {manifest.engine}, {manifest.world_size} ranks, {size / 2**20:,.1f} MiB in "
        f"{len(manifest.shards)} shards",
        "written with " + ", ".join(f"{name} {version}" for name, version in manifest.packages.items()),
        f"{len(saved.parameters)} parameters with {values:,} elements, {len(saved.trained)} of them trained; "
        f"{len(saved.buffers)} buffers; {len(saved.extras)} tensors of the program",
    ]
    entries = sorted({entry for name in saved.parameters for entry in saved.entries(name)})
    lines.append("optimizer state: " + (", ".join(entries) or "none yet"))
    for index, group in enumerate(manifest.groups):
        settings = ", ".join(f"{key} {value}" for key, value in group.settings.items())
        lines.append(f"group {index}, {len(group.parameters)} parameters: {settings}")
    if manifest.loss_scale:
        lines.append(f"loss scale: {manifest.loss_scale['scale']}")
    lines += [f"{key}: {value}" for key, value in manifest.progress.items()]
    if options.tensors:
        for key, tensor in manifest.tensors.items():
            dtype = str(tensor.spec.dtype).removeprefix("torch.")
            lines.append(f"{key}  {dtype} {list(tensor.spec.shape)}  {len(tensor.pieces)} pieces")
    print("\n".join(printable(line, limit=_LINE) for line in lines))  # noqa: T201
    return 0


def _verify(options: argparse.Namespace) -> int:
    from arsg_dist.checkpoint import SavedRun

    try:
        saved = SavedRun(options.path)
        damage = saved.damage()
    except ValueError as error:
        damage = [str(error)]
    for line in damage:
        print(printable(line, limit=_LINE), file=sys.stderr)  # noqa: T201
    if damage:
        return FAILED
    pieces = sum(len(tensor.pieces) for tensor in saved.manifest.tensors.values())
    print(f"{options.path}: {pieces} pieces in {len(saved.manifest.shards)} shards, all digests match")  # noqa: T201
    return 0


def _convert(options: argparse.Namespace) -> int:
    from arsg_dist.checkpoint import SavedRun
    from arsg_dist.checkpoint.dcp import INDEX

    portable, index = (options.path / name for name in ("manifest.json", INDEX))
    if (options.buffers or options.frozen) and (portable.is_file() or not index.is_file()):
        raise ValueError(
            f"--buffers and --frozen are for checkpoints of torch.distributed.checkpoint: {options.path} tells them"
        )
    if portable.is_file():
        if options.to == "portable":
            raise ValueError(
                f"{options.path} is a portable checkpoint already; for another format add --to "
                f"{', '.join(name for name in _TARGETS if name != 'portable')}"
            )
        saved = SavedRun(options.path)
        _write(options, saved, saved.manifest.engine)
    elif index.is_file():
        _write(options, _read_dcp(options), "torch.distributed.checkpoint")
    else:
        _from_deepspeed(options)
    print(f"wrote {options.output}")  # noqa: T201
    return 0


def _read_dcp(options: argparse.Namespace) -> Any:
    from arsg_dist.checkpoint.dcp import DCPCheckpoint

    saved = DCPCheckpoint(options.path, buffers=options.buffers, frozen=options.frozen)
    said = {
        "buffers": saved.buffers,
        "further names of parameters": [f"{alias} = {name}" for alias, name in saved.aliases.items()],
        "frozen": [name for name in saved.parameters if name not in set(saved.trained)],
        "left out": saved.left_out,
    }
    for what, names in said.items():
        if names:
            shown = ", ".join(names[:_NAMES]) + (f" and {len(names) - _NAMES} more" if names[_NAMES:] else "")
            print(f"{what}: {printable(shown, limit=_LINE)}")  # noqa: T201
    return saved


def _from_deepspeed(options: argparse.Namespace) -> None:
    from arsg_dist.deepspeed.checkpoint.files import reading
    from arsg_dist.deepspeed.checkpoint.reader import read_checkpoint

    if options.to == "deepspeed":
        from arsg_dist.deepspeed.universal import convert

        convert(options.path, options.output, trust_pickle=options.trust_pickle)
        return
    saved = read_checkpoint(options.path, trust_pickle=options.trust_pickle, of_arsg=False)
    with reading(saved.where):
        _write(options, saved, "deepspeed")


def _write(options: argparse.Namespace, saved: Any, engine: str) -> None:
    from arsg_dist.checkpoint import convert, dcp

    if options.to == "portable":
        convert.to_portable(saved, options.output, engine, {})
    elif options.to == "torch":
        convert.to_torch(saved, options.output)
    elif options.to == "deepspeed":
        from arsg_dist.deepspeed.universal import convert_saved

        convert.check_new(options.output)
        convert_saved(saved, options.output)
    else:
        dcp.to_dcp(saved, options.output, titan=options.to == "torchtitan")


def _export(options: argparse.Namespace) -> int:
    import torch

    from arsg_dist.checkpoint import SavedRun
    from arsg_dist.checkpoint.export import export_saved

    export_saved(SavedRun(options.path), options.output, options.at, getattr(torch, options.dtype))
    print(f"wrote {options.output}: the weights at {options.at}, {options.dtype}")  # noqa: T201
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "show": _show,
    "verify": _verify,
    "convert": _convert,
    "export": _export,
}
