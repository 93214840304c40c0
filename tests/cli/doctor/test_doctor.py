"""`arsg-dist doctor`: what it sees in facts, that its self-test can fail, and that it runs under the real launchers."""

import copy
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arsg_dist.cli.doctor import facts
from arsg_dist.cli.doctor.collectives import Collectives, self_test
from arsg_dist.cli.doctor.findings import find
from arsg_dist.engine import Ranks
from tests.support.launchers import launch

OPERATIONS = ("allreduce", "allgather", "alltoall", "broadcast", "reducescatter")


def healthy() -> list[dict[str, Any]]:
    """Two ranks on two hosts."""
    one = facts.gather(Ranks(0, 2, 0, "mpirun"), torch.device("cpu"))
    one |= {
        "host": "node0", "own_address": "10.0.0.1", "interfaces": {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"]},
        "launcher": "mpirun", "cpus": [0, 1], "cores": 2, "cpu_count": 2, "shm_free_mib": 1000,
        "cpu_kernel": "compiled",
    }  # fmt: skip
    other = copy.deepcopy(one)
    other |= {"rank": 1, "host": "node1", "own_address": "10.0.0.2"}
    other["interfaces"]["eth0"] = ["10.0.0.2"]
    return [one, other]


def test_a_healthy_job_is_called_so() -> None:
    """Catches a doctor that always finds something."""
    assert {finding.level for finding in find(healthy())} == {"good"}


@pytest.mark.parametrize(
    ("changed", "level", "text"),
    [
        ({"versions": {"torch": "2.12.0"}}, "wrong", "torch differs: .* on rank 0; 2.12.0 on rank 1"),
        ({"mpi": "MPICH 4"}, "wrong", "MPI of mpi4py differs"),
        ({"horovod_backends": "Gloo"}, "wrong", "Horovod's backends differs"),
        (
            {"cpus": [1], "cores": 1},
            "warning",
            "rank 1 and all its threads are pinned to one core: .*--bind-to none",
        ),
        # mpirun --bind-to core with hyper-threading.
        ({"cpus": [1, 3], "cores": 1, "cpu_count": 4}, "warning", "rank 1 and all its threads are pinned"),
        ({"shm_free_mib": 64}, "warning", "node1 has 64 MiB free in /dev/shm and under DeepSpeed"),
        (
            {"shm_free_mib": 64, "launcher": "deepspeed or torchrun"},
            "wrong",
            "node1 has 64 MiB free in /dev/shm",
        ),
        (
            {"interfaces": {"docker0": ["172.17.0.1"]}},
            "warning",
            "docker0 has the same address 172.17.0.1 on node0, node1",
        ),
        ({"own_address": "127.0.1.1"}, "wrong", "node1: the own name resolves to 127.0.1.1"),
    ],
)
def test_what_is_wrong_on_one_rank_is_named(changed: dict[str, Any], level: str, text: str) -> None:
    """Catches a fault of another rank than 0 that goes unseen, or a warning that fails the job's check."""
    ranks = healthy()
    if "interfaces" in changed:
        ranks[0]["interfaces"] |= changed["interfaces"]
    for name, value in changed.items():
        ranks[1][name] = ranks[1][name] | value if isinstance(value, dict) else value
    findings = [finding for finding in find(ranks) if finding.level != "good"]
    assert [finding.level for finding in findings] == [level]
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(findings[0].text)


def one_rank(wrong: str) -> Collectives:
    """What one rank's collectives return, with one number of one operation wrong."""

    def returned(name: str, tensor: Tensor) -> Tensor:
        if name == wrong and tensor.numel() > 1:
            tensor[-1] += 1
        return tensor

    return Collectives("", {name: partial(returned, name) for name in OPERATIONS})


@pytest.mark.parametrize("wrong", [*OPERATIONS, ""])
def test_one_wrong_number_is_seen(wrong: str) -> None:
    """Catches a self-test that compares nothing."""
    errors = self_test(one_rank(wrong), torch.device("cpu"), 0, 1, 0.01)
    assert bool(errors) == bool(wrong)
    assert all(error.startswith(f"{wrong} of ") and "1 wrong numbers" in error for error in errors)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("launcher", "ranks", "tested"),
    [
        ("alone", 1, ""),
        pytest.param(
            "mpirun",
            3,
            "Horovod over MPI: allreduce, allgather, alltoall, broadcast, reducescatter",
            marks=pytest.mark.turn(1),
        ),
        pytest.param(
            "horovodrun",
            2,
            "Horovod over Gloo: allreduce, allgather, alltoall, broadcast tested",
            marks=pytest.mark.turn(0),
        ),
        pytest.param("deepspeed", 2, "torch.distributed over gloo", marks=pytest.mark.turn(2)),
    ],
)
def test_under_a_real_launcher(launcher: str, ranks: int, tested: str) -> None:
    """Catches a doctor that looks at one rank only, prints on all, or cannot connect them."""
    job = launch(launcher, ranks, "arsg_dist/cli/main.py", "doctor", "--json", "--max-mib", "1", timeout=150)
    assert job.code == 0, job.output[-3000:]
    text = "\n".join(line.partition("<stdout>:")[2] or line for line in job.output.splitlines())
    report = json.loads(text[text.index('{\n  "ranks"') : text.rindex("}\n  ]\n}") + 7])
    assert [rank["rank"] for rank in report["ranks"]] == list(range(ranks))
    assert all(rank["versions"]["torch"] == torch.__version__ for rank in report["ranks"])
    assert all(rank["interfaces"] for rank in report["ranks"])
    assert any(tested in finding["text"] for finding in report["findings"])
    assert text.count('"findings"') == 1


def test_two_hyper_threads_are_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a count of logical CPUs that is called cores."""
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(siblings)
    monkeypatch.setattr(facts, "CPUS", tmp_path)
    assert facts.physical_cores([0, 2]) == 1
    assert facts.physical_cores([0, 1, 2]) == 2
    assert facts.physical_cores([0, 7]) == 2


@pytest.mark.turn(2)
@pytest.mark.ranks
def test_the_report_for_people_has_everything_it_promises() -> None:
    """Catches a line that is missing, empty or without its label, and a second rank that is not reported."""
    job = launch("horovodrun", 2, "arsg_dist/cli/main.py", "doctor", "--max-mib", "1", timeout=150)
    assert job.code == 0, job.output[-3000:]
    for line in (
        r"ranks +2 on 1 host\(s\), started by horovodrun",
        *(rf"{name} +\S+" for name in ("python", "arsg_dist", "torch", "deepspeed", "horovod", "mpi4py")),
        *(rf"{label} +\S+" for label in facts.LABELS.values()),
        r"Horovod's backends +MPI Gloo",
        r"host \S+ +.*lo 127\.0\.0\.1.*; /dev/shm \d+ MiB free",
        *(rf"rank {rank} may use +\d+ of \d+ logical CPUs, on \d+ core\(s\)" for rank in (0, 1)),
        "good +every rank has the same versions",
        "good +Horovod over Gloo: allreduce, .*tested with known answers",
    ):
        assert re.search(rf"^(\[\d+\]<stdout>:)?{line}", job.output, re.MULTILINE), (line, job.output)
