"""The GPU kernel without a GPU: its bits in Triton's interpreter, and the machine code compiled ahead of time."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from arsg_dist.optim.kernels import dispatch, fused
from arsg_dist.optim.kernels.reference import reference_step
from tests.optim.kernels.test_fused import Problem, hyper_of, needs_kernel
from tests.optim.optim_paths import assert_close

triton = pytest.importorskip("triton", reason="Triton is not installed")

CAUTIOUS = {"weight_decay": 0.1, "decoupled_weight_decay": True, "cautious_weight_decay": True}
SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
# Around the chunk's size, none, one, a scalar, several dimensions.
SHAPES = [(131,), (7, 5), (0,), (1,), (), (2048,), (4500,)]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """The kernel's module once more, run by Triton's interpreter, which is chosen when a kernel is defined."""
    from arsg_dist.optim.kernels import triton_kernel

    spec = importlib.util.spec_from_file_location("interpreted_triton_kernel", triton_kernel.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
        yield module
    del sys.modules[spec.name]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bits, every NaN the same."""
    tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.itemsize])


def assert_same_bits(ours: Problem, theirs: Problem) -> None:
    for actual, expected in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert torch.equal(bits(actual), bits(expected)), f"{actual.shape}, {actual.dtype}"


@needs_kernel
@pytest.mark.parametrize(
    ("mode", "dtype", "state_dtype", "changes"),
    [
        ("amsgrad", SINGLE, SINGLE, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
        ("amsgrad", BRAIN, BRAIN, {"weight_decay": 0.1, "maximize": True}),
        ("amsgrad", HALF, SINGLE, {"eps": 1e-3}),
        ("adam", SINGLE, BRAIN, {"weight_decay": 0.1, "maximize": True}),
        ("adam", BRAIN, SINGLE, {"weight_decay": 0.1, "decoupled_weight_decay": True, "eps": 0.0}),
        ("adam", HALF, BRAIN, {"mu": 0.0}),
        ("adam", SINGLE, SINGLE, {"bias_correction": "second", **CAUTIOUS}),
        ("adam", BRAIN, BRAIN, {"precondition_first": True, "bias_correction": "none", "maximize": True}),
        ("amsgrad", SINGLE, BRAIN, {"precondition_first": True, **CAUTIOUS}),
        ("none", SINGLE, BRAIN, {"weight_decay": 0.1}),
        ("none", BRAIN, SINGLE, {}),
        ("none", HALF, SINGLE, {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
    ],
)
def test_the_bits_are_those_of_the_cpu_kernel(
    interpreted: ModuleType, mode: str, dtype: torch.dtype, state_dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    """Catches a setting, dtype or tail treated otherwise than on CPU, and another hash: replicas would drift apart."""
    ours, theirs = (Problem(SHAPES, mode, dtype, state_dtype) for _ in range(2))
    for t in (1, 2):
        ours.step(interpreted.triton_step, t, **changes)
        theirs.step(fused.fused_step, t, **changes)
        assert_same_bits(ours, theirs)


@needs_kernel
@pytest.mark.parametrize("state_dtype", [SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("mode", ["amsgrad", "adam"])
def test_special_values_are_treated_as_on_cpu(
    interpreted: ModuleType, mode: str, state_dtype: torch.dtype
) -> None:
    """Catches NaN swallowed by a maximum or by rounding, and 0/0 where v̂ is 0."""
    inf, nan = float("inf"), float("nan")
    grad = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1e-30, -1e-45, 3e38, 1.0] * 5)
    ours, theirs = (Problem([(45,)], mode, SINGLE, state_dtype) for _ in range(2))
    for problem, implementation in ((ours, interpreted.triton_step), (theirs, fused.fused_step)):
        problem.moments[0][0][8] = nan
        problem.step(implementation, 1, grads=[grad], eps=0.0)
        problem.step(implementation, 2, grads=[grad.roll(1)], eps=0.0)
    assert_same_bits(ours, theirs)


@needs_kernel
def test_layouts_and_addresses(interpreted: ModuleType) -> None:
    """Catches channels_last read in another order, an unaligned tensor read past its end, and gaps written over."""
    shape = (3, 8, 5, 9)
    results = []
    for implementation in (interpreted.triton_step, fused.fused_step):
        problem = Problem([shape, (2100,), (2100,), (40,)], "amsgrad", SINGLE, BRAIN)
        kept = []
        for tensors in (problem.params, *problem.moments):
            tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
            unaligned = torch.full((2102,), 7.0, dtype=tensors[1].dtype)
            unaligned[1:-1] = tensors[1]
            tensors[1] = unaligned[1:-1]
            gaps = torch.full((80,), 7.0, dtype=tensors[3].dtype)
            gaps[::2] = tensors[3]
            tensors[3] = gaps[::2]
            kept += [unaligned, gaps]
        grads = [torch.randn(p.shape, generator=problem.generator) for p in problem.params]
        grads[0] = grads[0].contiguous(memory_format=torch.channels_last)
        problem.step(implementation, 3, grads=grads)
        assert all(
            buffer[0] == 7 and buffer[-1] == 7 if len(buffer) == 2102 else bool((buffer[1::2] == 7).all())
            for buffer in kept
        )
        results.append(problem)
    # Tensors with gaps are another path's on either side, whose operations are rounded otherwise.
    for actual, expected in zip(results[0].tensors(), results[1].tensors(), strict=True):
        assert_close(actual, expected, 1e-6 if actual.dtype == SINGLE else 2**-7)
    for tensors in zip(*(chain(p.params[:3], *(m[:3] for m in p.moments)) for p in results), strict=True):
        assert torch.equal(*map(bits, tensors))


@needs_kernel
def test_gradients_of_another_dtype_are_taken_as_they_are(interpreted: ModuleType) -> None:
    """Catches a gradient read in the parameter's dtype."""
    ours, theirs = (Problem([(2100,)], "amsgrad", SINGLE, SINGLE) for _ in range(2))
    grad = torch.randn(2100, generator=ours.generator).bfloat16()
    ours.step(interpreted.triton_step, 1, grads=[grad])
    theirs.step(fused.fused_step, 1, grads=[grad.float()])
    assert_same_bits(ours, theirs)


@needs_kernel
@pytest.mark.parametrize("state_dtype", [SINGLE, BRAIN], ids=str)
def test_every_parameter_has_its_own_number_of_steps(
    interpreted: ModuleType, state_dtype: torch.dtype
) -> None:
    """Catches the first parameter's bias correction, or random bits, taken for all."""
    ours, theirs = (Problem([(9,), (2050,), (3,)], "adam", SINGLE, state_dtype) for _ in range(2))
    grads = [torch.randn(p.shape, generator=ours.generator) for p in ours.params]
    for problem, implementation in ((ours, interpreted.triton_step), (theirs, fused.fused_step)):
        implementation(
            problem.params, grads, *problem.moments, [1, 70_001, 3], hyper=hyper_of(preconditioner="adam")
        )
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("mode", ["amsgrad", "adam"])
def test_settings_on_the_device_are_read_there(interpreted: ModuleType, mode: str) -> None:
    """Catches α, μ or t read on the host, or the wrong one of them."""
    ours, theirs = (Problem([(9,), (2050,)], mode, SINGLE, SINGLE) for _ in range(2))
    grads = [torch.randn(p.shape, generator=ours.generator) for p in ours.params]
    settings = {
        "preconditioner": mode,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
        "cautious_weight_decay": mode == "adam",
        "precondition_first": mode == "adam",
        "capturable": True,
    }
    device = hyper_of(**settings, lr=torch.tensor(0.02), mu=torch.tensor(0.3))
    host = hyper_of(**{**settings, "capturable": False}, lr=0.02, mu=0.3)
    steps = [torch.tensor(4.0), torch.tensor(9.0)]
    interpreted.triton_step(ours.params, grads, *ours.moments, steps, hyper=device)
    reference_step(theirs.params, grads, *theirs.moments, [4, 9], hyper=host)
    for actual, expected in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert_close(actual, expected, 2e-6)


@needs_kernel
@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("state_dtype", [SINGLE, BRAIN], ids=str)
def test_a_scale_is_undone_with_the_bits_of_the_cpu_kernel(
    interpreted: ModuleType, state_dtype: torch.dtype, on_device: bool
) -> None:
    """Catches a factor applied after the decay, in other steps than on CPU, or not where it is on the device."""
    ours, theirs = (Problem(SHAPES, "amsgrad", SINGLE, state_dtype) for _ in range(2))
    factor = torch.tensor(3.7).reciprocal()
    changes = {"weight_decay": 0.1, "maximize": True}
    ours.step(interpreted.triton_step, 1, gradient_factor=factor if on_device else factor.item(), **changes)
    theirs.step(fused.fused_step, 1, gradient_factor=factor.item(), **changes)
    assert_same_bits(ours, theirs)


def test_an_overflow_that_the_device_knows_of_changes_nothing(interpreted: ModuleType) -> None:
    """Catches chunks, or tensors of another path, that are updated all the same; and a flag of 0 that stops updates."""
    ours, before = (Problem(SHAPES, "amsgrad", SINGLE, SINGLE) for _ in range(2))
    for problem in (ours, before):
        gaps = torch.zeros(80)
        gaps[::2] = 1.0
        problem.params.append(gaps[::2])
        for moment in problem.moments:
            moment.append(torch.zeros(40))
    ours.step(interpreted.triton_step, 1, found_inf=torch.tensor(1.0))
    assert_same_bits(ours, before)
    ours.step(interpreted.triton_step, 1, found_inf=torch.tensor(0.0))
    assert all((x != y).all() for x, y in zip(ours.params, before.params, strict=True) if x.numel())


def test_one_launch_updates_every_tensor_and_no_setting_compiles_anew(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a launch per tensor, and a setting that is a constant of the compiled code."""
    launches = []
    kernel = interpreted.kernel

    def launcher(grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: (
            launches.append(constants),
            kernel[grid](*arguments, **constants),
        )

    monkeypatch.setattr(
        interpreted, "kernel", type("Counted", (), {"__getitem__": lambda _, grid: launcher(grid)})()
    )
    many, few = (Problem([(3, k) for k in range(1, end)], "amsgrad", SINGLE, SINGLE) for end in (162, 3))
    many.step(interpreted.triton_step, 1)
    for number, changes in enumerate(
        ({}, {"lr": 0.5}, {"mu": 0.9}, {"beta1": 0.5}, {"beta2": 0.5}, {"eps": 1e-3})
    ):
        few.step(interpreted.triton_step, number + 1, **changes)
    assert len(launches) == 7
    assert all(constants == launches[0] for constants in launches)


def test_a_capture_copies_nothing_from_main_memory_and_keeps_what_it_was_given(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a graph that replays a copy from memory long used for something else, or reads a table that was freed."""
    tables, device = interpreted._Tables(), torch.device("cpu")
    known = tables.find(interpreted._pointers, tuple(range(16, 336, 16)), device, 1)
    row = (2**47 + 8, 2**62, 16, 32, 48, 64, 1, 2, 3, 4)
    with monkeypatch.context() as patch:
        patch.setattr(interpreted, "_capturing", lambda _: True)
        patch.setattr(interpreted, "_sent", None)
        assert tables.find(interpreted._pointers, tuple(range(16, 336, 16)), device, 2) is known
        made = [
            tables.find(interpreted._pointers, row, device, 2),
            tables.find(interpreted._chunks, (0, 2048, 4097), device, 2),
        ]
    assert [table.tolist() for pair in made for table in pair] == [
        [[*row]],
        [0],
        [[1, 0], [2, 0], [2, 1], [2, 2]],
        [0, 2048, 4097],
    ]
    other = tables.find(interpreted._pointers, row, device, 2)
    assert other is not made[0], "the graph's own is filled when the graph runs"
    for number in range(600):
        tables.find(interpreted._chunks, (number,), device, 1)
    assert len(tables._known) == 512
    assert known in tables._in_graphs
    assert tables.find(interpreted._chunks, (599,), device, 2) is not tables.find(
        interpreted._chunks, (599,), device, 1
    ), "a stream does not wait for the copies of another"


def test_the_number_of_the_step_compiles_nothing_anew() -> None:
    """Catches code of its own for t = 1 and for multiples of 16: training would stop at those steps to compile."""
    from arsg_dist.optim.kernels.triton_kernel import kernel

    assert {p.name for p in kernel.params if p.do_not_specialize} == {"chunk_count", "steps"}


class Code:
    """The machine code of the kernel for one kind of tensors.

    Attributes:
        ptx: the assembly.
        usage: what the device's tools say of registers and memory.
    """

    def __init__(
        self, capability: int, tmp_path: Path, mode: str, p: str, g: str, s: str, *, split: bool = False
    ) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from arsg_dist.optim.kernels import triton_kernel as module

        names = list(module.kernel.arg_names)
        types = {"P": p, "G": g, "S": s}
        constants = {
            **{
                name: triton.language.int8 if dtype == "8bit" else module.ELEMENTS[getattr(torch, dtype)]
                for name, dtype in types.items()
            },
            "SPLIT": split,
            "MODE": module.PRECONDITIONERS.index(mode),
            "FIRST": False,
            "COUPLED": False,
            "PER_TENSOR": False,
            "ON_DEVICE": False,
            "SCALED": False,
            "SKIPS": False,
            "SIZE": module.CHUNK,
        }
        known = {
            **dict.fromkeys(("pointers", "sizes", "scalars"), "*i64"),
            **dict.fromkeys(("aligned", "chunks"), "*i32"),
            **dict.fromkeys(("factor", "found_inf"), "*fp32"),
            **dict.fromkeys(("chunk_count", "steps"), "i32"),
            **dict.fromkeys(constants, "constexpr"),
        }
        source = ASTSource(module.kernel, {name: known.get(name, "fp32") for name in names}, constants)
        warps = module.WARPS_FOR_EIGHT_BITS if s == "8bit" else module.WARPS
        options = {"num_warps": warps, "enable_fp_fusion": False}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        self.ptx: str = compiled.asm["ptx"]
        (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        self.usage = subprocess.run(
            [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))


@pytest.mark.parametrize(
    ("capability", "mode", "dtypes", "loads", "stores"),
    [
        # 2,048 elements on 256 threads: 8 of each tensor, which are two accesses of 128 bits in 32 bits, one in 16.
        (80, "amsgrad", ("float32", "float32", "float32"), 5 * 2, 4 * 2),  # 36 bytes per parameter
        (90, "amsgrad", ("float32", "float32", "float32"), 5 * 2, 4 * 2),
        (100, "amsgrad", ("float32", "float32", "float32"), 5 * 2, 4 * 2),
        (90, "amsgrad", ("float32", "float32", "bfloat16"), 2 * 2 + 3, 2 + 3),  # 24 bytes
        (90, "adam", ("bfloat16", "bfloat16", "bfloat16"), 4, 3),  # 14 bytes
        # On 512 threads: 4 of each, which are 128 bits of x and g, and 32 of codes.
        (90, "amsgrad", ("float32", "float32", "8bit"), 2, 1),  # 18 bytes
    ],
)
def test_full_chunks_are_read_and_written_128_bits_at_a_time_and_rounded_correctly(
    tmp_path: Path, capability: int, mode: str, dtypes: tuple[str, str, str], loads: int, stores: int
) -> None:
    """Catches scalar accesses, a second pass over memory, approximate roots and quotients, contraction, and spills."""
    if triton.__version__.startswith("3.2."):
        pytest.skip(
            "Triton 3.2 cannot compile after its interpreter was used, and flushes subnormal roots to 0"
        )
    code = Code(capability, tmp_path, mode, *dtypes)
    assert code.count(r"ld\.global\S*\.v4\.b32") == loads
    assert code.count(r"st\.global\S*\.v4\.b32") == stores
    assert code.count(r"sqrt\.rn\.f32") == code.count(r"sqrt\.\S*f32") > 0
    assert code.count(r"div\.rn\.f32") == code.count(r"div\.\S*f32") > 0
    assert code.count(r"\bfma\.") == 0
    found = Counter(dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", code.usage)))
    assert int(found["STACK"]) == int(found["LOCAL"]) == 0, code.usage
    assert int(found["REG"]) <= 128, "two programs of 256 threads on a processor at least"


@needs_kernel
def test_a_kernel_that_cannot_be_compiled_changes_nothing_and_another_path_takes_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a tensor updated twice, by the kernel and by what stands in for it, and a warning every step."""
    from arsg_dist.optim.kernels import triton_kernel

    class Broken:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("0 active drivers\nmore")

    monkeypatch.setattr(triton_kernel, "kernel", Broken())
    monkeypatch.setattr(fused, "_kernel_failed", False)
    monkeypatch.setattr(fused, "compiled_step", fused.foreach_step)
    problem, expected = (Problem([(9,), (4, 8)], "amsgrad", SINGLE, SINGLE) for _ in range(2))
    problem.params = [_OnGpu(param) for param in problem.params]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in (1, 2):
            problem.step(fused._gpu_step, t)
            expected.step(fused.foreach_step, t)
    assert [str(warning.message) for warning in caught] == [
        "ARSG runs without its GPU kernel: RuntimeError: 0 active drivers"
    ]
    assert all(torch.equal(x, y) for x, y in zip(problem.tensors(), expected.tensors(), strict=True))


class _OnGpu(torch.Tensor):
    """A tensor in main memory that says it is on a GPU."""

    @staticmethod
    def __new__(cls, tensor: torch.Tensor) -> _OnGpu:
        return torch.Tensor._make_subclass(cls, tensor)

    is_cuda = True  # type: ignore[assignment]


def test_on_a_gpu_the_kernel_is_what_nobody_has_to_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches foreach, with 96 bytes per parameter, where nothing was chosen."""
    group = {"foreach": None, "fused": None, "capturable": False, "lr": 0.1, "mu": 0.1}
    on_gpu = [SimpleNamespace(is_cpu=False, is_cuda=True, dtype=SINGLE)]
    monkeypatch.setattr(dispatch, "_default_to_fused_or_foreach", lambda *_, **__: (False, True))
    step = dispatch.step_function(group, hyper_of(), on_gpu)  # type: ignore[arg-type]
    assert step is fused.fused_step
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert dispatch.step_function(group, hyper_of(), on_gpu) is fused.foreach_step  # type: ignore[arg-type]
    scalar_on_gpu = {**group, "lr": torch.tensor(0.1)}
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    step = dispatch.step_function(scalar_on_gpu, hyper_of(), on_gpu)  # type: ignore[arg-type]
    assert step is dispatch.reference_step
