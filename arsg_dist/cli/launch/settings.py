"""Join what a target wants to set with what the user has set: one rule for all variables and options.

- What the user has set stays; a target sets the rest.
- A list of options (ssh's) is added to, behind the user's own: of an option that is named twice, ssh takes the first.
- Where a target works with one value only, another one of the user's is refused, with both.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from arsg_dist.safe_io import files

GIVEN = "--env"
HERE = "the environment here"

FAMILIES = (
    "NCCL_",
    "RCCL_",
    "TORCH_NCCL_",
    "GLOO_",
    "UCX_",
    "FI_",
    "MPICH_",
    "HOROVOD_",
    "OMPI_MCA_",
    "PRTE_MCA_",
    "PMIX_MCA_",
)
"""Settings of the libraries by which ranks exchange data: where they differ between ranks, a job hangs or crawls."""

# What horovodrun sets for one rank, left over where a job is started out of another.
_OF_ONE_RANK = re.compile(
    r"HOROVOD_(RANK|SIZE|(LOCAL|CROSS)_(RANK|SIZE)|HOSTNAME|ELASTIC|GLOO_RENDEZVOUS_(ADDR|PORT)|SECRET_KEY)"
)

SSH = ("OMPI_MCA_plm_rsh_args", "OMPI_MCA_plm_ssh_args", "PRTE_MCA_plm_ssh_args", "PRTE_MCA_plm_rsh_args")
LISTS = ("PDSH_SSH_ARGS_APPEND", *SSH)
"""Variables that are lists of ssh's options."""

# One setting under several names, of which a user knows one: Open MPI 4 reads the first prefix only, 5 the second.
_SAME = (
    SSH,
    ("OMPI_MCA_oob_tcp_keepalive_time", "PRTE_MCA_oob_tcp_keepalive_time"),
    ("OMPI_MCA_oob_tcp_keepalive_intvl", "PRTE_MCA_oob_tcp_keepalive_intvl"),
    ("OMPI_MCA_oob_tcp_keepalive_probes", "PRTE_MCA_oob_tcp_keepalive_probes"),
)
BINDING = (
    "OMPI_MCA_hwloc_base_binding_policy",
    "PRTE_MCA_hwloc_default_binding_policy",
    "OMPI_MCA_hwloc_default_binding_policy",
)
MAPPING = (
    "OMPI_MCA_rmaps_base_mapping_policy",
    "PRTE_MCA_rmaps_default_mapping_policy",
    "OMPI_MCA_rmaps_default_mapping_policy",
)
"""Where mpirun reads how to bind and place ranks, if no option says it."""


@dataclass(frozen=True)
class Found:
    """A variable that the user has set: its name, its value, and where."""

    name: str
    value: str
    source: str

    def __str__(self) -> str:
        """Return it as it is said in messages."""
        return f"{GIVEN} {self.name}={self.value}" if self.source == GIVEN else f"{self.name}={self.value}"


@dataclass(frozen=True, kw_only=True)
class UserSettings:
    """Variables that the user has set.

    Attributes:
        given: by `--env NAME=VALUE`, which counts before the others.
        inherited: names of `--env NAME`; their values are in no file and in no command.
        file: from DeepSpeed's own file of variables, for the targets whose launcher reads it.
        here: where the job is started, for the targets whose ranks are to have the same; a variable without a value
            is as good as not set.
    """

    given: Mapping[str, str] = field(default_factory=dict)
    inherited: tuple[str, ...] = ()
    file: Mapping[str, str] = field(default_factory=dict)
    here: Mapping[str, str] = field(default_factory=dict)

    def find(self, *names: str) -> Found | None:
        """Return the first of these variables that the user has set."""
        sources = ((GIVEN, self.given), (".deepspeed_env", self.file), (HERE, self.here))
        for name in names:
            for source, variables in sources:
                if variables.get(name):
                    return Found(name, variables[name], source)
        return None

    def of_families(self) -> dict[str, str]:
        """Return the settings of libraries that are set here and that no rank gets by itself on another host."""
        return {
            name: value
            for name, value in sorted(self.here.items())
            if value
            and name.startswith(FAMILIES)
            and name not in self.inherited
            and not _OF_ONE_RANK.fullmatch(name)
        }


def join(wanted: Mapping[str, str], user: UserSettings) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the variables with the user's values where there are any, and what to tell the user.

    Args:
        wanted: by a target or a site's profile.
        user: what the user has set. What is inherited unwritten is left out.
    """
    joined, notes = {}, []
    for name, value in wanted.items():
        if name in user.inherited:
            continue
        found = user.find(name, *same_as(name))
        if found is None:
            joined[name] = value
        elif name in LISTS:
            joined[name] = add_ssh_options(found.value, value)
        else:
            joined[name] = found.value
            if found.value != value and found.source != GIVEN:
                notes.append(f"{found} of {found.source} is kept; otherwise it would be {value}")
    # Which of two names of one list counts is said nowhere: both hold the same.
    of_ours = [name for name in SSH if name in joined]
    for name in SSH:
        if of_ours and name not in joined and user.find(name) is not None:
            joined[name] = joined[of_ours[0]]
    return joined, tuple(dict.fromkeys(notes))


def same_as(name: str) -> tuple[str, ...]:
    """Return the other names of a variable."""
    return tuple(other for names in _SAME if name in names for other in names if other != name)


def add_ssh_options(own: str, added: str) -> str:
    """Put options of ssh behind the user's own, but those that they name already.

    Args:
        own: the user's.
        added: of the form "-o Name=value -o Name=value".
    """
    pairs = re.findall(r"-o (\S+?)=(\S+)", added)
    missing = [
        f"-o {name}={value}" for name, value in pairs if not re.search(rf"-o\s*{name}\b", own, re.IGNORECASE)
    ]
    return " ".join([own.strip(), *missing])


def require(user: UserSettings, name: str, value: str, who: str, *, also: Iterable[str] = ()) -> None:
    """Refuse a variable of the user's that a launcher would overrule.

    Args:
        user: what the user has set.
        name: of the variable.
        value: what the launcher sets it to.
        who: sets it.
        also: other values that do as well.

    Raises:
        ValueError: the user has another value; the message has both.
    """
    found = user.find(name)
    if found is not None and found.value.lower() not in (value.lower(), *also):
        raise ValueError(
            f"{found} cannot be kept: {who} needs {name}={value}; unset it, or take another target"
        )


def agree(option: str, chosen: str | None, found: Found | None, default: str) -> str:
    """Return the one value of an option of this command and of a variable that says the same.

    Args:
        option: its name.
        chosen: its value, None if it was not given.
        found: the variable, None if it is not set.
        default: if neither is.

    Raises:
        ValueError: they say different things.
    """
    if chosen is not None and found is not None and chosen != found.value:
        raise ValueError(f"{option} {chosen} contradicts {found}: unset the variable, or leave out {option}")
    return chosen if chosen is not None else found.value if found is not None else default


def read_deepspeed_env(directory: Path, here: Mapping[str, str]) -> dict[str, str]:
    """Read the variables that DeepSpeed's runners hand to other hosts, from the files that they would read.

    Args:
        directory: in which the runner is started.
        here: the environment; DS_ENV_FILE names another file than .deepspeed_env.

    Raises:
        OSError: a file cannot be read.
        ValueError: a line is not NAME=VALUE, of which DeepSpeed makes a traceback.
    """
    name = here.get("DS_ENV_FILE") or ".deepspeed_env"
    variables: dict[str, str] = {}
    # As in DeepSpeed 0.19.8, launcher/runner.py: the file in the working directory counts.
    for path in dict.fromkeys((Path(os.path.expanduser("~")) / name, directory / name)):
        if not path.is_file():
            continue
        for number, line in enumerate(files.read_text(path, follow=True).splitlines(), start=1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            variable, equals, value = text.partition("=")
            if not equals or not variable.strip():
                raise ValueError(f"{path}, line {number}: not NAME=VALUE, which DeepSpeed expects")
            variables[variable.strip()] = value.strip()
    return variables
