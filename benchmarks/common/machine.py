"""What benchmarks say about the machine, how they ask it about memory, and how they start ranks on it."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from arsg_dist.optim.kernels.eight_bit import EightBit
from arsg_dist.optim.state import local


def device_name(device: str) -> str:
    """Return the name of the CPU or GPU, for the head of a report."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        info = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def short_name(device: str) -> str:
    """Return what `device_name` says as the name of a folder: "amd-epyc", "intel-xeon"."""
    name = re.sub(r"\(\w+\)|@.*|\b(CPU|Processor)\b", " ", device.partition(",")[0])
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the size of all state tensors, of a divided one this rank's part."""
    return sum(
        part.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
        for held in (local(value),)
        for part in ((held.codes, held.exponents) if isinstance(held, EightBit) else (held,))
    )


def wall_ms(step: Callable[[], object], device: str) -> float:
    """Return milliseconds that a call takes on the host, with all work on the device."""
    begin = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def device_ms(step: Callable[[], object], device: str) -> float:
    """Return milliseconds of a call's work on the device, without what the host takes to ask for it.

    On a GPU the call is queued behind a pause: an idle GPU would wait for every launch, and its time would be the
    host's. Where the pause was over before all was queued it is made longer, but not for ever: a call of very many
    launches, or one that waits for the device, is timed with what it takes on the host.
    """
    if device != "cuda":
        return wall_ms(step, device)
    cycles = 1_000_000  # half a millisecond or so
    while True:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        start.record()
        step()
        end.record()
        waited = not start.query()
        torch.cuda.synchronize()
        if waited or cycles >= 64_000_000:
            return start.elapsed_time(end)
        cycles *= 4


def mpirun(ranks: int) -> list[str]:
    """Return the command that starts ranks on this machine, without the program."""
    as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return ["mpirun", *as_root, "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]


class PeakMemory:
    """Largest memory of this process (resident set) or on its GPU since `start`, in bytes.

    Raises:
        OSError: by `start`, on a system other than Linux, without a GPU.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def start(self) -> int:
        """Forget earlier peaks and return what is held now."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc keeps would hide what comes next
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
        return _resident("VmRSS")

    def peak(self) -> int:
        """Largest since `start`."""
        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        return _resident("VmHWM")


def _resident(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(entry))
