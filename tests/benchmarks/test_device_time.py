"""How the time of a step on a GPU is taken, with a GPU whose clock the tests turn."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.machine import device_ms


class Gpu:
    """Work that is queued takes its time after what was queued before; a host that asks for work takes time as well."""

    def __init__(self) -> None:
        self.host = self.busy_until = 0.0
        self.pauses: list[int] = []

    def launch(self, host: float, device: float) -> None:
        self.host += host
        self.busy_until = max(self.busy_until, self.host) + device

    def sleep(self, cycles: int) -> None:
        self.pauses.append(cycles)
        self.launch(0.0, cycles / 1.5e6)

    def synchronize(self) -> None:
        self.host = max(self.host, self.busy_until)


def test_the_time_of_a_step_is_not_that_of_asking_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a benchmark of the host: an idle GPU waits for each of many short launches."""
    gpu = Gpu()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = max(gpu.busy_until, gpu.host)

        def query(self) -> bool:
            return gpu.host >= self.at

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)

    def step() -> None:
        for _ in range(100):
            gpu.launch(0.02, 0.001)

    assert device_ms(step, "cuda") == pytest.approx(0.1)
    assert gpu.pauses == [1_000_000, 4_000_000], "longer than the host takes"
