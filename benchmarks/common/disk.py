"""The disk that a benchmark writes to: which it is, how fast, and slower ones made on purpose."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

CONDITIONS = ("idle", "busy", "throttled", "dirty")
_CGROUP = Path("/sys/fs/cgroup/blkio")
_FILLER = "dd if=/dev/zero of=filler bs=1M count=200 conv=notrunc"


def disk_of(directory: Path) -> str:
    """Name the file system and device that a directory is on."""
    device = os.stat(directory).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == number:
            kind, source = after.split()[:2]
            return f"{kind} on {source}"
    return f"device {number}"


def disk_speed(directory: Path, megabytes: int = 200) -> float:
    """Measure MB/s of one file, written in order and synced."""
    block = os.urandom(4_000_000)
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        begin = time.perf_counter()
        for _ in range(megabytes // 4):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return megabytes / (time.perf_counter() - begin)


@contextmanager
def condition(name: str, directory: Path, rate: int) -> Iterator[tuple[Path, list[str], str]]:
    """Make what a save is to be measured under.

    Args:
        name: "idle" changes nothing; "busy" keeps every core at work; "throttled" has a disk of `rate` MB/s; "dirty"
            has that disk with its share of unwritten pages used up, and a process that goes on writing to it.
        directory: existing, to write to; not used by the last two, whose disk is a loop device in main memory.
        rate: MB/s of the slow disk.

    Yields:
        A directory to write to, what to put before a command that is to run so, and what was done, in words.

    Raises:
        SystemExit: the slow disk needs root, a loop device and cgroup v1's blkio.
    """
    with ExitStack() as stack:
        if name == "idle":
            yield directory, [], "nothing added"
        elif name == "busy":
            cores = os.cpu_count() or 1
            for _ in range(cores):
                stack.enter_context(_running([sys.executable, "-c", "while True: pass"], directory))
            yield directory, [], f"{cores} processes that compute without a pause"
        else:
            disk, prefix, number = stack.enter_context(_slow_disk(rate))
            said = f"a loop device in main memory, throttled to {rate} MB/s by cgroup v1's blkio"
            if name == "dirty":
                limits = Path("/sys/class/bdi") / number
                (limits / "max_ratio").write_text("1")
                (limits / "strict_limit").write_text("1")
                stack.enter_context(_running([*prefix, "sh", "-c", f"while {_FILLER}; do :; done"], disk))
                said += "; its dirty pages limited to 1 %, and a process that writes to it without a pause"
            yield disk, prefix, said


@contextmanager
def _running(command: list[str], directory: Path) -> Iterator[None]:
    process = subprocess.Popen(command, cwd=directory, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def _when_free(remove: Callable[[], object]) -> None:
    """Remove what processes that have been told to end still hold for a moment."""
    for _ in range(100):
        with suppress(OSError, subprocess.CalledProcessError):
            remove()
            return
        time.sleep(0.1)
    remove()


@contextmanager
def _slow_disk(rate: int) -> Iterator[tuple[Path, list[str], str]]:
    """Mount a disk of its own; yield its place, what to put before a command, and its number."""
    if os.geteuid() != 0 or not (_CGROUP / "blkio.throttle.write_bps_device").exists():
        sys.exit("a throttled disk needs root and cgroup v1's blkio: choose --condition idle or busy")
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with tempfile.NamedTemporaryFile(dir="/dev/shm", delete=False) as image:
            image.truncate(4 << 30)
        stack.callback(os.unlink, image.name)
        subprocess.run(["mkfs.ext4", "-q", "-F", image.name], check=True)
        subprocess.run(["mount", "-o", "loop,discard", image.name, str(place)], check=True)
        stack.callback(_when_free, lambda: subprocess.run(["umount", str(place)], check=True))
        device = os.stat(place).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        group = Path(tempfile.mkdtemp(prefix="benchmark-", dir=_CGROUP))
        stack.callback(_when_free, group.rmdir)
        (group / "blkio.throttle.write_bps_device").write_text(f"{number} {rate * 1_000_000}")
        yield place, ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"], number
