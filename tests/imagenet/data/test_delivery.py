"""Loader processes that die, fall silent or have no room: the rank ends with the reason instead of waiting for ever."""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arsg_dist.imagenet.config import DataConfig, ProgressiveConfig
from arsg_dist.imagenet.data import delivery
from arsg_dist.imagenet.data.dataset import Batch, process_loader
from arsg_dist.imagenet.data.delivery import LoadingError, Shared, StuckCall, require_shared_memory
from arsg_dist.imagenet.data.sampler import SampleKey
from tests.support.launchers import REPOSITORY
from tests.support.warm_ranks import each_without_core


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    """Pytest would wait for them at its end: they do not hear SIGTERM."""
    yield
    for process in multiprocessing.active_children():
        process.kill()


class Odd:
    """Numbers, and what happens to the loader process that is asked for number 5."""

    def __init__(self, fate: str) -> None:
        self.fate = fate

    def __getitem__(self, key: SampleKey) -> int:
        if key.image == 5 and self.fate == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if key.image == 5 and self.fate == "silent":
            time.sleep(3600)
        if key.image == 5 and self.fate == "no room":
            return -1
        return key.image


class Full(Batch):
    """As torch fails where /dev/shm is full."""

    def share_memory_(self) -> Batch:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
        )


def collate(numbers: list[int]) -> Batch:
    kind = Full if -1 in numbers else Batch
    return kind(torch.tensor(numbers), torch.tensor(numbers), [])


def passes(fate: str, images: list[int], *, timeout: float = 0) -> Any:
    order: Any = [[SampleKey(0, image)] for image in images]
    return process_loader(
        Odd(fate), order, workers=2, collate=Shared(collate), pin_memory=False, timeout=timeout
    )


@pytest.mark.parametrize(
    ("fate", "message"),
    [
        (
            "killed",
            r"loader process \d+ has ended: killed by SIGKILL, which the kernel sends where memory runs out",
        ),
        ("silent", r"no batch came from the loader processes in 0\.5 s \(data\.timeout\)"),
        ("no room", r"no batch can be put into /dev/shm \([\d,.]+ of [\d,.]+ MiB are free\): .*--shm-size"),
    ],
)
def test_a_pass_ends_with_the_reason(fate: str, message: str) -> None:
    """Catches a rank that waits for ever: for a process that hangs in a read, or for a batch that torch gave up to send
    in a thread of its own; and a death without its signal."""
    loader = passes(fate, [1, 2, 3, 4, 5, 6], timeout=0.5 if fate == "silent" else 60)
    seen = []
    iterator = iter(loader)
    with pytest.raises(LoadingError, match=message):
        seen.extend(int(batch.images) for batch in iterator)
    assert seen == [1, 2, 3, 4][: len(seen)]
    if fate == "silent":  # what hangs does not end with its rank
        for process in iterator._processes():
            process.join(30)
            assert process.exitcode == -signal.SIGKILL


@pytest.mark.timeout(120)  # in place of ten minutes, where it waits for ever
def test_a_pass_ends_where_a_process_stops_between_announcing_a_batch_and_handing_it_over() -> None:
    """Catches a rank that waits for ever for the file of a batch, which torch fetches from the process that made it."""
    iterator = iter(passes("none", [1, 2, 3, 4], timeout=0.5))
    assert iterator._worker_result_queue._reader.poll(60)  # type: ignore[attr-defined]
    for process in iterator._processes():  # type: ignore[attr-defined]
        os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(
        LoadingError, match=r"no batch came from the loader processes in 0\.5 s \(data\.timeout\)"
    ):
        list(iterator)


def test_each_call_has_the_whole_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches processes that are slow but deliver in time and are ended, and ones that hang and are not."""

    class Owner:
        pass

    owner, ended, looked = Owner(), list[Any](), 0
    stuck = StuckCall(owner, ended.append, 1.0, 0)
    begin, end = stuck.__enter__, lambda: stuck.__exit__()
    nothing = lambda: None  # noqa: E731
    # What happens before each look: two calls of two seconds with a pause, then one that hangs.
    steps = [
        begin,
        nothing,
        nothing,
        end,
        begin,
        nothing,
        nothing,
        end,
        nothing,
        begin,
        nothing,
        nothing,
        nothing,
    ]

    def wait(interval: float) -> None:
        nonlocal looked
        assert ended == []
        steps[looked]()
        looked += 1

    monkeypatch.setattr(delivery, "_PAUSE", SimpleNamespace(wait=wait))
    stuck._watch(weakref.ref(owner), ended.append, 1.0, 3.0)
    assert looked == len(steps)
    assert ended == [owner]
    assert stuck.ended


def test_a_process_that_died_between_two_passes_is_noticed() -> None:
    """Catches a validation that waits for processes which were killed while the rank trained."""
    loader = passes("none", [1, 2, 3])
    iterator = iter(loader)
    assert [int(batch.images) for batch in iterator] == [1, 2, 3]
    os.kill(iterator._processes()[1].pid, signal.SIGKILL)  # type: ignore[attr-defined]
    with pytest.raises(LoadingError, match="killed by SIGKILL"):
        list(loader)


def test_batches_of_loader_processes_are_in_shared_memory() -> None:
    """Catches batches that are put there by torch later, where nobody hears of an error; and one lost on the way."""
    batches = list(passes("none", [3, 1, 2]))
    assert [(int(batch.images), int(batch.labels)) for batch in batches] == [(3, 3), (1, 1), (2, 2)]
    here = process_loader(
        Odd("none"), [[SampleKey(0, 7)]], workers=0, collate=Shared(collate), pin_memory=False
    )  # type: ignore[arg-type]
    (batch,) = here
    assert not batch.images.is_shared()


def test_a_rank_that_ends_leaves_no_semaphore() -> None:
    """Catches a warning of leaked semaphores at the end of every run with loader processes."""
    program = """
from arsg_dist.engine import end_process
from arsg_dist.imagenet.data.dataset import processes_ended
from tests.imagenet.data.test_delivery import passes

if __name__ == "__main__":
    loader = passes("none", [1, 2])
    with processes_ended(loader):
        print(len(list(loader)), flush=True)
    end_process(0)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=100
    )  # which is when the process that removes what was left has ended, too: it holds the other end of stderr
    assert (ended.returncode, ended.stdout) == (0, "2\n"), ended.stderr
    assert "leaked" not in ended.stderr


def test_processes_that_cannot_be_started_name_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches "[Errno 28] No space left on device" where every disk has room: semaphores are in shared memory."""

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(delivery._MultiProcessingDataLoaderIter, "__init__", full)
    monkeypatch.setattr(delivery._MultiProcessingDataLoaderIter, "__del__", lambda _: None)
    with pytest.raises(LoadingError, match=r"cannot be started: no batch can be put into /dev/shm"):
        iter(passes("none", [1]))


# 2 processes × (4 images of 8 × 8 and 3 of 6 × 6, each of 3 bytes a pixel) × 2 batches under way
NEEDED = 2 * 2 * (4 * 3 * 64 + 3 * 3 * 36)


@pytest.mark.parametrize(
    ("settings", "ranks", "pinned", "needed"),
    [
        ({}, 1, False, NEEDED),
        ({}, 3, False, 3 * NEEDED),
        ({}, 1, True, 2 * 4 * 3 * 64),
        ({"workers": 5}, 1, False, NEEDED // 2 * 5),
        ({"progressive": ProgressiveConfig(start_size=2, end_epoch=1)}, 1, False, NEEDED),
        ({"workers": 0}, 1, False, 0),
        ({"loader": "dali"}, 1, False, 0),
    ],
)
def test_shared_memory_is_refused_that_the_batches_do_not_fit_into(
    settings: dict[str, Any], ranks: int, pinned: bool, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a count of one rank, one process or one of the two loaders, and a refusal of what fits or sends none."""
    config = DataConfig(**{"image_size": 6, "train_image_size": 8, "workers": 2, **settings})
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    def require() -> None:
        require_shared_memory(config, batch_size=4, val_batch_size=3, ranks_here=ranks, pinned=pinned)

    if needed:
        free = needed - 1
        with pytest.raises(ValueError, match=r"/dev/shm has .* MiB free.*--shm-size.*data\.workers"):
            require()
    free = needed
    require()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.turn(turn))
        for turn, case in enumerate(("checked at the start", "found on the way", "full already"))
    ],
)
def test_a_small_dev_shm_ends_a_run(case: str, tmp_path: Path) -> None:
    """Catches the hang of a container with too little shared memory, or one of minutes, on the real one."""
    mounted = ["unshare", "-m", "bash", "-c", 'mount -t tmpfs -o size=4m tmpfs /dev/shm && "$@"', "-"]
    if subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("mounting a file system of one's own is not allowed here")
    program = "from tests.imagenet.data.test_delivery import run; run()"
    settings = {
        **{
            "data.source": "synthetic",
            "data.synthetic_images": 32,
            "data.image_size": 224,
            "data.workers": 2,
        },
        **{"model": "resnet20", "batch_size": 32, "optimizer.params.lr": 0.01, "output": tmp_path / "run"},
    }
    flags = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    with (tmp_path / "stdout").open("w") as out, (tmp_path / "stderr").open("w") as err:
        job = subprocess.Popen(
            [*mounted, sys.executable, "-c", program, case, *flags],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    started, waited = time.monotonic(), dict[int, float]()
    try:
        while job.poll() is None:
            waited |= each_without_core([job.pid])
            assert time.monotonic() - started - sum(waited.values()) < 120
            time.sleep(0.05)
    finally:
        ended = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    said = (tmp_path / "stderr").read_text()
    (error,) = re.findall("error: .*", said)
    assert "/dev/shm" in error
    assert "--shm-size" in error
    assert job.returncode == (2 if case == "checked at the start" else 1)
    assert "Traceback" not in said
    (began,) = re.findall(r"begins at ([\d.]+)", (tmp_path / "stdout").read_text())
    seconds, without_core = ended - float(began), sum(waited.values())  # of the rank and what it waits for
    print(f"{case}: {seconds:.1f} s, {without_core:.1f} s of them without a core")
    assert seconds - without_core < 10  # promised, with the start of loader processes and all


def run() -> None:
    """Train as the arguments say, in a /dev/shm that is small."""
    from arsg_dist.engine import end_process
    from arsg_dist.imagenet.cli import train_command
    from arsg_dist.imagenet.training import setup

    case, *arguments = sys.argv[1:]
    if case != "checked at the start":
        setup.require_shared_memory = lambda *_, **__: None
    if case == "full already":
        with pytest.raises(OSError), Path("/dev/shm/full").open("wb") as file:
            file.write(bytes(5 << 20))
    print(f"begins at {time.monotonic()}", flush=True)
    end_process(train_command(arguments))
