"""Say how far a recipe's learning rate is from the one that the theory calls safe: `arsg-dist lr-find`."""

import argparse
import contextlib
import sys
from typing import Final

from arsg_dist.engine.job import BAD_INPUT
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
        "--updates", type=int, default=0, help="updates to train before, by the recipe (default: 0)"
    )
    parser.add_argument(
        "recipe", nargs="*", help="after --, what arsg-imagenet train is given: -- --config FILE ..."
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the advice.

    Returns:
        0; 2 for bad input.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answer
            from arsg_dist.engine import SingleProcessCommunicator
            from arsg_dist.imagenet.recipe import read_arguments
            from arsg_dist.imagenet.training.curvature import advise_recipe

            if min(arguments.batches, arguments.iterations) < 1 or arguments.updates < 0:
                raise ValueError("--batches and --iterations must be at least 1, --updates at least 0")
            advice = advise_recipe(
                read_arguments(arguments.recipe).training(),
                SingleProcessCommunicator(),
                batches=arguments.batches,
                iterations=arguments.iterations,
                updates=arguments.updates,
            )
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"error: {printable(error, limit=_LONGEST)}", file=sys.stderr)  # noqa: T201
        return BAD_INPUT
    print(advice)  # noqa: T201
    return 0
