"""Every command of the documents names files, modules, subcommands and options that exist."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from arsg_dist.cli import main as arsg_dist
from arsg_dist.imagenet import cli as arsg_imagenet
from tests.support.launchers import REPOSITORY

PAGES = [
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted(REPOSITORY.glob("*.md")),
    *REPOSITORY.glob("benchmarks/*/*.md"),
]
MODULE = r"-m (?:tests|benchmarks|arsg_dist)[\w.]*"
OWN = re.compile(
    rf"(?P<program>arsg-dist|arsg-imagenet|pytest|make|{MODULE}|(?:launch|examples)/\w+\.(?:py|sh))(?= |$)(?P<rest>.*)"
)
STARTS = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:arsg-|python|pytest|make |torchrun|deepspeed |mpirun|horovodrun|srun|launch/|bash)"
)
OPTION = re.compile(r"(?:^|(?<=[ \[]))--[a-z][\w.-]*")
PYTESTS_OWN = {"--hypothesis-profile", "--timeout", "--full", "--durations", "--maxfail"}


def commands(page: Path) -> Iterator[str]:
    """The lines of code of a page, whole ones and those in a sentence, that start one of our programs."""
    text = re.sub(r"```python\n.*?```", "", page.read_text(), flags=re.DOTALL)
    text = text.replace("\\\n", " ")
    lines = re.findall(
        r"^(?:    |\t)?(\S.*)$", "\n".join(re.findall(r"^    \S.*$|^```.*?^```", text, re.M | re.S)), re.M
    )
    for code in [*lines, *re.findall(r"`([^`\n]+)`", text)]:
        command = re.sub(r"\s+#.*", "", code).strip()
        found = OWN.search(command)
        if found and STARTS.match(command):
            yield command


@cache
def help_of(program: str, *subcommands: str) -> str:
    main = {"arsg-dist": arsg_dist.main, "arsg-imagenet": arsg_imagenet.main}[program]
    shown = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [program, *subcommands, "--help"]),
        mock.patch.object(arsg_imagenet, "end_process", sys.exit),
        contextlib.redirect_stdout(shown),
        contextlib.redirect_stderr(shown),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert ended.value.code == 0, f"there is no {program} {' '.join(subcommands)}: {shown.getvalue()}"
    return shown.getvalue()


def source_of(module: str) -> str:
    place = REPOSITORY / module.replace(".", "/")
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert all(file.is_file() for file in files), f"there is no module {module}"
    return (
        "\n".join(file.read_text() for file in files)
        + (REPOSITORY / "benchmarks/common/machine.py").read_text()
    )


def wrong(command: str) -> list[str]:
    """What of a command does not exist."""
    found = OWN.search(command)
    assert found is not None
    program, rest = found["program"], found["rest"]
    rest, _, script = rest.partition(" -- ")
    problems = wrong(script) if OWN.search(script) else []
    words = re.findall(r"\S+", rest)
    if program == "make":
        targets = re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.M)
        return [word for word in words if word.islower() and word not in targets]
    if program == "pytest":
        known = (REPOSITORY / "tests/conftest.py").read_text() + " ".join(PYTESTS_OWN)
        problems += [
            w for w in words if w.startswith("tests/") and not (REPOSITORY / w.split("::")[0]).exists()
        ]
    elif "-m " in program:
        known = source_of(program.split()[-1])
    elif program.startswith(("launch/", "examples/")):
        if not (REPOSITORY / program).is_file():
            return [program]
        known = (
            help_of("arsg-imagenet", "train") if "imagenet" in program else (REPOSITORY / program).read_text()
        )
    else:
        subcommands = []
        for word in words:
            if not re.fullmatch(r"[a-z][a-z-]*", word):
                break
            subcommands.append(word)
        depth = 2 if subcommands[:1] in (["launch"], ["checkpoint"]) else 1
        known = help_of(program, *subcommands[:depth])
    return problems + [option for option in OPTION.findall(rest) if option not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_command_of_a_page_can_be_typed(page: Path) -> None:
    """Catches a renamed option, a file that has moved and a subcommand that is gone."""
    problems = {command: found for command in commands(page) if (found := wrong(command))}
    assert not problems


def test_commands_are_found_at_all() -> None:
    """Catches a pattern that no longer finds the commands, and so nothing wrong."""
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) > 90
    assert wrong(
        "arsg-dist launch slurm --engine ddp --nodez 4 -- launch/train_imagenet.py --data.rot X"
    ) == [
        "--data.rot",
        "--nodez",
    ]
    assert wrong("pytest tests/none.py --kills 3") == ["tests/none.py"]
    assert wrong("make tests") == ["tests"]
