"""The interface of a launch target."""

import argparse
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from arsg_dist.launch import detection
from arsg_dist.launch.job import EngineName, Job, Plan
from arsg_dist.launch.profiles import Profile


class Target(ABC):
    """One way to start a job. A target only plans: it starts nothing and needs no engine installed.

    Attributes:
        name: on the command line.
        summary: one line for --help.
        engines: what it can start.
        places: whether the user names the hosts, or a number of nodes a scheduler will choose, or neither.
        cannot_inherit: why no variable can be handed on unwritten (`--env NAME`), and what to do; "" where it can.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    engines: ClassVar[tuple[EngineName, ...]]
    places: ClassVar[Literal["hosts", "nodes", "here"]]
    cannot_inherit: ClassVar[str] = ""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:  # noqa: B027 - most have none
        """Adds the options that only this target has."""

    @abstractmethod
    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """What will be executed.

        Raises:
            ValueError: this target cannot do what the job or the options ask for.
        """


def rank_environment(job: Job) -> dict[str, str]:
    """What every rank needs: timeouts, then what the user and the profile say."""
    timeouts = detection.torch_collectives if job.engine == "deepspeed" else detection.horovod_ranks
    return timeouts(job.detect_seconds) | job.environment
