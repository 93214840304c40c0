"""Describe what is to be started, and what a target makes of it."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from arsg_dist.cli.launch.settings import UserSettings
from arsg_dist.engine.registry import Rendezvous
from arsg_dist.safe_io import files
from arsg_dist.safe_io.text import printable

# Letters, digits, '.', '-', '_' as Horovod's own check has it; a leading '-' would be read as an option by ssh.
_HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_END = "END_OF_FILE"


@dataclass(frozen=True)
class Host:
    """A machine and the number of ranks it gets.

    Attributes:
        name: as `ssh` takes it, without user or port.
        slots: ranks, usually one per GPU.
    """

    name: str
    slots: int

    def __post_init__(self) -> None:
        if not _HOST_NAME.fullmatch(self.name):
            raise ValueError(
                f"host name {self.name!r} is not one: letters, digits, '.', '-' and '_' only (put user names, ports "
                "and IPv6 addresses under an alias in ~/.ssh/config)"
            )
        if self.slots < 1:
            raise ValueError(f"host {self.name} has {self.slots} slots: give it at least 1, or leave it out")


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Read "node1:4,node2:4"; a host without a number has one slot.

    Raises:
        ValueError: not of this form, or a host is named twice.
    """
    hosts = []
    for part in text.split(","):
        name, _, slots = part.strip().partition(":")
        if slots and not slots.isdecimal():
            raise ValueError(f"--hosts: {part.strip()!r} is not NAME:SLOTS, for example node1:4,node2:4")
        hosts.append(Host(name, int(slots or 1)))
    return _distinct(hosts, "--hosts")


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Read a hostfile, lines "node1 slots=4" as of DeepSpeed; '#' begins a comment.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no regular file, a line is not of this form, or a host is named twice.
    """
    hosts = []
    for number, line in enumerate(files.read_text(path, follow=True).splitlines(), start=1):
        entry = line.partition("#")[0].split()
        if not entry:
            continue
        slots = entry[1].removeprefix("slots=") if len(entry) == 2 else ""
        if len(entry) != 2 or not entry[1].startswith("slots=") or not slots.isdecimal():
            raise ValueError(
                f"{path}, line {number}: '{printable(line.strip(), limit=80)}' is not 'NAME slots=N'"
            )
        hosts.append(Host(entry[0], int(slots)))
    if not hosts:
        raise ValueError(f"{path} names no host: write lines 'NAME slots=N'")
    return _distinct(hosts, str(path))


def _distinct(hosts: list[Host], source: str) -> tuple[Host, ...]:
    names = [host.name for host in hosts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{source} names {', '.join(twice)} more than once: give each host once, with its slots"
        )
    return tuple(hosts)


def hostfile(hosts: tuple[Host, ...]) -> str:
    """Return the content of a hostfile, as DeepSpeed and Open MPI read it."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def with_resume_auto(program: tuple[str, ...]) -> tuple[str, ...]:
    """Return a program as something may start it again and again: arsg-imagenet, but for its own --resume, with auto.

    A first start, one after a node was lost before the first checkpoint, and one that goes on are the same command.
    """
    script = Path(program[0]).name
    trains = script == "train_imagenet.py" or (script == "arsg-imagenet" and program[1:2] == ("train",))
    given = any(argument.partition("=")[0] == "--resume" for argument in program)
    return (*program, "--resume", "auto") if trains and not given else program


def is_variable(name: str) -> bool:
    """Say whether this is the name of an environment variable."""
    return bool(_VARIABLE.fullmatch(name))


def is_script(content: str) -> bool:
    """Say whether a file of this content is there to be executed."""
    return content.startswith("#!")


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse what is no environment.

    Raises:
        ValueError: a name is no variable name, or a value holds a newline or NUL.
    """
    for name, value in environment.items():
        if not is_variable(name):
            raise ValueError(f"{name!r} is not the name of an environment variable")
        if any(character in value for character in "\n\r\0"):
            raise ValueError(f"the value of {name} has a line break or NUL, which launchers do not carry")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A program to start on several ranks.

    Attributes:
        rendezvous: how the ranks meet; decides how they are wired up.
        program: a Python script and its arguments.
        python: interpreter on every host.
        directory: working directory on every host; where the ranks are in containers, of the command here.
        container_directory: working directory in containers; "" for the image's own.
        hosts: for targets that are told their hosts.
        nodes: for targets that ask a scheduler for them.
        ranks_per_node: on each of them, one per GPU.
        gpus_per_rank: 0 on machines without, else 1.
        environment: variables every rank gets: what this package wants and the site profile, but the user's own values
            where there are any, and what `--env` says.
        user: what the user has set, for what a target sets besides.
        detect_seconds: the silent loss of a host is to be noticed within this time.
    """

    rendezvous: Rendezvous
    program: tuple[str, ...]
    python: str
    directory: Path
    container_directory: str = ""
    hosts: tuple[Host, ...] = ()
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_rank: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    user: UserSettings = field(default_factory=UserSettings)
    detect_seconds: int = 60

    @property
    def inherited(self) -> tuple[str, ...]:
        """Name the variables that every rank gets from where the job is started; their values are written nowhere."""
        return self.user.inherited

    @property
    def rank_command(self) -> tuple[str, ...]:
        """Return what one rank executes."""
        return (self.python, "-u", *self.program)

    @property
    def deepspeed_command(self) -> tuple[str, ...]:
        """Return the start of DeepSpeed's launcher, under the job's interpreter."""
        return (*self.python_module, "deepspeed.launcher.runner")

    @property
    def python_module(self) -> tuple[str, ...]:
        """Return the start of an installed module, not of one in the current directory."""
        return (self.python, "-P", "-m")

    @property
    def ranks(self) -> int:
        """Count the ranks."""
        return sum(host.slots for host in self.hosts) if self.hosts else self.nodes * self.ranks_per_node

    def argument(self, name: str) -> str | None:
        """Return the value of the program's argument `name` ("--output"), or None."""
        for index, argument in enumerate(self.program):
            if argument == name and index + 1 < len(self.program):
                return self.program[index + 1]
            if argument.startswith(f"{name}="):
                return argument.partition("=")[2]
        return None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Exactly what will be done; `str()` of it is what --dry-run prints.

    Attributes:
        command: executed here, without a shell. Empty: nothing is executed, the files are the result.
        environment: variables added to this process's for the command.
        files: path → content, written before.
        notes: what the user has to do or know.
        failure_text: printed by the command on stderr, it means failure whatever the exit code says; "" for none.
        own_group: Ctrl-C goes past the command to the ranks, see `supervise.run_watched`.
        port: of this host, where the ranks will meet, and which nobody may have; 0 for none.
    """

    command: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[Path, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    failure_text: str = ""
    own_group: bool = False
    port: int = 0

    def __str__(self) -> str:
        """Return a shell script that does the same."""
        lines = [f"# {printable(note)}" for note in self.notes]
        for path, content in self.files.items():
            name, text = shlex.quote(str(path)), content.rstrip("\n")
            make = [
                f"rm -f -- {name}",
                f"cat > {name}",
                *([f"chmod u+x {name}"] if is_script(content) else []),
            ]
            end = _END
            while end in text.split("\n"):
                end += "_"
            lines += [f"(umask 077; {'; '.join(make)}) <<'{end}'", text, end]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        if self.command:
            lines.append(shlex.join(self.command))
        if self.failure_text:
            lines.append(f"# a failure even with exit code 0: {self.failure_text!r} on stderr")
        return "\n".join(lines)
