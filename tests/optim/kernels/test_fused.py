"""The fused path: the CPU kernel bit by bit, what it leaves to others, its fall-backs, and the compiled path."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from itertools import chain, product
from typing import Any

import pytest
import torch

from arsg_dist import ARSG
from arsg_dist.optim.hyperparameters import PRECONDITIONERS, Hyperparameters, compute_dtype
from arsg_dist.optim.kernels import fused
from arsg_dist.optim.kernels.reference import reference_step
from arsg_dist.optim.state import MOMENTS
from tests.optim.optim_paths import FUSED, MODES, assert_close, fused_missing, gradients, parameters, run

needs_kernel = pytest.mark.skipif(fused_missing() is not None, reason=str(fused_missing()))
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Of the largest element; a half-precision parameter may round to the neighbour.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def hyper_of(**changes: Any) -> Hyperparameters:
    settings: dict[str, Any] = {
        "lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "mu": 0.1, "eps": 1e-8, "weight_decay": 0.0,
        "preconditioner": "amsgrad", "decoupled_weight_decay": False, "maximize": False, "capturable": False,
    }  # fmt: skip
    return Hyperparameters(**{**settings, **changes})


class Problem:
    """Parameters with state, to be moved by one implementation of the step."""

    def __init__(self, shapes, mode: str, dtype: torch.dtype, state_dtype: torch.dtype, device="cpu") -> None:
        generator = torch.Generator().manual_seed(3)
        self.dtype, self.mode, self.generator = dtype, mode, generator
        self.params = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        self.moments: list[list[torch.Tensor]] = [[], [], []]
        for i in range(len(MOMENTS[mode])):
            self.moments[i] = [torch.zeros_like(p, dtype=state_dtype) for p in self.params]

    def step(self, implementation, t: int, grads=None, **changes: Any) -> None:
        if grads is None:
            grads = [
                torch.randn(p.shape, generator=self.generator).to(p.device, self.dtype) for p in self.params
            ]
        hyper = hyper_of(preconditioner=self.mode, **changes)
        implementation(self.params, grads, *self.moments, [t] * len(self.params), hyper=hyper)

    def tensors(self) -> list[torch.Tensor]:
        return list(chain(self.params, *self.moments))


def kernel_call(params, grads, moments, steps, mode="amsgrad") -> list[int]:
    """The operator itself."""
    kernel = fused.cpu_kernel()
    assert kernel is not None
    return kernel(
        params, grads, *moments, steps, preconditioner=PRECONDITIONERS.index(mode), lr=0.1, beta1=0.9,
        beta2=0.99, mu=0.1, eps=1e-8, coupled_decay=0.0, decoupled_decay=0.0, opposed_decay=0.0, gradient_factor=1.0,
        corrects_first=mode == "adam", corrects_second=mode == "adam", precondition_first=False,
        exponents=[], corrections=[], firsts=[],
    )  # fmt: skip


def plain_amsgrad(x, g, m, v, v_hat, hyper: Hyperparameters):
    """The rule in separate operations, each rounded once (torch's own sqrt may be off by one bit)."""
    floor = hyper.floor(x.dtype)
    m = hyper.beta1 * m + (1 - hyper.beta1) * g
    v = hyper.beta2 * v + ((1 - hyper.beta2) * g) * g
    v_hat = torch.maximum(v_hat, v).clamp(min=floor)
    root = torch.tensor([math.sqrt(value) for value in v_hat.tolist()], dtype=x.dtype)
    move = ((1 - hyper.mu) * m + hyper.mu * g) / root
    return x - hyper.lr * move, m, v, v_hat


@needs_kernel
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_kernel_makes_the_references_update(mode: str, state_dtype, dtype) -> None:
    """Catches a wrong instantiation: a dtype read as another, a setting that one combination ignores."""
    for decay, decoupled, maximize in product((0.0, 0.1), (False, True), (False, True)):
        changes = {"weight_decay": decay, "decoupled_weight_decay": decoupled, "maximize": maximize}
        # Every setting in every instantiation, not every combination of them.
        changes["cautious_weight_decay"] = decoupled and maximize
        changes["precondition_first"] = maximize
        changes["bias_correction"] = "second" if mode == "adam" and decay else "both"
        # Sizes around the widths of vectors, none, one, and a scalar.
        ours, theirs = (Problem([(131,), (7, 5), (0,), (1,), ()], mode, dtype, state_dtype) for _ in range(2))
        for t in (1, 2, 3):
            ours.step(fused.fused_step, t, **changes)
            theirs.step(reference_step, t, **changes)
        for x, y in zip(ours.params, theirs.params, strict=True):
            assert_close(x, y, TOLERANCE[dtype], f"x {changes}")
        computed = compute_dtype(dtype)
        for x, y in zip(chain(*ours.moments), chain(*theirs.moments), strict=True):
            assert_close(x, y, 2 * max(TOLERANCE[computed], TOLERANCE[x.dtype]), f"moment {changes}")


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kernel_rounds_every_operation_once(dtype) -> None:
    """Catches contraction into fused multiply-adds and approximate roots: bits would depend on the CPU."""
    ours = Problem([(100_003,)], "amsgrad", dtype, dtype)
    x, m, v, v_hat = (t.clone() for t in ours.tensors())
    for t in (1, 2, 3):
        g = torch.randn(100_003, generator=ours.generator).to(dtype)
        ours.step(fused.fused_step, t, grads=[g])
        x, m, v, v_hat = plain_amsgrad(x, g, m, v, v_hat, hyper_of())
    for actual, expected in zip(ours.tensors(), (x, m, v, v_hat), strict=True):
        assert torch.equal(actual, expected)


@needs_kernel
@pytest.mark.parametrize("layout", ["flat", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bfloat16_state_is_rounded_with_the_documented_bits(dtype, layout: str) -> None:
    """Catches another hash, slot, index or step: replicas on CPU and GPU would drift apart.

    Dyadic numbers make the unrounded moments exact, so that every stored bit must agree.
    """
    shape = (100_003,) if layout == "flat" else (7, 16, 31, 17)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randint(-2047, 2048, shape, generator=generator).to(dtype) / 1024 for _ in range(2)]
    problems = []
    for implementation in (fused.fused_step, reference_step):
        problem = Problem([shape], "amsgrad", dtype, torch.bfloat16)
        if layout == "channels_last":
            for tensors in (problem.params, *problem.moments):
                tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
        for t, grad in zip((1, 70_001), grads, strict=True):
            grad = grad.contiguous(memory_format=torch.channels_last) if layout != "flat" else grad
            problem.step(implementation, t, grads=[grad], beta1=0.5, beta2=0.5, lr=0.0)
        problems.append(problem)
    for actual, expected in zip(problems[0].tensors(), problems[1].tensors(), strict=True):
        assert torch.equal(actual, expected)
    assert not torch.equal(problems[0].moments[0][0].to(dtype), grads[1] / 2 + grads[0] / 4), (
        "nothing rounded"
    )


@needs_kernel
@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
def test_special_values_are_treated_as_by_the_reference(state_dtype) -> None:
    """Catches NaN swallowed by a maximum or by rounding, and 0/0 where v̂ is 0."""
    inf, nan = float("inf"), float("nan")
    grad = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1e-30, -1e-45, 3e38, 1.0] * 5)
    for mode, eps in product(MODES, (0.0, 1e-3)):
        results = []
        for implementation in (fused.fused_step, reference_step):
            problem = Problem([(45,)], mode, torch.float32, state_dtype)
            for moments in problem.moments:
                for moment in moments:
                    moment[8] = nan if moments is problem.moments[-1] else 0.5
            for t in (1, 2):
                problem.step(implementation, t, grads=[grad], eps=eps)
            problem.step(implementation, 3, eps=eps)
            results.append(problem.tensors())
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=2**-7, atol=1e-38, equal_nan=True)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@needs_kernel
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads_or_on_how_tensors_are_cut(state_dtype, restored_threads) -> None:
    """Catches elements lost or done twice where threads meet, and tails computed otherwise than vectors."""
    shapes = [(3,), (50_001,), (1,), (64,), (0,), (40_000,), (65,)]
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        problem = Problem(shapes, "amsgrad", torch.float32, state_dtype)
        for t in (1, 2):
            problem.step(fused.fused_step, t, weight_decay=0.1)
        results.append(problem.tensors())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    whole, cut = (Problem([(1003,)], "adam", torch.float32, torch.float32) for _ in range(2))
    grad = torch.randn(1003, generator=whole.generator)
    whole.step(fused.fused_step, 1, grads=[grad])
    pieces = [[part for t in ts for part in t.split([1, 500, 502])] for ts in (cut.params, *cut.moments)]
    params, *moments = pieces
    hyper = hyper_of(preconditioner="adam")
    fused.fused_step(params, list(grad.split([1, 500, 502])), *moments, [1, 1, 1], hyper=hyper)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), cut.tensors(), strict=True))


@needs_kernel
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_kernel_uses_torchs_threads() -> None:
    """Catches a build without OpenMP, which runs on one thread and is correct but slow."""
    code = (
        "import os, torch\n"
        "from arsg_dist import ARSG\n"
        "x = torch.nn.Parameter(torch.zeros(1 << 20)); x.grad = torch.zeros(1 << 20)\n"
        "torch.set_num_threads(1)\n"
        "optimizer = ARSG([x], fused=True); optimizer.step()\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "torch.set_num_threads(3); optimizer.step()\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "2", done.stderr


@needs_kernel
def test_dense_layouts_are_taken_and_others_left() -> None:
    """Catches a tensor read in the wrong order, and channels_last left to the slow reference."""

    def tensors(param, grad):
        return [param], [grad], [[torch.zeros_like(param)] for _ in range(3)], []

    image = torch.randn(2, 3, 4, 5)
    last = image.contiguous(memory_format=torch.channels_last)
    assert kernel_call(*tensors(last.clone(), last)) == []
    assert kernel_call(*tensors(image.clone(), last)) == [0]  # same shape, other order
    assert kernel_call(*tensors(image.clone(), torch.ones(()).expand(2, 3, 4, 5))) == [0]
    gaps = [torch.zeros(4, 6)[:, ::2] for _ in range(5)]
    assert kernel_call([gaps[0]], [gaps[1]], [[gap] for gap in gaps[2:]], []) == [0]
    params = [torch.zeros(5), torch.randn(10)[::2], torch.zeros(5)]
    moments = [[torch.zeros(5) for _ in params] for _ in range(3)]
    assert kernel_call(params, [torch.ones(5)] * 3, moments, []) == [1]
    assert bool((params[0] != 0).all())
    assert bool((params[2] != 0).all())


@needs_kernel
def test_a_sign_not_yet_applied_is_applied() -> None:
    """Catches a gradient read from memory that torch holds negated (the imaginary part of a conjugate)."""
    grad = torch.randn(5)
    results = []
    for negated in (-grad, torch._neg_view(grad)):
        param = torch.zeros(5)
        kernel_call([param], [negated], [[torch.zeros(5)] for _ in range(3)], [])
        results.append(param)
    assert torch.equal(*results)


@needs_kernel
def test_kernel_refuses_what_would_corrupt_memory() -> None:
    """Catches a missing check: the kernel works on bare pointers."""

    def call(**changes):
        arguments = {
            "params": [torch.zeros(4)],
            "grads": [torch.zeros(4)],
            "moments": [[torch.zeros(4)] for _ in range(3)],
            "steps": [],
        }
        return kernel_call(**{**arguments, **changes})

    assert call() == []
    for changes in (
        {"grads": [torch.zeros(3)]},
        {"grads": [torch.zeros(4, dtype=torch.float64)]},
        {"grads": [torch.zeros(4, device="meta")]},
        {"grads": []},
        {"moments": [[torch.zeros(4)], [torch.zeros(2)], [torch.zeros(4)]]},
        {"moments": [[torch.zeros(4)], [torch.zeros(4)], []]},
        {"moments": [[torch.zeros(4)], [torch.zeros(4).double()], [torch.zeros(4)]]},
        {"moments": [[torch.zeros(4).bfloat16()] for _ in range(3)]},  # without steps
        {"moments": [[torch.zeros(4).half()] for _ in range(3)]},
        {"params": [torch.zeros(4).int()], "grads": [torch.zeros(4).int()]},
    ):
        with pytest.raises((ValueError, NotImplementedError)):
            call(**changes)


@needs_kernel
def test_a_step_is_seen_by_autograd_as_a_change_in_place() -> None:
    """Catches silently wrong gradients when backward runs after the step that changed what it needs."""
    x = torch.nn.Parameter(torch.ones(3))
    loss = (x * x).sum()
    x.grad = torch.ones(3)
    ARSG([x], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_kernel
def test_a_step_allocates_no_tensors() -> None:
    """Catches temporaries: peak memory is parameters, gradients and state (measured by torch's profiler)."""
    size = 1 << 16

    def allocated(**choice) -> int:
        x = torch.nn.Parameter(torch.zeros(size))
        x.grad = torch.ones(size)
        optimizer = ARSG([x], weight_decay=0.1, **choice)
        optimizer.step()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as p:
            optimizer.step()
        return sum(max(event.self_cpu_memory_usage, 0) for event in p.events())

    assert allocated(foreach=True) >= 4 * size, "the profiler does not see temporaries"
    assert allocated(fused=True) < 1024
    assert allocated(fused=True, state_dtype="bfloat16") < 1024


def trained(**choice) -> torch.Tensor:
    """A parameter after three steps of ARSG."""
    params = parameters([(40,)], dtype=torch.float32)
    run(ARSG(params, weight_decay=0.1, **choice), params, gradients([(40,)], 3, dtype=torch.float32))
    return params[0].detach()


def test_failing_compiler_falls_back_with_one_warning(monkeypatch) -> None:
    """Catches a job that dies where Triton or a compiler is missing, and a new attempt at every step."""
    attempts = []

    def failing(*arguments):
        attempts.append(arguments)
        raise torch._dynamo.exc.TorchDynamoException("no compiler here\nlong story")

    monkeypatch.setattr(fused, "_compiled_update", lambda: failing)
    monkeypatch.setattr(fused, "_compiling_failed", False)
    monkeypatch.setattr(fused, "_cpu_step", fused.compiled_step)
    with pytest.warns(
        UserWarning, match=r"torch\.compile failed \(TorchDynamoException: no compiler here\)"
    ) as caught:
        results = [trained(fused=True) for _ in range(2)]
    assert len(caught) == 1
    assert len(attempts) == 1
    assert all(torch.equal(result, trained(foreach=True)) for result in results)


def test_compiled_code_that_fails_on_its_way_is_not_followed_by_another_update(monkeypatch) -> None:
    """Catches tensors that were updated twice: by what came before an error, and by the path that stands in."""

    def failing(params, *_):
        params[0].sub_(1.0)
        raise torch.OutOfMemoryError("in the second kernel")

    monkeypatch.setattr(fused, "_compiled_update", lambda: failing)
    monkeypatch.setattr(fused, "_compiling_failed", False)
    monkeypatch.setattr(fused, "_cpu_step", fused.compiled_step)
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(2)
    with pytest.raises(torch.OutOfMemoryError):
        ARSG(params, lr=0.5, fused=True).step()
    assert [param.tolist() for param in params] == [[0.0, 0.0], [1.0, 1.0]]
    assert not fused._compiling_failed


@pytest.mark.parametrize("known", [True, False])
def test_the_package_can_do_with_a_torch_that_does_not_know_recompile_limit(monkeypatch, known: bool) -> None:
    """Catches torch 2.11, whose torch.compile refuses the argument: the package could not even be imported."""
    given = []
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # torch 2.6

    def old(function, *, fullgraph, dynamic):
        return lambda *_: given.append(getattr(config, limit))

    def new(function, *, fullgraph, dynamic, recompile_limit):
        return lambda *_: given.append(recompile_limit)

    monkeypatch.setattr(torch, "compile", new if known else old)
    fused._compiled_update.cache_clear()
    fused._compiled_update()()
    fused._compiled_update.cache_clear()
    assert given == [fused._RECOMPILE_LIMIT]


def test_inside_torch_compile_the_step_is_traced_whole() -> None:
    """Catches a graph break at the kernel, whose arguments dynamo would have to read on the host."""
    ours, theirs = (Problem([(9,), (2, 3)], "amsgrad", torch.float32, torch.float32) for _ in range(2))
    compiled = torch.compile(fused.fused_step, backend="eager", fullgraph=True)
    for t in (1, 2):
        ours.step(compiled, t)
        theirs.step(reference_step, t)
    for actual, expected in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert_close(actual, expected, 1e-6)


@pytest.mark.turn(2)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_compiled_path_makes_the_references_update_without_recompiling(mode: str, state_dtype) -> None:
    """The code for accelerators, compiled for CPU here. Catches α, μ or t baked into the compiled code."""
    ours, theirs = (Problem([(33, 5), (7,)], mode, torch.float32, state_dtype) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a failure to compile would be hidden by the fall-back
        ours.step(fused.compiled_step, 1)
        with torch.compiler.set_stance("fail_on_recompile"):
            for t in (2, 3):
                ours.step(fused.compiled_step, t, lr=0.1 / t, mu=0.2 / t)
    theirs.step(reference_step, 1)
    for t in (2, 3):
        theirs.step(reference_step, t, lr=0.1 / t, mu=0.2 / t)
    for actual, expected in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert_close(actual, expected, 1e-6 if actual.dtype == torch.float32 else 2**-7)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_cuda_path_makes_the_references_update(mode: str, dtype, state_dtype) -> None:
    """Catches generated device code that differs from the rule, or a silent fall-back."""
    shapes = [(33, 5), (7,), (), (1000, 300)]
    ours = Problem(shapes, mode, dtype, state_dtype, device="cuda")
    theirs = Problem(shapes, mode, dtype, state_dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for t in (1, 2, 3):
            ours.step(fused.fused_step, t, lr=0.1 / t)
            theirs.step(reference_step, t, lr=0.1 / t)
    for actual, expected in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert_close(actual.cpu(), expected, 3e-6 if actual.dtype == torch.float32 else 2**-7)


@pytest.mark.gpu
@needs_cuda
def test_cuda_graph_replays_the_step() -> None:
    """Catches a host read or a host-side counter: a replayed graph would repeat the first step's t and α."""
    grads = gradients([(1000,)], 6, dtype=torch.float32)
    expected = parameters([(1000,)], dtype=torch.float32)
    run(ARSG(expected, preconditioner="adam", foreach=False), expected, grads)

    x = torch.nn.Parameter(parameters([(1000,)], dtype=torch.float32)[0].detach().cuda())
    x.grad = torch.zeros_like(x)
    optimizer = ARSG([x], preconditioner="adam", capturable=True, **FUSED.settings)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step_grads in grads[:3]:
            x.grad.copy_(step_grads[0])
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step_grads in grads[3:]:
        x.grad.copy_(step_grads[0])
        graph.replay()
    assert_close(x.detach().cpu(), expected[0].detach(), 1e-5)
