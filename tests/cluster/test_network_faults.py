"""Hosts set up as many are: a docker0 with the same address everywhere, and the own name at 127.0.1.1."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.rehearsal import NETWORK, Cluster
from tests.cluster.starts import start
from tests.cluster.test_launchers import assert_weights_of_one_process, program
from tests.support.launchers import REPOSITORY

pytestmark = [pytest.mark.cluster, pytest.mark.ranks]

HOSTS = ["--hosts", "node2:1,node3:1"]


@pytest.fixture
def ill_configured(cluster: Cluster) -> Iterator[Cluster]:
    """node2 and node3 as Debian with Docker leaves them."""
    names = ("node2", "node3")
    for name in names:
        cluster.ip(name, "link", "add", "docker0", "type", "bridge")
        cluster.ip(name, "addr", "add", "172.17.0.1/16", "dev", "docker0")
        cluster.ip(name, "link", "set", "docker0", "up")
        cluster.write_hosts_file(name, f"127.0.1.1 {name}\n")
    yield cluster
    for name in names:
        cluster.ip(name, "link", "del", "docker0")
        cluster.write_hosts_file(name)


@pytest.mark.turn(2)
def test_mpi_works_once_told_the_network(ill_configured: Cluster, tmp_path: Path) -> None:
    """Catches a remedy in docs/clusters.md that does not help: MPI talks to itself over docker0 and hangs."""
    command, output = program("horovod", tmp_path)
    remedy = ["--env", f"OMPI_MCA_btl_tcp_if_include={NETWORK}.0/24"]
    job = start(
        ill_configured, "mpirun", "--engine", "horovod", *HOSTS, *remedy,
        program=command, directory=tmp_path, on="node2",
    ).wait(240)  # fmt: skip
    assert job.code == 0, job.output[-5000:]
    assert_weights_of_one_process(output, job.output)


@pytest.mark.turn(2)
def test_gloo_works_once_told_the_interface(ill_configured: Cluster, tmp_path: Path) -> None:
    """Catches a remedy in docs/clusters.md that does not help: gloo tells the others that it is at 127.0.1.1."""
    command, output = program("deepspeed", tmp_path)
    remedy = ["--env", "GLOO_SOCKET_IFNAME=eth0", "--master-addr", f"{NETWORK}.2"]
    job = start(
        ill_configured, "deepspeed-pdsh", *HOSTS, *remedy, program=command, directory=tmp_path, on="node2"
    ).wait(240)
    assert job.code == 0, job.output[-5000:]
    assert_weights_of_one_process(output, job.output)


@pytest.mark.turn(2)
def test_the_doctor_names_both(ill_configured: Cluster, tmp_path: Path) -> None:
    """Catches a diagnosis that cannot be made on the hosts that need it, or that does not see what is wrong there."""
    doctor = [str(REPOSITORY / "arsg_dist/cli/main.py"), "doctor", "--max-mib", "1"]
    remedy = ["--env", f"OMPI_MCA_btl_tcp_if_include={NETWORK}.0/24"]
    job = start(
        ill_configured, "mpirun", "--engine", "horovod", *HOSTS, *remedy,
        program=doctor, directory=tmp_path, on="node2",
    ).wait(240)  # fmt: skip
    said = " ".join(job.output.split())
    assert job.code == 1, job.output[-5000:]
    assert "docker0 has the same address 172.17.0.1 on node2, node3" in said, job.output[-5000:]
    assert "node2, node3: the own name resolves to 127.0.1.1" in said, job.output[-5000:]
