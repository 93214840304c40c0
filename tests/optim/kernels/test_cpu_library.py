"""The compiled library: what cannot be used is said in one line, and its numbers are torch's."""

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arsg_dist import ARSG
from arsg_dist.optim.kernels import cpu_library, fused
from tests.optim.kernels.test_fused import kernel_call
from tests.optim.optim_paths import fused_missing

needs_kernel = pytest.mark.skipif(fused_missing() is not None, reason=str(fused_missing()))


def absent(path: Path) -> None:
    pass


def of_another_machine(path: Path) -> None:
    path.write_bytes(b"\x7fELF of somebody else")


def compiled(path: Path, source: str) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("there is no compiler to make another library with")
    path.with_suffix(".c").write_text(source)
    subprocess.run(["gcc", "-shared", "-fPIC", path.with_suffix(".c"), "-o", path], check=True)


def of_another_version(path: Path) -> None:
    compiled(path, "int arsg_interface() { return 1000; }\n")


def of_something_else(path: Path) -> None:
    compiled(path, "int unrelated() { return 1; }\n")


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (absent, "it was not compiled"),
        (of_another_machine, "arsg_cpu.so: "),
        (of_another_version, "arsg_cpu.so was compiled from another version"),
        (of_something_else, "undefined symbol: arsg_interface"),
    ],
)
def test_a_library_that_cannot_be_used_is_said_once_and_foreach_serves(
    made: Callable[[Path], None], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches an update by functions whose arguments have changed, and a training that dies without a compiler."""
    made(tmp_path / "arsg_cpu.so")
    monkeypatch.setattr(cpu_library, "PATH", tmp_path / "arsg_cpu.so")
    for cached in (fused.cpu_kernel, cpu_library.register, cpu_library._load):
        monkeypatch.setattr(cached.__module__ + "." + cached.__name__, fresh(cached))
    results = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for choice in ({"fused": True}, {"fused": True}, {"foreach": True}):
            x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
            x.grad = torch.tensor([0.5, 0.25])
            ARSG([x], lr=0.1, **choice).step()
            results.append(x.detach())
    (warning,) = caught
    assert str(warning.message).startswith(
        "ARSG runs without its CPU kernel, several times slower (foreach=True): "
    )
    assert reason in str(warning.message)
    assert "\n" not in str(warning.message)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


def fresh(cached: Callable) -> Callable:
    """The function with a memory of its own, so that the process keeps its library."""
    from functools import cache

    return cache(cached.__wrapped__)


@needs_kernel
def test_every_float16_is_read_and_rounded_as_by_torch() -> None:
    """Catches a subnormal, an infinity or a tie that the library's own conversion treats otherwise."""
    every = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(torch.float16)
    same = every.clone()
    kernel_call([same], [torch.zeros_like(every)], [[torch.zeros(1 << 16)], [], []], [], mode="none")
    assert torch.equal(same[~every.isnan()].view(torch.int16), every[~every.isnan()].view(torch.int16))
    assert torch.equal(same.isnan(), every.isnan())

    finite = every[every.isfinite()]
    grads = finite[torch.randperm(len(finite), generator=torch.Generator().manual_seed(0))]
    moved = finite.clone()
    kernel_call([moved], [grads], [[torch.zeros(len(finite))], [], []], [], mode="none")
    m = (1 - torch.tensor(0.9, dtype=torch.float64)).float() * grads.float()
    expected = finite.float() - torch.tensor(0.1) * (
        torch.tensor(0.9) * m + torch.tensor(0.1) * grads.float()
    )
    assert torch.equal(moved.view(torch.int16), expected.half().view(torch.int16))


def test_importing_the_package_imports_no_compiler() -> None:
    """Catches a module-level torch.compile, which imports the compiler: seconds at every start of every rank."""
    code = (
        "import sys, torch; before = set(sys.modules); import arsg_dist; "
        "print(sorted({name for name in set(sys.modules) - before if name.startswith("
        "('torch._dynamo', 'torch._inductor', 'torch.distributed.tensor', 'triton', 'sympy', 'yaml'))}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_torch_that_is_too_old_is_said_in_one_line() -> None:
    """Catches an AttributeError deep in the package where pip was told to install without dependencies."""
    code = "import torch; torch.__version__ = '2.5.1+cpu'; import arsg_dist"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        "ImportError: arsg-dist needs torch 2.6 or newer, not 2.5.1+cpu: pip install 'torch>=2.6'"
    )
