"""Who can join a job, and from where."""

import os
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from arsg_dist.cli.launch.targets.script import first_host
from arsg_dist.engine import announce_to_torch, discover_ranks, init_method
from arsg_dist.engine.rendezvous import meet
from tests.support.warm_ranks import free_port

_WAIT = timedelta(seconds=60)


def _environ(rank: int, world_size: int, port: int, address: str = "127.0.0.1") -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def _listening() -> set[tuple[str, int]]:
    connections = psutil.Process(os.getpid()).net_connections("tcp")
    return {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}


def _together(*environs: dict[str, str]) -> list[Any]:
    """The stores of ranks that meet, or what they raised."""

    def one(environ: dict[str, str]) -> Any:
        try:
            return meet(environ, "test", _WAIT)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(len(environs)) as pool:
        return list(pool.map(one, environs))


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_the_store_listens_at_the_address_of_the_job_alone(address: str) -> None:
    """Catches a store that answers on every interface of the machine."""
    port = free_port()
    stores = _together(*(_environ(rank, 2, port, address) for rank in range(2)))
    assert {ip for ip, found in _listening() if found == port} == {"127.0.0.1"}
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"


def test_an_address_under_which_rank_0_cannot_listen_is_left_to_torch() -> None:
    """Catches a job that does not start where ranks know rank 0 by the address of a service or by a name."""
    name, port = socket.gethostname(), free_port()
    stores = _together(*(_environ(rank, 2, port, name) for rank in range(2)))
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"


def test_a_place_is_taken_once() -> None:
    """Catches a stranger, or a rank of another job, who is taken for a rank of this one."""
    port = free_port()
    outcomes = _together(*(_environ(rank, 2, port) for rank in (0, 1, 1)))
    refused = [str(outcome) for outcome in outcomes[1:] if isinstance(outcome, ValueError)]
    assert len(refused) == 1
    assert "another process has taken the place of rank 1 of 2" in refused[0]
    with pytest.raises(ValueError, match=r"rank 2 was started as one of 3 ranks and meets a job of 2"):
        meet(_environ(2, 3, port) | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, "test", _WAIT)


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", socket.gethostname()])
def test_a_port_of_another_program_is_named(address: str) -> None:
    """Catches a long traceback in place of the port and what to do, whoever listens: this package or torch."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = int(other.getsockname()[1])
        with pytest.raises(
            ValueError, match=rf"^port {port} of {address}, .* is taken by another program.*--master_port"
        ):
            meet(_environ(0, 2, port, address), "test", _WAIT)


def test_torchs_own_store_is_used_under_torchrun() -> None:
    """Catches rank 0 of torchrun, whose agent listens already, listening a second time."""
    port = free_port()
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    agents = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    stores = _together(*(_environ(rank, 2, port) | agents for rank in range(2)))
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"
    assert any("rank 0" in key for key in agent.list_keys())


def test_ranks_whose_agents_count_starts_differently_meet() -> None:
    """Catches ranks that wait for each other for ever: where all are started again, those of torchrun's agents whose
    ranks did not fail count nothing."""
    port = free_port()
    environs = [_environ(rank, 2, port) | {"TORCHELASTIC_RESTART_COUNT": str(rank)} for rank in range(2)]
    stores = _together(*environs)
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"
    # An agent's own store stays: what the ranks of the start before wrote there is not that of this one.
    port = free_port()
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for start in ("0", "1"):
        agents = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": start}
        assert not any(
            isinstance(store, ValueError)
            for store in _together(*(_environ(rank, 2, port) | agents for rank in range(2)))
        )
    assert agent.list_keys()


def test_a_job_of_one_rank_listens_on_no_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a single process that strangers can join."""
    environ: dict[str, str] = {}
    announce_to_torch(discover_ranks(environ), environ)
    for name, value in {"GLOO_SOCKET_IFNAME": "", **environ}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")  # set first, so that what the job sets is taken back
    before = _listening()
    dist.init_process_group("gloo", init_method())
    try:
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == 1
        assert {ip for ip, _ in _listening() - before} <= {"127.0.0.1", "::1"}
    finally:
        dist.destroy_process_group()


def test_a_batch_script_meets_at_another_port_each_time() -> None:
    """Catches a port that the job's number, which everybody sees in the queue, tells."""
    script = "; ".join(["set -eu", *first_host("echo node1 | head -n1"), "echo $MASTER_ADDR $MASTER_PORT"])
    printed = [subprocess.check_output(["bash", "-c", script], text=True).split() for _ in range(3)]
    assert {address for address, _ in printed} == {"node1"}
    assert len({port for _, port in printed}) > 1
    assert all(20000 <= int(port) < 30000 for _, port in printed)
