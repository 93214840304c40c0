"""Declare the interface of a launch target."""

import argparse
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from arsg_dist.cli.launch.job import Job, Plan
from arsg_dist.cli.launch.profiles import Profile
from arsg_dist.engine.registry import ENGINES, Rendezvous


class Target(ABC):
    """One way to start a job. A target only plans: it starts nothing and needs no engine installed.

    Attributes:
        name: on the command line.
        summary: one line for --help.
        rendezvous: the ways in which ranks meet that it can wire; it starts every engine whose ranks meet so.
        places: whether the user names the hosts, or a number of nodes a scheduler will choose, or neither.
        restarts: whether a scheduler or an operator may start what the target writes again.
        cannot_inherit: why no variable can be handed on unwritten (`--env NAME`), and what to do; "" where it can.
        in_containers: the ranks run in an image: its interpreter and directory, and nothing of the environment here.
        reads_deepspeed_env: its launcher hands the variables of DeepSpeed's .deepspeed_env to other hosts.
        fixed_hosts: the job must have as many hosts as it was started for.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    rendezvous: ClassVar[tuple[Rendezvous, ...]]
    places: ClassVar[Literal["hosts", "nodes", "here"]]
    restarts: ClassVar[bool] = False
    cannot_inherit: ClassVar[str] = ""
    in_containers: ClassVar[bool] = False
    reads_deepspeed_env: ClassVar[bool] = False
    fixed_hosts: ClassVar[bool] = True

    @classmethod
    def engines(cls) -> dict[str, Rendezvous]:
        """Return the engines that it can start: name → how their ranks meet."""
        return {
            entry.name: entry.rendezvous
            for entry in ENGINES.values()
            if entry.rendezvous is not None and entry.rendezvous in cls.rendezvous
        }

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:  # noqa: B027 - most have none
        """Add the options that only this target has."""

    @abstractmethod
    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Return what will be executed.

        Raises:
            ValueError: this target cannot do what the job or the options ask for.
        """
