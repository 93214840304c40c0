"""Several hosts inside this machine: network namespaces with their own sshd, processes, shared memory and host name."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support.launchers import REPOSITORY, Finished

NETWORK = "10.77.0"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Each host's own, and empty at each start: Open MPI's daemons keep files under names that only have their pid, which
# repeat from host to host and after a restart, and end with 213 where they find those of another.
_TEMPORARY = "/run"
_TOOLS = ("ip", "tc", "nsenter", "unshare", "sshd", "ssh", "ssh-keygen")


def why_not() -> str | None:
    """The reason why there can be no rehearsal hosts here, or None."""
    if os.geteuid() != 0:
        return "rehearsal hosts need root"
    if missing := [tool for tool in _TOOLS if shutil.which(tool, path=SYSTEM_PATH) is None]:
        return f"{', '.join(missing)} not installed (tests/install_system_packages.sh)"
    probe = subprocess.run(
        ["unshare", "-m", "-u", "-i", "-p", "-n", "-f", "true"], capture_output=True, text=True
    )
    return f"no namespaces: {probe.stderr.strip()}" if probe.returncode else None


class Cluster:
    """Hosts node1 … nodeN on one network, with the same files except /var/local, /run and /dev/shm.

    Args:
        directory: for keys, logs and each host's own disk.
        hosts: how many.
        path: PATH of every login.
    """

    def __init__(self, directory: Path, hosts: int, path: str) -> None:
        self.directory = directory
        self.names = [f"node{number}" for number in range(1, hosts + 1)]
        self._path = f"{path}:{SYSTEM_PATH}"
        self._prefix = f"arsg{os.getpid()}"
        self._init: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Brings all hosts up; takes about a second."""
        ssh = self.directory / "ssh"
        ssh.mkdir(parents=True)
        ssh.chmod(0o700)
        for key in (ssh / "id_ed25519", self.directory / "host_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
        (ssh / "config").write_text(
            "Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )
        (self.directory / "empty").touch()
        (self.directory / "sshd_config").write_text(
            f"Port 22\nHostKey {self.directory}/host_key\nPermitRootLogin prohibit-password\nUsePAM no\nUseDNS no\n"
            "StrictModes no\nPidFile none\nMaxStartups 100:30:200\n"
            f"SetEnv PATH={self._path} OMP_NUM_THREADS=1 TMPDIR={_TEMPORARY}\n"
        )
        _run("ip", "netns", "add", f"{self._prefix}sw")
        _run("ip", "-n", f"{self._prefix}sw", "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", f"{self._prefix}sw", "link", "set", "br0", "up")
        for number, name in enumerate(self.names, start=1):
            own, space = self.directory / name, self._space(name)
            (own / "disk").mkdir(parents=True)
            (own / "hostname").write_text(f"{name}\n")
            self.write_hosts_file(name)
            _run("ip", "netns", "add", space)
            port = ["link", "add", f"p{number}", "type", "veth", "peer", "name", "eth0", "netns", space]
            _run("ip", "-n", f"{self._prefix}sw", *port)
            _run("ip", "-n", f"{self._prefix}sw", "link", "set", f"p{number}", "master", "br0", "up")
            _run("ip", "-n", space, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "eth0", "up")
            self.boot(name, wait=False)
        for name in self.names:
            self._wait_until_ready(name)

    def stop(self) -> None:
        """Ends every process of the hosts and removes the network."""
        for name in list(self._init):
            self.kill(name)
        for space in [*map(self._space, self.names), f"{self._prefix}sw"]:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def boot(self, name: str, *, wait: bool = True) -> None:
        """Starts a host, the first time or after `kill`."""
        ready = self.directory / name / "ready"
        ready.unlink(missing_ok=True)
        namespaces = [
            "unshare",
            "-m",
            "-u",
            "-i",
            "-p",
            "-f",
            "--mount-proc",
            "--kill-child",
            "--propagation",
            "private",
        ]
        self._init[name] = subprocess.Popen(
            ["ip", "netns", "exec", self._space(name), *namespaces,
             str(Path(__file__).with_name("host_init.sh")), name, str(self.directory)],
            stdin=subprocess.DEVNULL,
            stdout=(self.directory / name / "init.log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        if wait:
            self._wait_until_ready(name)

    def kill(self, name: str) -> None:
        """The host loses power: all its processes are gone at once; the network says so to the others."""
        init = self._init.pop(name)
        init.kill()
        init.wait()

    def is_up(self, name: str) -> bool:
        """Whether the host has power."""
        return name in self._init

    def cut(self, name: str) -> None:
        """The host's cable is pulled: silence, no error."""
        self._port(name, "down")

    def join(self, name: str) -> None:
        """Ends `cut`."""
        self._port(name, "up")

    def limit(self, megabits: int) -> None:
        """Lets every cable carry at most this many Mbit/s in each direction (a token bucket at either end); 0: any."""
        # A bucket below a segment of the sender's (64 kB) or below what is due between two wake-ups loses throughput.
        burst = 64 if megabits < 500 else 256
        for number, name in enumerate(self.names, start=1):
            for space, device in ((self._space(name), "eth0"), (f"{self._prefix}sw", f"p{number}")):
                tc = ["tc", "-n", space, "qdisc"]
                subprocess.run(
                    [*tc, "del", "dev", device, "root"], capture_output=True, env={"PATH": SYSTEM_PATH}
                )
                if megabits:
                    rate = ["rate", f"{megabits}mbit", "burst", f"{burst}kb", "latency", "50ms"]
                    _run(*tc, "add", "dev", device, "root", "tbf", *rate)

    def write_hosts_file(self, name: str, extra: str = "") -> None:
        """Writes a host's /etc/hosts, with lines of `extra` before the ordinary ones."""
        lines = "".join(f"{NETWORK}.{number} {other}\n" for number, other in enumerate(self.names, start=1))
        (self.directory / name / "hosts").write_text(f"127.0.0.1 localhost\n{extra}{lines}")

    def ip(self, name: str, *arguments: str) -> None:
        """Runs `ip` in a host's network."""
        _run("ip", "-n", self._space(name), *arguments)

    def start_on(
        self, name: str, command: Sequence[str], environment: dict[str, str] | None = None
    ) -> "Running":
        """Starts a command on a host, in the repository."""
        variables = {
            "PATH": self._path,
            "HOME": os.environ.get("HOME", "/root"),
            "USER": "root",
            "LANG": "C.UTF-8",
            "TMPDIR": _TEMPORARY,
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "OMPI_MCA_mpi_yield_when_idle": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        } | (environment or {})
        return Running(["nsenter", *self._namespaces(name), f"--wd={REPOSITORY}", "--", *command], variables)

    def run_on(
        self,
        name: str,
        command: Sequence[str],
        *,
        timeout: float = 240,
        environment: dict[str, str] | None = None,
    ) -> Finished:
        """Runs a command on a host and waits for its end."""
        return self.start_on(name, command, environment).wait(timeout)

    def _namespaces(self, name: str) -> list[str]:
        return ["-t", str(self._process_1(name)), "-m", "-u", "-i", "-n", "-p"]

    def _process_1(self, name: str) -> int:
        """The pid, seen from here, of the host's first process: the child of unshare."""
        parent = self._init[name].pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return int(children[0])

    def _wait_until_ready(self, name: str) -> None:
        for _ in range(600):
            if (self.directory / name / "ready").exists():
                return
            time.sleep(0.05)
        log = (self.directory / name / "init.log").read_text() + (
            self.directory / name / "sshd.log"
        ).read_text()
        raise AssertionError(f"{name} did not come up:\n{log}")

    def _space(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def _port(self, name: str, state: str) -> None:
        _run("ip", "-n", f"{self._prefix}sw", "link", "set", f"p{name.removeprefix('node')}", state)


class Running:
    """A command that was started on a rehearsal host."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._command = command
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",  # bars of two ranks, one in the middle of the other's character
            start_new_session=True,
        )

    def wait(self, timeout: float) -> Finished:
        """Waits for the end; one that does not come is a failure."""
        try:
            output, _ = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            output, _ = self._process.communicate()
            raise AssertionError(
                f"{' '.join(self._command[-6:])} was still running after {timeout} s:\n{output[-5000:]}"
            ) from None
        return Finished(self._process.returncode, output)

    def ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def stop(self) -> str:
        """Ends the command and returns what it printed."""
        self.kill()
        return self._process.communicate()[0]

    def kill(self) -> None:
        """Ends the command, if it has not ended, but not what it started on other hosts."""
        if not self.ended():
            os.killpg(self._process.pid, signal.SIGKILL)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": SYSTEM_PATH})
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
