"""Say how far a recipe's learning rate is from the one that the theory calls safe: `arsg-dist lr-find`."""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Final

from arsg_dist.engine.job import BAD_INPUT, FAILED, JobError
from arsg_dist.safe_io.text import printable

SUMMARY: Final = (
    "measure curvature and gradient noise of a recipe; say how far its learning rate is from the safe one"
)
_LONGEST: Final = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run`."""
    parser.add_argument("--batches", type=int, default=4, help="batches to measure on (default: 4)")
    parser.add_argument(
        "--iterations",
        type=int,
        default=20,
        help="Lanczos' iterations, a Hessian-vector product per batch each",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="RUN",
        help="a run of the recipe, or one of its checkpoints, to measure at (default: the random start)",
    )
    parser.add_argument(
        "recipe", nargs="*", help="after --, what arsg-imagenet train is given: -- --config FILE ..."
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the advice.

    Returns:
        0; 1 where loader processes fail; 2 for bad input.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answer
            from arsg_dist.imagenet.curvature import advise_recipe
            from arsg_dist.imagenet.data.delivery import LoadingError
            from arsg_dist.imagenet.recipe import read_arguments

            if min(arguments.batches, arguments.iterations) < 1:
                raise ValueError("--batches and --iterations must be at least 1")
            advice = advise_recipe(
                read_arguments(arguments.recipe).training(),
                batches=arguments.batches,
                iterations=arguments.iterations,
                checkpoint=arguments.checkpoint,
            )
    except (ValueError, TypeError, ImportError, OSError, JobError) as error:
        print(f"error: {printable(error, limit=_LONGEST)}", file=sys.stderr)  # noqa: T201
        return BAD_INPUT
    except LoadingError as error:
        print(f"error: {printable(error, limit=_LONGEST)}", file=sys.stderr)  # noqa: T201
        return FAILED
    print(advice)  # noqa: T201
    return 0
