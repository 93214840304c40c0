"""Find the recipes that come with the package by their names: list and copy them."""

import argparse
import difflib
from pathlib import Path
from typing import Final

from arsg_dist.safe_io.files import read_text, write_text
from arsg_dist.safe_io.text import printable

FOLDER: Final = Path(__file__).with_name("configs")
"""The checkout's configs/, of which a wheel has a copy here."""
_SUFFIX: Final = ".yaml"


def recipe_names() -> list[str]:
    """Return the names in order."""
    return sorted(path.stem for path in FOLDER.glob("*" + _SUFFIX))


def recipe_path(text: str) -> Path:
    """Return the file that `--config` means: the recipe of this name, or the path itself.

    A word without "/" and "." is a name, unless there is a file so called.

    Raises:
        ValueError: there is neither; the nearest names are shown.
    """
    path, names = Path(text), recipe_names()
    if path.exists() and not path.is_dir():
        return path
    if "/" in text or "." in text:
        if path.suffix == _SUFFIX and path.stem in names:
            raise ValueError(
                f"there is no file {printable(text)}; --config {path.stem} is the recipe of this name"
            )
        return path  # its reader says what is wrong
    return _shipped(text, names)


def _shipped(name: str, names: list[str]) -> Path:
    if name not in names:
        near = difflib.get_close_matches(name[:100], names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
        raise ValueError(f"there is no recipe {printable(name, limit=100)}; {hint}")
    return FOLDER / (name + _SUFFIX)


def description(name: str) -> str:
    """Return the first sentence of a recipe's leading comment."""
    first = read_text(FOLDER / (name + _SUFFIX), follow=True).partition("\n")[0]
    return first.removeprefix("#").strip().partition(". ")[0].rstrip(".:")


def list_or_copy(arguments: list[str]) -> str:
    """Carry out `arsg-imagenet recipes`; return what is to be shown.

    Raises:
        ValueError: there is no such recipe, or the file exists.
        OSError: it cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="arsg-imagenet recipes",
        description="Lists the recipes that --config knows by name, or copies one, to be changed.",
    )
    commands = parser.add_subparsers(dest="command")
    copy = commands.add_parser("copy", help="write a recipe as NAME.yaml")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("directory", nargs="?", type=Path, default=Path(), metavar="DIR", help="default: here")
    options = parser.parse_args(arguments)
    if options.command is None:
        names = recipe_names()
        width = max(map(len, names))
        return "\n".join(f"{name:{width}}  {description(name)}" for name in names)
    source = _shipped(options.name, recipe_names())
    target = options.directory / source.name
    if not options.directory.is_dir():
        raise ValueError(f"there is no directory {printable(options.directory)}")
    if target.exists() or target.is_symlink():
        raise ValueError(f"{printable(target)} exists already: remove it, or name another directory")
    write_text(target, read_text(source, follow=True))
    return f"{target}; train it by --config {target}"
