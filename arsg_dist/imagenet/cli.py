"""The command line: `arsg-imagenet train`, which is also launch/train_imagenet.py."""

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from arsg_dist.engine import Communicator, JobError, Ranks, discover_ranks, end_process
from arsg_dist.imagenet.config import TrainConfig
from arsg_dist.imagenet.engines import choose_engine, connect
from arsg_dist.imagenet.train import Job, train

BAD_INPUT = 2
FAILED = 1


def main() -> None:
    """Entry point of `arsg-imagenet`."""
    if len(sys.argv) < 2 or sys.argv[1] != "train":
        print("usage: arsg-imagenet train [--help] ...", file=sys.stderr)  # noqa: T201
        sys.exit(BAD_INPUT)
    end_process(train_command(sys.argv[2:]))


def train_command(arguments: list[str]) -> int:
    """Trains as the arguments say, as one rank of a job.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad input (said on rank 0).
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        _parser().parse_args(["--help"])
    rank = -1
    try:
        ranks = discover_ranks()
        rank = ranks.rank
        chosen = _launch_options().parse_known_args(arguments)[0]
        engine = choose_engine(chosen.engine, chosen.deepspeed_config, ranks)
        communicator = connect(engine, ranks)
    except (ValueError, ImportError) as error:
        # Without a working connection every rank can only speak for itself.
        print(f"error: {error}" + (f" (rank {rank})" if rank > 0 else ""), file=sys.stderr)  # noqa: T201
        return BAD_INPUT
    try:
        return _connected(arguments, engine, ranks, communicator)
    except Exception:
        # Not agreed on: the other ranks may be waiting in a collective. End at once, so that the launcher ends them.
        print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)  # noqa: T201
        end_process(FAILED)


def _connected(arguments: list[str], engine: Any, ranks: Ranks, communicator: Communicator) -> int:
    code = 0
    try:
        with communicator.fail_together(ValueError, argparse.ArgumentError):
            parser = _parser()
            options = parser.instantiate(parser.parse_args(arguments))
            config = TrainConfig(**{name: options[name] for name in TrainConfig.__dataclass_fields__})
        started = communicator.from_rank_0(time.strftime("%Y%m%d-%H%M%S"))
        output = Path(options.output or f"runs/{config.model}-{engine}-{started}")
        train(config, Job(engine, output, options.resume, options.deepspeed_config), ranks, communicator)
    except JobError as error:
        if ranks.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        code = BAD_INPUT
    communicator.close()
    return code


def _launch_options() -> argparse.ArgumentParser:
    """What has to be known before the ranks are connected."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--deepspeed_config")
    return parser


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="arsg-imagenet train",
        description="Trains an image classifier. Run it alone, under deepspeed, or under horovodrun or mpirun.",
        exit_on_error=False,
        print_config="--print_config",
    )
    parser.add_argument(
        "--config", action="config", help="recipe: a YAML file with any of the settings below"
    )
    parser.add_argument("--engine", default="auto", help="auto, deepspeed, horovod or single (default: auto)")
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON config; implies the engine deepspeed")
    parser.add_argument("--output", help="directory of the run (default: runs/MODEL-ENGINE-TIME)")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --output from its last checkpoint"
    )
    parser.add_argument(
        "--local_rank", type=int, help="passed by the deepspeed launcher; the environment is used"
    )
    parser.add_class_arguments(TrainConfig, as_group=True)
    return parser
