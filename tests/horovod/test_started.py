"""A pending collective in this process, Horovod's answers given."""

import threading
import time

import horovod.torch as hvd
import pytest
import torch

from arsg_dist.horovod.comm.collectives import Started


def test_the_second_thread_waits_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a thread that reads before the exchange has ended: Horovod answers None at once to all but the first who
    wait, and its result would be taken twice."""
    asked: list[int] = []
    arrived = threading.Event()

    def synchronize(handle: int) -> torch.Tensor | None:
        asked.append(handle)
        if len(asked) > 1:
            return None
        arrived.wait(120)
        return torch.ones(1)

    monkeypatch.setattr(hvd, "synchronize", synchronize)
    taken: list[torch.Tensor] = []

    def result(output: torch.Tensor) -> torch.Tensor:
        taken.append(output)
        return output + 1

    started, found = Started(-1, result), []
    threads = [threading.Thread(target=lambda: found.append(started.finish())) for _ in range(2)]
    for thread in threads:
        thread.start()
    while not asked:
        time.sleep(0.001)
    assert not found
    arrived.set()
    for thread in threads:
        thread.join(120)
    assert started.done()
    assert [tensor.item() for tensor in found] == [2.0, 2.0]
    assert len(taken) == len(asked) == 1
