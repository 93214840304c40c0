"""Moments in 8 bits and split masters: what is stored, the kernels' bits, and what becomes of a run."""

from __future__ import annotations

import copy
import io
from itertools import chain, product
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arsg_dist import ARSG
from arsg_dist.optim.kernels import fused
from arsg_dist.optim.kernels.eight_bit import BLOCK, NOT_FINITE, SLOTS, EightBit
from arsg_dist.optim.kernels.foreach import foreach_step
from arsg_dist.optim.kernels.reference import reference_step
from arsg_dist.optim.kernels.split_master import joined, split
from arsg_dist.optim.state import EIGHT_BIT_FROM, MOMENTS
from tests.optim.kernels.test_fused import Problem, needs_kernel
from tests.optim.kernels.test_triton import CAUTIOUS, interpreted
from tests.optim.optim_paths import (
    CAPTURABLE,
    FOREACH,
    FUSED,
    REFERENCE,
    Path,
    assert_close,
    params_of,
    run,
)

__all__ = ["interpreted"]  # a fixture

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
M, V, V_HAT = SLOTS.values()
QUICK = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
# Around one block and two, none, one, a scalar, several dimensions.
SHAPES = [(131,), (7, 5), (0,), (1,), (), (2048,), (4500,)]


def spread(shape: tuple[int, ...], seed: int, octaves: float = 12.0) -> torch.Tensor:
    """Numbers of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(shape, generator=generator) * octaves - octaves
    return torch.randn(shape, generator=generator) * torch.exp2(sizes)


def moment(value: torch.Tensor, slot: int, step: int | None = None) -> EightBit:
    made = EightBit.zeros_like(value, slot)
    made.store(value, step)
    return made


def stored(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.codes, tensor.exponents] if isinstance(tensor, EightBit) else [tensor]


def assert_same(ours: Any, theirs: Any) -> None:
    """Bits of tensors, every NaN the same; of moments in 8 bits those that are kept."""
    for actual, expected in zip(ours, theirs, strict=True):
        for x, y in zip(stored(actual), stored(expected), strict=True):
            assert (x.dtype, x.stride()) == (y.dtype, y.stride())
            assert torch.equal(torch.nan_to_num(x, nan=7.0), torch.nan_to_num(y, nan=7.0)), (x.shape, x.dtype)


@pytest.mark.parametrize("slot", [M, V, V_HAT])
@pytest.mark.parametrize("scale", [2.0**-80, 1e-20, 1.0, 1e30])
def test_neighbours_are_near_and_a_stored_number_is_stored_again_exactly(slot: int, scale: float) -> None:
    """Catches a number rounded again when its block is loaded, and spacings other than those that are stated."""
    value = spread((3 * BLOCK + 5,), 1) * scale
    value = value if slot == M else value.abs()
    first = moment(value, slot, 5)
    kept = first.float32()
    second = moment(kept, slot, 6)
    assert torch.equal(second.float32(), kept)
    assert torch.equal(moment(kept.bfloat16().float() * 0 + kept, slot).float32(), kept), "to nearest neither"
    for x, y in zip(value.split(BLOCK), kept.split(BLOCK), strict=True):
        largest = x.abs().max()
        spacing = largest * (x.abs() / largest) ** 0.75 * (8 / (127 if slot == M else 255)) + largest * 4e-7
        assert ((y - x).abs() <= 1.3 * spacing + 2.0**-120).all()
        assert y.abs().max() >= largest * 0.93
    assert torch.equal(value.sign() * kept.abs(), kept)


@pytest.mark.parametrize("slot", [M, V])
def test_rounding_is_unbiased(slot: int) -> None:
    """Catches rounding to nearest, which freezes m, and probabilities of one direction only, which let it drift."""
    value = torch.full((BLOCK,), 0.37)
    value[0] = 1.0
    if slot == M:
        value[1::2] *= -1
    mean = torch.stack([moment(value, slot, t).float32() for t in range(1, 201)]).double().mean(0)
    # 4 standard deviations of the mean over all elements; spacing at 0.37 is at most 0.05 (m).
    assert abs((mean[2:].abs() - 0.37).mean()) < 4 * 0.05 / 2 / (200 * BLOCK) ** 0.5
    assert (mean[2:].abs() - 0.37).abs().max() < 0.01, "an element of its own"


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_is_never_finite_afterwards(bad: float) -> None:
    """Catches an infinity stored as the largest number: a run that diverged would go on."""
    value = torch.ones(2 * BLOCK)
    value[3] = bad
    made = moment(value, M, 1)
    assert made.float32()[:BLOCK].isnan().all()
    assert (made.float32()[BLOCK:] == 1).all()
    assert made.exponents.tolist()[0] == NOT_FINITE


gradients_of_steps = st.lists(
    st.tuples(st.integers(0, 2**31), st.floats(-8, 8), st.floats(0, 20)), min_size=2, max_size=6
)


@QUICK
@given(
    steps=gradients_of_steps,
    numel=st.integers(1, 2 * BLOCK + 3),
    beta2=st.sampled_from([0.0, 0.9, 0.99]),
    eps=st.sampled_from([0.0, 1e-8, 1e-3]),
    by_kernel=st.booleans(),
)
def test_the_stored_maximum_never_falls_and_is_never_below_the_true_one(
    steps: Any, numel: int, beta2: float, eps: float, by_kernel: bool
) -> None:
    """Catches v̂ rounded to nearest, and a block whose exponent rises past its elements: steps would grow."""
    implementation = fused.fused_step if by_kernel and fused.cpu_kernel() is not None else reference_step
    problem = EightBitProblem([(numel,)], "amsgrad", SINGLE)
    v_hat = problem.moments[2][0]
    before = v_hat.float32()
    for t, (seed, size, octaves) in enumerate(steps, 1):
        v = problem.moments[1][0].float32()
        grad = spread((numel,), seed, octaves) * 2.0**size
        problem.step(implementation, t, grads=[grad], beta2=beta2, eps=eps)
        now = v_hat.float32()
        # Of the update itself, with what it read.
        true = torch.maximum(before, beta2 * v + ((1 - beta2) * grad) * grad)
        assert (now >= before).all()
        assert (now >= true * (1 - 1e-6)).all()
        assert (now >= eps * (1 - 1e-6)).all()
        before = now


class EightBitProblem(Problem):
    """A problem whose moments are in 8 bits."""

    def __init__(self, shapes: Any, mode: str, dtype: torch.dtype, *, master: str | None = None) -> None:
        super().__init__(shapes, mode, dtype, SINGLE)
        for slot in range(len(MOMENTS[mode])):
            self.moments[slot] = [EightBit.zeros_like(p, slot) for p in self.params]
        self.corrections = (
            [torch.full_like(p, 1234, dtype=torch.int16) for p in self.params] if master == "split" else []
        )
        self.firsts: list[int] = []

    def step(self, implementation: Any, t: int, grads: Any = None, **changes: Any) -> None:
        if grads is None:
            grads = [spread(tuple(p.shape), 100 * t + i).to(self.dtype) for i, p in enumerate(self.params)]
        super().step(
            lambda *lists, **hyper: implementation(
                *lists, **hyper, corrections=self.corrections, firsts=self.firsts
            ),
            t,
            grads,
            **changes,
        )

    def tensors(self) -> list[torch.Tensor]:
        return list(chain(self.params, *self.moments, self.corrections))


SETTINGS = [
    ("amsgrad", SINGLE, None, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("amsgrad", BRAIN, "split", {"weight_decay": 0.1, "maximize": True}),
    ("amsgrad", HALF, None, {"eps": 1e-3}),
    ("adam", SINGLE, None, {"bias_correction": "second", **CAUTIOUS}),
    ("adam", BRAIN, "split", {"precondition_first": True, "bias_correction": "none", "maximize": True}),
    ("amsgrad", SINGLE, None, {"precondition_first": True, **CAUTIOUS}),
    ("none", BRAIN, "split", {"weight_decay": 0.1}),
    ("none", BRAIN, None, {}),
]


@needs_kernel
@pytest.mark.parametrize(("mode", "dtype", "master", "changes"), SETTINGS)
def test_the_gpu_kernel_has_the_bits_of_the_cpu_kernel(
    interpreted: ModuleType, mode: str, dtype: torch.dtype, master: str | None, changes: dict[str, Any]
) -> None:
    """Catches another order of operations, hash, block or exponent: a run that moves between devices would part."""
    pytest.importorskip("triton")
    ours, theirs = (EightBitProblem(SHAPES, mode, dtype, master=master) for _ in range(2))
    ours.firsts = theirs.firsts = [0, 5, 7, 11, 3, 2**33 + 1, 4096]
    for t in (1, 70_001):
        ours.step(interpreted.triton_step, t, **changes)
        theirs.step(fused.fused_step, t, **changes)
        assert_same(ours.tensors(), theirs.tensors())


@needs_kernel
@pytest.mark.parametrize(("mode", "dtype", "master", "changes"), SETTINGS)
def test_the_cpu_kernel_makes_the_references_update(
    mode: str, dtype: torch.dtype, master: str | None, changes: dict[str, Any]
) -> None:
    """Catches a setting, a moment or a correction that one of them leaves out; what they store, bit by bit.

    With all rates 0 the moments are g and g² exactly, so every stored bit must agree; then a few updates.
    """
    exact, expected = (
        EightBitProblem([(5000,), (3, 7, 9, 31)], mode, dtype, master=master) for _ in range(2)
    )
    for problem, implementation in ((exact, fused.fused_step), (expected, reference_step)):
        grads = [torch.round(spread(tuple(p.shape), 5, 6.0) * 64).to(dtype) / 8 for p in problem.params]
        problem.step(implementation, 3, grads=grads, beta1=0.0, beta2=0.0, lr=0.0)
    assert_same(chain(*exact.moments), chain(*expected.moments))
    ours, theirs = (EightBitProblem(SHAPES, mode, dtype, master=master) for _ in range(2))
    third = EightBitProblem(SHAPES, mode, dtype, master=master)
    for t in (1, 2):
        ours.step(fused.fused_step, t, **changes)
        theirs.step(reference_step, t, **changes)
        third.step(foreach_step, t, **changes)
    for x, y, z in zip(ours.params, theirs.params, third.params, strict=True):
        assert_close(x, y, 1e-4 if dtype == SINGLE else 2**-7)
        assert_close(z, y, 1e-4 if dtype == SINGLE else 2**-7)
    for slot in range(len(MOMENTS[mode])):
        for x, y in zip(ours.moments[slot], theirs.moments[slot], strict=True):
            # Equal but for elements whose float32 value differs in the last bit, next to a random threshold.
            different = (x.codes != y.codes).float().mean() if x.numel() else 0.0
            assert different < 0.01


@needs_kernel
def test_layouts(interpreted: ModuleType) -> None:
    """Catches blocks counted in another order than that of memory, and a parameter with gaps written past its codes."""
    results = []
    for implementation in (fused.fused_step, interpreted.triton_step, reference_step):
        problem = EightBitProblem([(3, 8, 25, 9)], "amsgrad", SINGLE)
        problem.params[0] = problem.params[0].contiguous(memory_format=torch.channels_last)
        problem.params.append(torch.zeros(80)[::2])
        for slot in range(3):
            problem.moments[slot] = [EightBit.zeros_like(p, slot) for p in problem.params]
        grads = [spread(tuple(p.shape), 8) for p in problem.params]
        grads[0] = grads[0].contiguous(memory_format=torch.channels_last)
        problem.step(implementation, 1, grads=grads)
        results.append(problem)
    assert results[0].moments[0][0].stride() == results[0].params[0].stride()
    for slot in range(3):
        for i in range(2):
            assert_same([results[1].moments[slot][i]], [results[0].moments[slot][i]])
            assert_close(results[2].moments[slot][i].float32(), results[0].moments[slot][i].float32(), 0.07)


@needs_kernel
def test_threads_share_whole_blocks() -> None:
    """Catches a block that two threads update, each with an exponent for its part."""
    results = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            problem = EightBitProblem([(50_003,), (9,), (40_000,)], "amsgrad", SINGLE)
            for t in (1, 2):
                problem.step(fused.fused_step, t)
        finally:
            torch.set_num_threads(before)
        results.append(problem.tensors())
    assert_same(*results)


# The optimizer

TENSORS = [(EIGHT_BIT_FROM + 500,), (8, 16, 7, 7), (10,)]


def gradients(count: int, dtype: torch.dtype = SINGLE, seed: int = 0) -> list[list[torch.Tensor]]:
    return [
        [spread(shape, 1000 * seed + 10 * t + i, 4.0).to(dtype) for i, shape in enumerate(TENSORS)]
        for t in range(count)
    ]


def trained(
    count: int = 4, dtype: torch.dtype = SINGLE, **choice: Any
) -> tuple[ARSG, list[torch.nn.Parameter]]:
    params = [torch.nn.Parameter(spread(shape, 77 + i, 2.0).to(dtype)) for i, shape in enumerate(TENSORS)]
    optimizer = ARSG(params, lr=0.01, **choice)
    run(optimizer, params, gradients(count, dtype))
    return optimizer, params


def resumed(
    saved: Any, params: list[torch.nn.Parameter], **choice: Any
) -> tuple[ARSG, list[torch.nn.Parameter]]:
    copies = [torch.nn.Parameter(x.detach().clone()) for x in params]
    optimizer = ARSG(copies, lr=0.01, **choice)
    optimizer.load_state_dict(saved)
    return optimizer, copies


@pytest.mark.parametrize(
    ("dtype", "choice"),
    [
        (SINGLE, {"state_dtype": "8bit"}),
        (SINGLE, {"state_dtype": "8bit", "preconditioner": "adam"}),
        (BRAIN, {"state_dtype": "8bit", "master": "split"}),
        (BRAIN, {"state_dtype": "bfloat16", "master": "split", "preconditioner": "none"}),
        (BRAIN, {"master": "split"}),
        (HALF, {"state_dtype": "8bit", "lookahead_k": 2, "betas": (0.9, 0.99)}),
    ],
)
@pytest.mark.parametrize("path", params_of(REFERENCE, FUSED, FOREACH, CAPTURABLE))
def test_a_run_goes_on_from_a_file_or_a_copy(path: Path, dtype: torch.dtype, choice: dict[str, Any]) -> None:
    """Catches anything lost, rounded again or shared with the original; a file that only this library reads."""
    choice = choice | path.settings
    straight, params = trained(dtype=dtype, **choice)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    kept = [
        type(v) for entry in saved["state"].values() for v in entry.values() if isinstance(v, torch.Tensor)
    ]
    assert set(kept) == {torch.Tensor}, "plain tensors"
    copied = copy.deepcopy(straight)
    runs = [(straight, params), resumed(saved, params, **choice), (copied, copied.param_groups[0]["params"])]
    for optimizer, parameters in runs:
        eight_bit = choice.get("state_dtype") == "8bit"
        kinds = [isinstance(optimizer.state[p]["exp_avg"], EightBit) for p in parameters]
        assert kinds == [eight_bit, eight_bit, False], "small tensors stay as they are"
        run(optimizer, parameters, gradients(3, dtype, seed=1))
    for optimizer, parameters in runs[1:]:
        assert_same(parameters, params)
        for x, y in zip(parameters, params, strict=True):
            names = [name for name in straight.state[y] if isinstance(straight.state[y][name], torch.Tensor)]
            assert_same(
                [optimizer.state[x][name] for name in names], [straight.state[y][name] for name in names]
            )


@pytest.mark.parametrize("before", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("after", ["float32", "bfloat16", "8bit"])
def test_state_changes_its_form_at_a_reload(before: str, after: str) -> None:
    """Catches codes taken for values, or a moment left in its old form, when a run changes to 8 bits or back."""
    straight, params = trained(state_dtype=before)
    saved = straight.state_dict()
    saved["param_groups"][0]["state_dtype"] = after
    optimizer, copies = resumed(saved, params)
    for x, y in zip(copies, params, strict=True):
        for name in MOMENTS["amsgrad"]:
            value, source = optimizer.state[x][name], straight.state[y][name]
            wanted = after == "8bit" and x.numel() >= EIGHT_BIT_FROM
            assert isinstance(value, EightBit) == wanted
            assert wanted or value.dtype == getattr(torch, "float32" if after == "8bit" else after)
            source = source.float32() if isinstance(source, EightBit) else source.float()
            value = value.float32() if isinstance(value, EightBit) else value.float()
            assert_close(value, source, 0.04 if after == "8bit" else 2**-8)
    run(optimizer, copies, gradients(1, seed=2))


def test_what_cannot_be_is_refused_by_name() -> None:
    """Catches a setting that is taken and ignored, and a group that a refusal leaves behind."""
    for params, choice, message in [
        ([torch.zeros(3, dtype=torch.float64)], {"state_dtype": "8bit"}, "8bit.*float64"),
        ([torch.zeros(3, dtype=torch.complex64)], {"state_dtype": "8bit"}, "8bit.*complex64"),
        ([torch.zeros(3)], {"master": "split"}, "bfloat16, not torch.float32"),
        ([torch.zeros(3, dtype=BRAIN)], {"master": "whole"}, "must be None or 'split'"),
        ([torch.zeros(3, dtype=BRAIN)], {"master": "split", "lookahead_k": 2}, "lookahead_k"),
        ([torch.zeros(3)], {"state_dtype": "4bit"}, "8bit"),
    ]:
        with pytest.raises(ValueError, match=message):
            ARSG(params, **choice)
    optimizer = ARSG([torch.zeros(3, dtype=BRAIN)], master="split")
    with pytest.raises(ValueError, match=r"bfloat16, not torch\.float32"):
        optimizer.add_param_group({"params": [torch.zeros(3)]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group(
        {"params": [torch.nn.Parameter(torch.zeros(5000))], "master": None, "state_dtype": "8bit"}
    )
    added = optimizer.param_groups[1]["params"][0]
    added.grad = torch.ones(5000)
    optimizer.step()
    assert isinstance(optimizer.state[added]["exp_avg"], EightBit)


@pytest.mark.parametrize("path", params_of(REFERENCE, FUSED))
def test_moments_that_others_put_there_are_brought_into_form(path: Path) -> None:
    """Catches an engine's float32 moments kept as they are: the memory would be four times what was asked for."""
    optimizer, params = trained(state_dtype="8bit", **path.settings)
    wanted, other_params = trained(state_dtype="8bit", **path.settings)
    for name in MOMENTS["amsgrad"]:
        optimizer.state[params[0]][name] = optimizer.state[params[0]][name].float32()
    run(optimizer, params, gradients(1, seed=3))
    run(wanted, other_params, gradients(1, seed=3))
    assert isinstance(optimizer.state[params[0]]["max_exp_avg_sq"], EightBit)
    assert_same(params, other_params)


# Split masters


@QUICK
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50))
def test_parameter_and_correction_are_the_master_exactly(patterns: list[int]) -> None:
    """Catches a bit lost, a carry into the exponent that is not taken back, and truncation in place of rounding."""
    master = torch.tensor([*patterns, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0], dtype=torch.int64)
    master = master.to(torch.int32).view(SINGLE)
    param, correction = torch.empty_like(master, dtype=BRAIN), torch.empty_like(master, dtype=torch.int16)
    split(param, correction, master)
    assert_same([joined(param, correction)], [master])
    nearest = master.bfloat16()
    halfway = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(param[~halfway & ~master.isnan()], nearest[~halfway & ~master.isnan()])
    assert (param[halfway].float().abs() >= master[halfway].abs())[~master[halfway].isnan()].all()


@pytest.mark.parametrize("path", params_of(REFERENCE, FOREACH, FUSED, CAPTURABLE))
def test_a_split_master_moves_as_a_float32_one(path: Path) -> None:
    """Catches updates below half of bfloat16's spacing that are lost, and an update computed from the rounded x."""
    optimizer, params = trained(30, BRAIN, master="split", **path.settings)
    masters = [
        torch.nn.Parameter(spread(shape, 77 + i, 2.0).to(BRAIN).float()) for i, shape in enumerate(TENSORS)
    ]
    other = ARSG(masters, lr=0.01, **path.settings)
    run(other, masters, [[g.float() for g in grads] for grads in gradients(30, BRAIN)])
    for param, master in zip(params, masters, strict=True):
        assert_same([joined(param.detach(), optimizer.state[param]["correction"])], [master.detach()])


# Memory


def bytes_per_parameter(dtype: torch.dtype, **choice: Any) -> float:
    """Of parameter, gradient and state of a tensor of a million elements, counted from what is kept."""
    param = torch.nn.Parameter(torch.zeros(1_000_000, dtype=dtype))
    param.grad = torch.zeros_like(param)
    optimizer = ARSG([param], **choice)
    optimizer.step()
    tensors = [
        param,
        param.grad,
        *(v for v in optimizer.state[param].values() if isinstance(v, torch.Tensor)),
    ]
    return sum(part.nbytes for tensor in tensors for part in stored(tensor)) / param.numel()


MOMENT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1.0}


@pytest.mark.parametrize(("state_dtype", "preconditioner"), [*product(MOMENT_BYTES, MOMENTS)])
def test_bytes_per_parameter(state_dtype: str, preconditioner: str) -> None:
    """Catches a copy that is kept beside, as of what was loaded or of a master."""
    moments = len(MOMENTS[preconditioner]) * MOMENT_BYTES[state_dtype]
    for dtype, master, others in ((SINGLE, None, 8), (BRAIN, None, 4), (BRAIN, "split", 6)):
        found = bytes_per_parameter(
            dtype, state_dtype=state_dtype, preconditioner=preconditioner, master=master
        )
        assert found == pytest.approx(others + moments, abs=0.002)
