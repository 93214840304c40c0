"""What runs torchrun on every host, with an ssh that stays on this one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arsg_dist.cli.launch import over_ssh
from arsg_dist.cli.launch.targets import local
from tests.cli.launch.test_targets import HOSTILE, plan, texts

HOST = """#!/bin/bash
# The last argument but one is the host, the last one its shell.
printf '%s\\n' "$@" >> "$RECORD"
exec sh
"""


def started(
    tmp_path: Path, hosts: dict[str, list[str]], least: int, **variables: str
) -> subprocess.Popen[str]:
    """Runs it with a command for each host."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(HOST)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    job = {
        "directory": str(tmp_path),
        "least": least,
        "ssh": ["-o", "BatchMode=yes"],
        "variables": ["PATH", *variables, "NOT_SET"],
        "hosts": hosts,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    return subprocess.Popen(
        [sys.executable, "-P", over_ssh.__file__, tmp_path / "job.json"],
        env={
            **os.environ,
            **variables,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "RECORD": str(tmp_path / "record"),
        },
        text=True,
        stderr=subprocess.PIPE,
    )


def test_values_and_arguments_reach_every_host_and_no_command_line(tmp_path: Path) -> None:
    """Catches a value that ps shows, and one that a shell splits or executes."""
    code = "import json, os, sys; json.dump([os.environ['MINE'], sys.argv[2:]], open(sys.argv[1], 'w'))"
    hosts = {name: [sys.executable, "-c", code, name, *HOSTILE] for name in ("node1", "node2")}
    value = "it's $(touch pwned) `id` secret"
    job = started(tmp_path, hosts, 2, MINE=value)
    assert job.wait(60) == 0
    for name in hosts:
        assert json.loads((tmp_path / name).read_text()) == [value, HOSTILE]
    assert not (tmp_path / "pwned").exists()
    arguments = (tmp_path / "record").read_text()
    assert "secret" not in arguments
    assert "node2\nsh\n" in arguments


@pytest.mark.parametrize(("least", "expected"), [(2, 7), (1, 0)])
def test_a_host_that_fails_ends_the_others_only_where_all_are_needed(
    least: int, expected: int, tmp_path: Path
) -> None:
    """Catches a job that waits for hosts that cannot come any more, and one that ends though it may go on."""
    hosts = {
        # What is left of it keeps no pipe of the job's open, whose end is waited for below.
        "node1": [
            "sh",
            "-c",
            f"trap 'exit 3' TERM; sleep {60 if least == 2 else 1} 2>/dev/null & wait; touch done",
        ],
        "node2": ["sh", "-c", "exit 7"],
    }
    job = started(tmp_path, hosts, least)
    assert job.wait(60) == expected
    assert (tmp_path / "done").exists() == (least == 1)
    assert job.stderr is not None
    assert "node2: ended with 7" in job.stderr.read()


def test_a_signal_ends_the_commands_by_term_and_gives_them_time(tmp_path: Path) -> None:
    """Catches ranks that go on when the command that started them has ended, or that cannot save."""
    hosts = {
        name: [
            "sh",
            "-c",
            f"trap 'sleep 0.3; touch saved-{name}; exit 1' TERM; touch up-{name}; sleep 60 & wait",
        ]
        for name in ("node1", "node2")
    }
    job = started(tmp_path, hosts, 2)
    end = time.monotonic() + 120
    while not all((tmp_path / f"up-{name}").exists() for name in hosts):
        assert time.monotonic() < end
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 128 + signal.SIGUSR1
    assert all((tmp_path / f"saved-{name}").exists() for name in hosts)


def test_restarts_are_started_with_what_they_need() -> None:
    """Catches a restart that begins anew, hosts that must all be there though some may go, and two first hosts."""
    program = ["launch/train_imagenet.py", "--engine", "ddp"]
    usual, restarted = (
        texts(plan("torchrun", program=program)),
        plan("torchrun", "--max-restarts", "2", program=program),
    )
    assert '"--resume"' not in usual
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in usual
    assert '"--resume"' in texts(restarted)
    assert restarted.environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert restarted.environment["ARSG_EXPECTED_HOSTS"] == "2"
    elastic = plan("torchrun", "--min-hosts", "1", "--max-hosts", "3", program=program)
    assert "ARSG_EXPECTED_HOSTS" not in elastic.environment
    made = json.loads(texts(elastic))
    assert made["least"] == 1
    assert ["is_host=1" in str(command) for command in made["hosts"].values()] == [True, False]
    assert all("--nnodes=1:3" in command for command in made["hosts"].values())
    join = ["--join", "--master-addr", "first", "--min-hosts", "1", "--max-hosts", "3"]
    joined = json.loads(texts(plan("torchrun", *join, program=program)))
    assert "is_host=1" not in str(joined)
    assert all("--rdzv-endpoint=first:29500" in command for command in joined["hosts"].values())


def test_one_machine_needs_no_deepspeed_for_an_engine_that_needs_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a start of torch's own engines by a launcher that is not installed."""
    monkeypatch.setattr(local, "find_spec", lambda name: None)
    for engine in ("ddp", "fsdp"):
        command = plan("local", engine=engine).command
        assert command[3:6] == ("torch.distributed.run", "--nproc-per-node", "4")
        assert command[-3:] == ("train.py", "--lr", "0.1")
    for engine in ("deepspeed", "horovod"):
        assert "torch.distributed.run" not in plan("local", engine=engine).command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-hosts", "3"], "--min-hosts 3"),
        (["--max-hosts", "1"], "--max-hosts 1"),
        (["--min-hosts", "0"], "--min-hosts 0"),
        (["--max-restarts", "-1"], "at least 0"),
        (["--join"], "--join needs"),
    ],
)
def test_numbers_of_hosts_that_contradict_are_refused(options: list[str], message: str) -> None:
    """Catches a job that waits for hosts that nobody will start."""
    with pytest.raises(ValueError, match=message):
        plan("torchrun", *options)
