"""The step of RemoteObservation after its inner optimizer's: one pass on CPU and GPU against foreach."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import asdict
from types import ModuleType

import pytest
import torch
from torch import Tensor

from arsg_dist import RemoteObservation
from arsg_dist.optim.hyperparameters import compute_dtype
from arsg_dist.optim.kernels import remote
from arsg_dist.optim.kernels.remote import Move, cpu_kernel, move_on

needs_kernel = pytest.mark.skipif(cpu_kernel() is None, reason="the CPU kernel is not built")

SHAPES = [(131,), (7, 5), (0,), (1,), (), (2048,), (4500,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MOVES = {
    "moves": Move(beta1=0.9, pull=0.3, reach=0.75),
    "decays": Move(beta1=0.9, pull=0.3, reach=0.0, decay=0.125),
    "both": Move(beta1=0.8, pull=0.7, reach=0.5, decay=0.125),
}


def problem(dtype: torch.dtype, *, moves: bool, gaps: bool = False) -> tuple[list[Tensor], ...]:
    """x, x₀ and d; elements that stay where they are, at 0 and beside it, NaN, and steps to and away from 0."""
    generator = torch.Generator().manual_seed(5)

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if gaps and len(shape) == 2:
            return torch.randn(shape[1], 2 * shape[0], generator=generator).to(dtype)[:, ::2].t()
        return torch.randn(shape, generator=generator).to(dtype)

    before = [random(shape, dtype) for shape in SHAPES]
    x = [tensor + 0.25 * random(tuple(tensor.shape), dtype) for tensor in before]
    before[0][:4], x[0][:4] = 0.0, torch.tensor([0.0, 1.0, -1.0, float("nan")]).to(dtype)
    x[5][:7] = before[5][:7]
    movements = [random(tuple(tensor.shape), compute_dtype(dtype)) for tensor in before] if moves else []
    return x, before, movements


def by_foreach(lists: tuple[list[Tensor], ...], move: Move) -> None:
    x, before, movements = lists
    remote._by_foreach(x, before, movements, move)


def assert_close(ours: tuple[list[Tensor], ...], theirs: tuple[list[Tensor], ...]) -> None:
    for actual, expected in zip((*ours[0], *ours[2]), (*theirs[0], *theirs[2]), strict=True):
        rounding = torch.finfo(actual.dtype).eps
        torch.testing.assert_close(actual, expected, rtol=4 * rounding, atol=4 * rounding, equal_nan=True)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("gaps", [False, True])
def test_the_cpu_kernel_is_the_rule_of_foreach(name: str, dtype: torch.dtype, gaps: bool) -> None:
    """Catches numbers of another parameter, an element past the end, a decay away from 0, a movement written where
    there is none, and parameters with gaps in memory that are left as they are."""
    move = MOVES[name]
    ours, theirs = (problem(dtype, moves=move.reach > 0, gaps=gaps) for _ in range(2))
    move_on(ours[0], ours[1], ours[2], move)
    by_foreach(theirs, move)
    assert_close(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))


@needs_kernel
def test_one_process_takes_the_kernel_and_a_stale_graph_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a kernel that is built and not used, or changes memory behind autograd's back."""
    monkeypatch.setattr(remote, "_by_foreach", lambda *_: pytest.fail("foreach, with a kernel there"))
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = RemoteObservation(torch.optim.SGD([x], lr=0.1), mu=0.5, beta1=0.9)
    stale = x.square().sum()
    x.grad = torch.ones(3)
    optimizer.step()
    assert x.tolist() == pytest.approx([1 - 0.1 - 0.5 * 0.02] * 3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """The GPU kernel's module once more, run by Triton's interpreter, and the one it has its loads and stores from."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from arsg_dist.optim.kernels import remote_triton, triton_kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for source in (triton_kernel, remote_triton):
            spec = importlib.util.spec_from_file_location(source.__name__, source.__file__)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, source.__name__, module)
            spec.loader.exec_module(module)
        yield module


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MOVES)
def test_the_gpu_kernels_bits_are_those_of_the_cpu_kernel(
    interpreted: ModuleType, name: str, dtype: torch.dtype
) -> None:
    """Catches an operation in another order or contracted, a wrong chunk, mask or row of the table."""
    move = MOVES[name]
    ours, theirs = (problem(dtype, moves=move.reach > 0) for _ in range(2))
    assert interpreted.triton_move_on(*ours, **asdict(move)) == []
    move_on(*theirs, move)
    for actual, expected in zip((*ours[0], *ours[2]), (*theirs[0], *theirs[2]), strict=True):
        assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0)), f"{name} {actual.shape}"


def test_the_gpu_kernel_leaves_float64_and_gaps_to_foreach(interpreted: ModuleType) -> None:
    """Catches memory read as if it were dense, or as float32."""
    move = asdict(MOVES["both"])
    assert interpreted.triton_move_on(*problem(torch.float64, moves=True), **move) == [*range(len(SHAPES))]
    assert interpreted.triton_move_on(*problem(torch.float32, moves=True, gaps=True), **move) == [1]
