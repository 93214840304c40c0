"""A real Slurm on rehearsal hosts: its controller on node1, a daemon and fake GPUs on every host."""

import shutil
import time

from tests.cluster.rehearsal import SYSTEM_PATH, Cluster

_TOOLS = ("slurmctld", "slurmd", "srun", "sbatch", "munged")
FAKE_GPUS = 2


def why_not() -> str | None:
    """The reason why there can be no Slurm here, or None."""
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=SYSTEM_PATH) is None]
    return f"{', '.join(missing)} not installed (tests/install_system_packages.sh)" if missing else None


def configure(cluster: Cluster) -> None:
    """Writes /etc/slurm of the hosts; to be called before they start."""
    folder = cluster.directory / "slurm"
    (folder / "plugstack.conf.d").mkdir(parents=True)
    last = len(cluster.names)
    settings = {
        "ClusterName": "rehearsal",
        "SlurmctldHost": "node1",
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        "StateSaveLocation": "/var/local/slurmctld",
        "SlurmdSpoolDir": "/var/local/slurmd",
        "SlurmctldPidFile": "/run/slurmctld.pid",
        "SlurmdPidFile": "/run/slurmd.pid",
        "SlurmctldLogFile": "/var/local/slurmctld.log",
        "SlurmdLogFile": "/var/local/slurmd.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SchedulerParameters": "sched_interval=1,bf_interval=1,batch_sched_delay=0,requeue_delay=0",
        "SlurmdParameters": "config_overrides",
        "SlurmctldTimeout": "30",
        "SlurmdTimeout": "20",
        "InactiveLimit": "0",
        "KillWait": "5",
        "ReturnToService": "2",
        "GresTypes": "gpu",
        "NodeName": f"node[1-{last}] CPUs=4 RealMemory=4000 Gres=gpu:{FAKE_GPUS} State=UNKNOWN",
        "PartitionName": "debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    }
    (folder / "slurm.conf").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    # Character devices stand for GPUs: a count without files leaves the node invalid.
    (folder / "gres.conf").write_text(f"Name=gpu File=/var/local/nvidia[0-{FAKE_GPUS - 1}]\n")
    # The hosts share /tmp, where PMIx would put the same path for each.
    (folder / "mpi.conf").write_text("PMIxCliTmpDirBase=/var/local\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")


_START = f"""
install -d -o munge -m 755 /run/munge
cp /etc/munge/munge.key /run/munge.key && chown munge /run/munge.key && chmod 400 /run/munge.key
setsid runuser -u munge -- /usr/sbin/munged --key-file /run/munge.key --log-file /run/munge/munged.log \\
    --pid-file /run/munge/munged.pid --seed-file /run/munge/munged.seed --socket /run/munge/munge.socket.2
mkdir -p /var/local/slurmd /var/local/slurmctld
for gpu in $(seq 0 {FAKE_GPUS - 1}); do [ -c /var/local/nvidia$gpu ] || mknod /var/local/nvidia$gpu c 1 3; done
"""


def start(cluster: Cluster) -> None:
    """Starts the daemons and waits until every node is idle."""
    for name in cluster.names:
        _prepare(cluster, name)
    assert cluster.run_on("node1", ["setsid", "slurmctld", "-c"], timeout=60).code == 0
    for name in cluster.names:
        _start_daemon(cluster, name)
    wait_for_idle(cluster, len(cluster.names))


def restore(cluster: Cluster, *names: str) -> None:
    """Brings Slurm back on hosts that were booted anew."""
    for name in names:
        _prepare(cluster, name)
    if "node1" in names:
        assert cluster.run_on("node1", ["setsid", "slurmctld"], timeout=60).code == 0
    for name in names:
        _start_daemon(cluster, name)
        cluster.run_on("node1", ["scontrol", "update", f"nodename={name}", "state=resume"], timeout=60)
    wait_for_idle(cluster, len(cluster.names))


def _prepare(cluster: Cluster, name: str) -> None:
    done = cluster.run_on(name, ["sh", "-ec", _START], timeout=60)
    assert done.code == 0, done.output


def _start_daemon(cluster: Cluster, name: str) -> None:
    assert cluster.run_on(name, ["setsid", "slurmd"], timeout=60).code == 0


def wait_for_idle(cluster: Cluster, nodes: int, timeout: float = 90) -> None:
    """Waits until so many nodes can take a job."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        idle = cluster.run_on("node1", ["sinfo", "-h", "-t", "idle", "-o", "%D"], timeout=60)
        if idle.output.strip() == str(nodes):
            return
        time.sleep(0.5)
    shown = cluster.run_on("node1", ["sh", "-c", "sinfo -N -l; tail -20 /var/local/slurm*.log"], timeout=60)
    raise AssertionError(f"Slurm's nodes are not idle after {timeout} s:\n{shown.output}")
