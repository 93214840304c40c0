"""The wheel where there is no compiler: what a user installs computes what the checkout does."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from arsg_dist import ARSG
from tests.support.launchers import REPOSITORY

STEP = """
import sys, warnings
import torch
warnings.simplefilter("error")
import arsg_dist
from arsg_dist.optim.kernels import fused
assert arsg_dist.__file__.startswith(sys.argv[1]), arsg_dist.__file__
assert fused.cpu_kernel() is not None
params = [torch.nn.Parameter(p) for p in torch.load(sys.argv[2])]
optimizer = arsg_dist.ARSG(params, lr=0.1, weight_decay=0.01, fused=True)
for grads in torch.load(sys.argv[3]):
    for p, g in zip(params, grads):
        p.grad = g
    optimizer.step()
torch.save([p.detach() for p in params], sys.argv[4])
"""


def other_torches() -> list[Path]:
    """Environments with other versions of torch, where launch/test_versions.sh has made some."""
    return sorted(REPOSITORY.glob(".versions/torch*-python*/bin/python"))


@pytest.mark.turn(1)
def test_one_wheel_takes_the_reference_step_on_every_torch_without_a_compiler(tmp_path: Path) -> None:
    """Catches a library that is tied to the torch or the Python it was built with, or that the wheel lacks."""
    quick = (
        tmp_path / "g++"
    )  # what is packed is tested, not how fast it is: optimizing takes most of a minute
    quick.write_text('#!/bin/bash\nexec /usr/bin/env g++ "${@/-O3/-O0}"\n')
    quick.chmod(0o755)
    built = subprocess.run(
        [sys.executable, "-P", "setup.py", "--quiet", "bdist_wheel", "--bdist-dir", str(tmp_path / "build"),
         "--dist-dir", str(tmp_path)],
        cwd=checkout_copy(tmp_path / "checkout"), capture_output=True, text=True, timeout=300,
        env={**os.environ, "CC": str(quick), "CXX": str(quick)},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("arsg_dist-0.1.0-py3-none-"), "tied to a Python"
    assert "arsg_dist/optim/kernels/arsg_cpu.so" in zipfile.ZipFile(wheel).namelist()
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")  # what pip does, and it compiles nothing

    generator = torch.Generator().manual_seed(0)
    shapes = [(131,), (7, 5), (), (300, 100)]
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
    torch.save(params, tmp_path / "params.pt")
    torch.save(grads, tmp_path / "grads.pt")
    expected = [torch.nn.Parameter(p.double()) for p in params]
    reference = ARSG(expected, lr=0.1, weight_decay=0.01, fused=False, foreach=False)
    for step in grads:
        for p, g in zip(expected, step, strict=True):
            p.grad = g.double()
        reference.step()

    (tmp_path / "no compiler").mkdir()
    results = []
    for python in (Path(sys.executable), *other_torches()):
        arguments = [
            tmp_path / "installed",
            tmp_path / "params.pt",
            tmp_path / "grads.pt",
            tmp_path / "result.pt",
        ]
        done = subprocess.run(
            [python, "-c", STEP, *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
            env={"PATH": str(tmp_path / "no compiler"), "PYTHONPATH": str(tmp_path / "installed"),
                 "HOME": os.environ["HOME"], "OMP_NUM_THREADS": "2"},
        )  # fmt: skip
        assert done.returncode == 0, (python, done.stderr[-3000:])
        results.append(torch.load(tmp_path / "result.pt", weights_only=True))
    for x, y in zip(results[0], expected, strict=True):
        torch.testing.assert_close(x.double(), y.detach(), rtol=1e-5, atol=1e-6)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def checkout_copy(folder: Path) -> Path:
    """What git has, so that a library that lies in this checkout is not packed instead of a new one."""
    names = ["LICENSE", "README.md", "MANIFEST.in", "pyproject.toml", "setup.py", "arsg_dist", "configs"]
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *names],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    folder.mkdir()
    subprocess.run(
        ["tar", "--create", "--null", "--files-from=-", "--file", folder / "packed.tar"],
        cwd=REPOSITORY, input=listed.stdout, text=True, check=True,
    )  # fmt: skip
    subprocess.run(["tar", "--extract", "--file", "packed.tar"], cwd=folder, check=True)
    return folder


@pytest.mark.turn(5, of=12)
def test_another_processor_computes_the_same_bits(tmp_path: Path) -> None:
    """Catches a contraction or a conversion that another instruction set makes otherwise (aarch64 in an emulator)."""
    crossed = os.environ.get("ARSG_CROSS_CXX", "aarch64-linux-gnu-g++ -static")
    emulator = os.environ.get("ARSG_EMULATOR", "qemu-aarch64-static")
    csrc = REPOSITORY / "arsg_dist/optim/kernels/csrc"
    sources = [REPOSITORY / "tests/optim/kernels/all_updates.cpp", *sorted(csrc.glob("*.cpp"))]
    flags = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", f"-I{csrc}"]
    printed = []
    for name, compiler, runner in (("here", "g++", []), ("there", crossed, [emulator])):
        program = tmp_path / name
        try:
            subprocess.run([*compiler.split(), *flags, *sources, "-o", program], check=True, timeout=300)
            done = subprocess.run([*runner, program], check=True, capture_output=True, text=True, timeout=120)
        except FileNotFoundError as error:
            pytest.skip(f"{error.filename} is not here")
        printed.append(done.stdout.splitlines())
    assert len(printed[0]) == 90
    assert printed[0] == printed[1]
