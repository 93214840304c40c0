"""Run `arsg-imagenet`: its commands `train`, `recipes`, `evaluate`, `compare`, `export` and `shard`."""

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arsg_dist.engine import Communicator, JobError, Ranks, discover_ranks, end_process, load_builder
from arsg_dist.engine.job import BAD_INPUT, DONE, FAILED
from arsg_dist.imagenet.data.delivery import LoadingError
from arsg_dist.imagenet.data.shard_writer import shard_command
from arsg_dist.imagenet.evaluate import (
    choose_connection,
    evaluate,
    locate,
    parser_of_evaluation,
    read_task,
    report,
)
from arsg_dist.imagenet.formats import FORMATS, export_as
from arsg_dist.imagenet.models import build_shapes
from arsg_dist.imagenet.named_recipes import list_or_copy
from arsg_dist.imagenet.output import compare
from arsg_dist.imagenet.output.export import CARD
from arsg_dist.imagenet.output.weights import BEST, EMA, LAST
from arsg_dist.imagenet.recipe import read_arguments, resolved
from arsg_dist.imagenet.signals import StopRequest
from arsg_dist.imagenet.training.engines import choose_engine
from arsg_dist.imagenet.training.identity import ALLOWED
from arsg_dist.imagenet.training.parts import Start
from arsg_dist.imagenet.training.setup import train
from arsg_dist.safe_io.processes import keep_compiled_code_private
from arsg_dist.safe_io.text import printable_lines

_SHOWING = ("--print_config", "--print-config", "--print_plan", "--print-plan")
_CLASSES = 1000  # of the network that --print-plan shows, for which no data is opened


def main() -> None:
    """Run the command that the arguments name; the entry point of `arsg-imagenet`."""
    commands = {
        "train": train_command,
        "recipes": recipes_command,
        "evaluate": evaluate_command,
        "compare": compare_command,
        "export": export_command,
        "shard": shard_command,
    }
    usage = f"usage: arsg-imagenet {{{','.join(commands)}}} [--help] ..."
    if "".join(sys.argv[1:2]).startswith("--local_rank="):  # the deepspeed launcher puts it in front
        del sys.argv[1]
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(usage)  # noqa: T201
        sys.exit(0)
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        print(usage, file=sys.stderr)  # noqa: T201
        sys.exit(BAD_INPUT)
    end_process(commands[sys.argv[1]](sys.argv[2:]))


def recipes_command(arguments: list[str]) -> int:
    """List the recipes that have names, or copy one.

    Returns:
        The exit code: 0 done, 2 bad input.
    """
    try:
        print(list_or_copy(arguments))  # noqa: T201
    except (ValueError, OSError) as error:
        _say_error(error)
        return BAD_INPUT
    return DONE


def compare_command(arguments: list[str]) -> int:
    """Print a table of several runs and draw them.

    Returns:
        The exit code: 0 done, 2 bad input.
    """
    parser = argparse.ArgumentParser(
        prog="arsg-imagenet compare",
        description="Draws runs over epochs and wall time, and prints a table (Markdown).",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--output", type=Path, default=Path(compare.PICTURE), help="the picture (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        runs = compare.read_runs(options.runs)
        compare.draw(runs, options.output)
    except (ValueError, OSError) as error:
        _say_error(error)
        return BAD_INPUT
    for warning in compare.warnings(runs):
        print(f"warning: {warning}", file=sys.stderr)  # noqa: T201
    print(compare.table(runs))  # noqa: T201
    print(f"\npicture: {options.output}")  # noqa: T201
    return 0


def export_command(arguments: list[str]) -> int:
    """Copy a run's weights, with a model card, for other programs.

    Returns:
        The exit code: 0 done, 2 bad input.
    """
    parser = argparse.ArgumentParser(
        prog="arsg-imagenet export",
        description="Copies a run's weights (safetensors) with a model card, for use by plain PyTorch.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--output", type=Path, required=True, help="directory to make")
    parser.add_argument(
        "--weights",
        choices=[BEST, LAST, EMA],
        default=BEST,
        help="best: of the epoch with the highest validation accuracy (default); last; ema: the moving average",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="safetensors",
        help="besides model.safetensors: torchvision (model.pth), timm (config.json, for timm's local-dir:DIR) or onnx "
        "(model.onnx); each is loaded back and compared",
    )
    options = parser.parse_args(arguments)
    try:
        path = export_as(options.format, options.run, options.output, options.weights)
    except (ValueError, OSError, ImportError) as error:
        _say_error(error)
        return BAD_INPUT
    print(f"weights in {path}, model card in {path.with_name(CARD)}")  # noqa: T201
    return 0


def train_command(arguments: list[str]) -> int:
    """Train as the arguments say, as one rank of a job.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad input (said on rank 0), 75 saved on a signal and to be resumed.
    """
    if any(argument.partition("=")[0] in ("-h", "--help", *_SHOWING) for argument in arguments):
        return _show(arguments)
    stop = StopRequest()
    with stop.installed():  # until the process ends
        return _train(arguments, stop)


def _train(arguments: list[str], stop: StopRequest) -> int:
    chosen = _launch_options().parse_known_args(arguments)[0]
    return _as_rank(
        lambda ranks: choose_engine(chosen.engine, chosen.deepspeed_config, ranks),
        lambda engine, ranks, communicator: _connected(arguments, engine, ranks, communicator, stop),
    )


def evaluate_command(arguments: list[str]) -> int:
    """Measure trained weights as the arguments say, as one rank of a job.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad input (said on rank 0).
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(parser_of_evaluation().format_help(), end="")  # noqa: T201
        return DONE
    chosen = _launch_options().parse_known_args(arguments)[0]

    def evaluate_as(_: str, ranks: Ranks, communicator: Communicator) -> int:
        try:
            with communicator.fail_together():
                options = parser_of_evaluation().parse_args(arguments)
                found = str(locate(options)) if ranks.rank == 0 else ""
            path = Path(communicator.from_rank_0(found))
            with communicator.fail_together():
                task = read_task(options, path)
            result, bad = evaluate(task, ranks, communicator)
            with communicator.fail_together(OSError, ValueError):
                if ranks.rank == 0:
                    print(report(task, result, bad, communicator.world_size, options.output))  # noqa: T201
        except JobError as error:
            if ranks.rank == 0:
                _say_error(error)
            communicator.close()
            return BAD_INPUT
        communicator.close()
        return DONE

    return _as_rank(lambda ranks: choose_connection(chosen.engine, ranks), evaluate_as)


def _as_rank(choose: Callable[[Ranks], str], work: Callable[[str, Ranks, Communicator], int]) -> int:
    """Connect this rank by the engine that is chosen and work; return the exit code."""
    try:
        ranks = discover_ranks()
    except (ValueError, ImportError) as error:
        _say_error(error)
        return BAD_INPUT
    with _future_warnings_once(ranks.rank):  # of engines that are imported, too
        return _connect_and_work(ranks, choose, work)


def _connect_and_work(
    ranks: Ranks, choose: Callable[[Ranks], str], work: Callable[[str, Ranks, Communicator], int]
) -> int:
    try:
        keep_compiled_code_private()
        engine = choose(ranks)
        communicator = load_builder(engine).connect(ranks)
    except JobError as error:  # agreed on
        if ranks.rank == 0:
            _say_error(error)
        return BAD_INPUT
    except (ValueError, ImportError) as error:
        # Without a working connection every rank can only speak for itself.
        _say_error(error, f" (rank {ranks.rank})" if ranks.rank > 0 else "")
        return BAD_INPUT
    try:
        return work(engine, ranks, communicator)
    except LoadingError as error:  # of this rank alone: the others end as below
        _say_error(error, f" (rank {ranks.rank})" if ranks.world_size > 1 else "")
        end_process(FAILED)
    except Exception:
        # Not agreed on: the other ranks may be waiting in a collective. End at once, so that the launcher ends them.
        print(f"rank {ranks.rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)  # noqa: T201
        end_process(FAILED)


@contextmanager
def _future_warnings_once(rank: int) -> Iterator[None]:
    """Show each FutureWarning of the libraries once, on rank 0: nothing that a user can change.

    Python would, but forgets what it has shown whenever somebody changes a filter, as torch does in every update. Who
    has asked for warnings (``python -W``, PYTHONWARNINGS) gets them all.
    """
    if sys.warnoptions:
        yield
        return
    real, shown = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if issubclass(category, FutureWarning):
            if rank != 0 or str(message) in shown:
                return
            shown.add(str(message))
        real(message, category, *place, **options)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = real


def _show(arguments: list[str]) -> int:
    """Show help or the resolved settings, for which no ranks are connected."""
    planned = any(argument in ("--print-plan", "--print_plan") for argument in arguments)
    try:
        print(_plan(arguments) if planned else resolved(arguments), end="")  # noqa: T201
    except (ValueError, ImportError) as error:
        _say_error(error)
        return BAD_INPUT
    except SystemExit as end:
        return int(end.code or 0)
    return DONE


def _plan(arguments: list[str]) -> str:
    """Say which parts of the network the engine gathers one by one; nothing is made of it but its shapes."""
    config = read_arguments(arguments)
    name = choose_engine(config.engine, config.deepspeed_config, discover_ranks({}))
    module = build_shapes(config.model, _CLASSES)
    units = load_builder(name).units(module)
    whole = sum(parameter.numel() for parameter in module.parameters())
    if not units:
        return f"the engine {name} gathers no parts of {config.model}: {whole:,} parameters with {_CLASSES} classes\n"
    sizes = {unit: sum(x.numel() for x in module.get_submodule(unit).parameters()) for unit in units}
    lines = [
        f"{size:>15,}  {unit} ({type(module.get_submodule(unit)).__name__})" for unit, size in sizes.items()
    ]
    rest = whole - sum(sizes.values())
    return "\n".join(
        [
            f"the engine {name} gathers {len(units)} parts of {config.model} one by one, and the rest together:",
            *lines,
            f"{rest:>15,}  the rest, with {_CLASSES} classes",
            "",
        ]
    )


def _say_error(error: Exception, suffix: str = "") -> None:
    """Say what is wrong; it may quote what a stranger wrote."""
    print("error: " + printable_lines(f"{error}{suffix}"), file=sys.stderr, flush=True)  # noqa: T201


def _connected(
    arguments: list[str], engine: str, ranks: Ranks, communicator: Communicator, stop: StopRequest
) -> int:
    code = 0
    try:
        with communicator.fail_together():
            options = read_arguments(arguments)
            config = options.training()
            if options.resume is True and options.output is None:
                raise ValueError("--resume needs --output, the directory of the run to continue")
        started = communicator.from_rank_0(time.strftime("%Y%m%d-%H%M%S"))
        output = Path(
            options.output or f"runs/{config.model.replace(':', '-').replace('/', '-')}-{engine}-{started}"
        )
        start = Start(
            engine,
            output,
            options.resume,
            options.deepspeed_config,
            options.max_updates,
            options.skip_damaged,
            frozenset(kind for kind in ALLOWED if getattr(options, f"allow_other_{kind}")),
        )
        if options.resume == "auto" and options.output is None and ranks.rank == 0:
            print(f"no --output: another start of this command begins a new run; this one is {output}")  # noqa: T201
        code = train(config, start, ranks, communicator, stop)
    except JobError as error:
        if ranks.rank == 0:
            _say_error(error)
        code = BAD_INPUT
    communicator.close()
    return code


def _launch_options() -> argparse.ArgumentParser:
    """Return a parser of what must be known before the ranks are connected."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--deepspeed_config")
    return parser
