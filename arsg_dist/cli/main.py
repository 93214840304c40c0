"""`arsg-dist SUBCOMMAND ...`. Every subcommand is a module here with SUMMARY, add_arguments() and run()."""

import argparse
import sys

from arsg_dist.cli import check_config, checkpoint, lr_find
from arsg_dist.cli.doctor import command as doctor
from arsg_dist.cli.launch import command as launch

_SUBCOMMANDS = {
    "check-config": check_config,
    "checkpoint": checkpoint,
    "doctor": doctor,
    "launch": launch,
    "lr-find": lr_find,
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `arsg-dist`."""
    parser = argparse.ArgumentParser(
        prog="arsg-dist", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # deepspeed's launcher passes it first
    subparsers = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    for name, module in _SUBCOMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=module.SUMMARY, description=module.SUMMARY, allow_abbrev=False
        )
        module.add_arguments(subparser)
    options = parser.parse_args(arguments)
    sys.exit(_SUBCOMMANDS[options.subcommand].run(options))


if __name__ == "__main__":
    main()
