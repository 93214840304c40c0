"""Faults that strike one rank at a named point of a training."""

import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from arsg_dist.engine import LocalEngine
from arsg_dist.engine.consistency import fingerprints
from arsg_dist.imagenet.training import setup
from arsg_dist.imagenet.training.optimization import Schedules
from arsg_dist.imagenet.training.parts import RunParts
from arsg_dist.optim import ARSG

POINTS = (
    *("forward", "backward", "reduce", "step", "after step", "write", "sync", "rename", "weights"),
    *("validation", "loader", "loader process"),
)


def engine_classes() -> tuple[type, ...]:
    """Those that have a backward pass of their own; DeepSpeed takes long to import."""
    from arsg_dist.deepspeed import DeepSpeedEngine

    return LocalEngine, DeepSpeedEngine


def install(faults: list[dict[str, Any]], record: Path) -> None:
    """Prepares this process to suffer faults.

    Args:
        faults: each with `do`, an action of `ACTIONS`, and for what strikes at a moment `point`, one of `POINTS` or
            "time", and `at`: at which pass of the point, counted from 1 in this start, or after how many seconds.
        record: gets the `time.monotonic()` of the moment the fault strikes.
    """
    for fault in faults:
        strike = _once(ACTIONS[fault["do"]], fault, record)
        if fault["point"] == "time":
            _at_time(strike, fault["at"])
        elif fault["point"] == "write":
            _at_write(strike, Path(fault["directory"]), fault["at"])
        else:
            _at_point(strike, fault["point"], fault["at"])


def _once(
    action: Callable[[dict[str, Any]], None], fault: dict[str, Any], record: Path
) -> Callable[[], None]:
    def strike() -> None:
        if not record.exists():
            # Whole or not at all: the process may end by itself at this moment.
            part = record.with_suffix(f".{os.getpid()}")
            part.write_text(str(time.monotonic()))
            part.replace(record)
        action(fault)

    return strike


def _kill(fault: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fall_silent(fault: dict[str, Any]) -> None:
    """Stand still with all connections open, as a killed process does that waits for its disk; then be gone."""
    kill = f"sleep {fault['seconds']}; kill -KILL {os.getpid()}"
    subprocess.Popen(["sh", "-c", kill], start_new_session=True)  # which inherits no connection
    os.kill(os.getpid(), signal.SIGSTOP)


def _signal_loaders(fault: dict[str, Any]) -> None:
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.Signals[fault["signal"]])  # type: ignore[arg-type]


def _signal(fault: dict[str, Any]) -> None:
    number = signal.Signals[fault["signal"]]
    if fault["to"] == "group":
        os.killpg(0, number)
    else:
        os.kill(os.getpid(), number)


def _pause(fault: dict[str, Any]) -> None:
    """Says that the moment has come, and waits until the file `go` is there."""
    directory = Path(fault["directory"])
    (directory / f"at-{os.getpid()}").touch()
    end = time.monotonic() + 120
    while not (directory / "go").exists() and time.monotonic() < end:
        time.sleep(0.01)


def _raise_memory_error(fault: dict[str, Any]) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def _fill_memory(fault: dict[str, Any]) -> None:
    import resource

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**28, resource.RLIM_INFINITY))
    torch.ones(2**33)


def _sleep(fault: dict[str, Any]) -> None:
    time.sleep(fault["seconds"])


def _vanish(fault: dict[str, Any]) -> None:
    for path in sorted(Path(fault["directory"]).rglob("*.jpg")):
        path.unlink()


def _read_only(fault: dict[str, Any]) -> None:
    real = os.mkdir

    def refused(path: Any, *arguments: Any, **options: Any) -> None:
        if "checkpoints" in str(path):
            raise OSError(30, "Read-only file system", str(path))
        real(path, *arguments, **options)

    os.mkdir = refused  # type: ignore[assignment]


def _corrupt_weight(fault: dict[str, Any]) -> None:
    """Flips a bit of one weight's fraction, as a memory fault does."""
    with torch.no_grad():
        parameter = _trained[0].view(-1)
        parameter.view(torch.int32)[5] ^= 1 << 12


def _skew_clock(fault: dict[str, Any]) -> None:
    real, seconds = time.time, fault["seconds"]
    time.time = lambda: real() + seconds  # type: ignore[assignment]


ACTIONS = {
    "kill": _kill,
    "fall silent": _fall_silent,
    "signal loaders": _signal_loaders,
    "signal": _signal,
    "pause": _pause,
    "raise out of memory": _raise_memory_error,
    "run out of memory": _fill_memory,
    "sleep": _sleep,
    "remove data": _vanish,
    "read-only": _read_only,
    "flip a bit": _corrupt_weight,
    "skew the clock": _skew_clock,
    "nan loss": lambda fault: None,
    "nan gradient": lambda fault: None,
    "wrong sum": lambda fault: None,
}
_trained: list[Tensor] = []


def _at_time(strike: Callable[[], None], seconds: float) -> None:
    """So many seconds after the first pass through the network."""
    real, timer = RunParts.forward, threading.Timer(seconds, strike)

    def forward(self: RunParts, *arguments: Any) -> Tensor:
        # Once: a validation holds on to this function for all its batches.
        if RunParts.forward is forward:
            RunParts.forward = real  # type: ignore[method-assign]
            timer.start()
        return real(self, *arguments)

    RunParts.forward = forward  # type: ignore[method-assign]


def _at_write(strike: Callable[[], None], output: Path, number: int) -> None:
    """While the files of the checkpoint with that number, counted from 1, are written."""

    def watch() -> None:
        seen: set[str] = set()
        pause = random.Random(number).uniform(0, 0.003)
        while True:
            seen |= {path.name for path in output.glob("checkpoints/.step-*.partial")}
            if len(seen) >= number:
                time.sleep(pause)
                strike()
                return
            time.sleep(0.0005)

    threading.Thread(target=watch, daemon=True).start()


def _at_point(strike: Callable[[], None], point: str, number: int) -> None:
    count = 0

    def passed() -> None:
        nonlocal count
        count += 1
        if count == number:
            strike()

    if point == "start":
        strike()
    elif point == "forward":
        _before(RunParts, "forward", passed, lambda self, module, images: module.training)
    elif point == "validation":
        _before(RunParts, "forward", passed, lambda *_: not torch.is_grad_enabled())
    elif point == "loader":
        _before(DataLoader, "__iter__", passed)
    elif point == "loader process":
        _before(ForkServerProcess, "start", passed)
    elif point == "every forward":
        _before(RunParts, "forward", strike, lambda self, module, images: module.training)
    elif point == "backward":
        for kind in engine_classes():
            _before(kind, "backward", passed)
    elif point == "reduce":
        real = setup.build_engine

        def build(builder: Any, module: torch.nn.Module, *arguments: Any) -> Any:
            parameters = list(module.parameters())
            parameters[len(parameters) // 2].register_post_accumulate_grad_hook(lambda _: passed())
            return real(builder, module, *arguments)

        setup.build_engine = build
    elif point == "step":
        _before(ARSG, "step", passed)
    elif point == "after step":
        remember_weights()
        _before(Schedules, "after_update", passed)
    elif point == "sync":
        _before(os, "fsync", passed)
    elif point == "rename":
        _before(os, "rename", passed, lambda source, *_: "step-" in str(source))
    elif point == "weights":
        _before(os, "replace", passed, lambda source, target: Path(target).name == "last.safetensors")
    elif point in ("loss", "gradient"):
        _spoil(point, number, strike)
    elif point == "reduce-scatter":
        _add_wrongly(number, strike)
    else:
        raise ValueError(point)


def remember_weights() -> None:
    real = setup.build_engine

    def build(*arguments: Any) -> Any:
        engine = real(*arguments)
        _trained.extend(p for p in engine.module.parameters() if p.numel() > 5)
        return engine

    setup.build_engine = build


def _before(
    owner: Any, name: str, action: Callable[[], None], wanted: Callable[..., bool] = lambda *_: True
) -> None:
    real = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if wanted(*arguments):
            action()
        return real(*arguments, **options)

    setattr(owner, name, wrapped)


def _spoil(what: str, number: int, strike: Callable[[], None]) -> None:
    """NaN in the loss, or infinity in one gradient under a finite loss, of micro-batch `number` on this rank."""
    for kind in engine_classes():
        real = kind.backward
        count = 0

        def backward(self: Any, loss: Tensor, real: Any = real) -> None:
            nonlocal count
            count += 1
            if count == number:
                strike()
                if what == "gradient":
                    parameter = next(p for p in self.module.parameters() if p.requires_grad)
                    handle = parameter.register_hook(lambda gradient: gradient * torch.inf)
                    real(self, loss)
                    handle.remove()
                    _compare_around_step(self)
                    return
            real(self, loss)

        kind.backward = backward  # type: ignore[method-assign]
    if what == "loss":
        from arsg_dist.imagenet.training import trainer

        real_loss = trainer.cross_entropy_sum
        seen = 0

        def spoiled(logits: Tensor, targets: Tensor) -> Tensor:
            nonlocal seen
            seen += 1
            loss = real_loss(logits, targets)
            return loss * torch.nan if seen == number else loss

        trainer.cross_entropy_sum = spoiled


def _compare_around_step(engine: Any) -> None:
    """Says whether the engine's next step changes anything."""
    real = engine.step
    # Under ZeRO stage 3 this rank's part; a parameter itself comes and goes.
    held = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]

    def state() -> list[int]:
        optimizer = [v for s in engine.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return fingerprints([*held, *optimizer])

    def step() -> None:
        before = state()
        real()
        print(f"the skipped step changed nothing: {state() == before}", flush=True)
        engine.step = real

    engine.step = step


def _add_wrongly(number: int, strike: Callable[[], None]) -> None:
    """The sum of the first bucket that this rank receives in update `number` is wrong in one element."""
    from arsg_dist.horovod.comm.collectives import AllToAllReduceScatter, Started

    real = AllToAllReduceScatter.start
    count = 0

    def start(self: Any, wire: Tensor, decode: Any, name: str, *memory: Any) -> Started:
        nonlocal count
        started = real(self, wire, decode, name, *memory)
        if name == "part0.gradient0":
            count += 1
            if count == number:
                strike()
                result = started.result

                def wrong(received: Any) -> Tensor:
                    total = result(received)
                    total[3] += 1.0
                    return total

                started.result = wrong
        return started

    AllToAllReduceScatter.start = start  # type: ignore[method-assign]
