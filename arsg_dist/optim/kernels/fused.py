"""Update in one pass over memory: by a C++ kernel on CPU, a Triton kernel on GPUs.

CPU tensors go to `torch.ops.arsg_dist.update_` (cpu_library.py), compiled when the package is built. Those on CUDA and
ROCm go to the kernel of triton_kernel.py, and where that cannot run, as on other accelerators, to `foreach_step`
compiled by `torch.compile`. Where that is missing too `foreach_step` makes the update, and one warning per process says
what to do.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor

from arsg_dist.optim.hyperparameters import Hyperparameters, Steps, compute_dtype
from arsg_dist.optim.kernels import cpu_library, foreach
from arsg_dist.optim.kernels.eight_bit import EightBit
from arsg_dist.optim.kernels.foreach import foreach_step
from arsg_dist.optim.kernels.reference import reference_step
from arsg_dist.safe_io.processes import is_private

# One entry per combination of settings and tensor shapes: parameter groups, and ZeRO-3's sub-groups.
_RECOMPILE_LIMIT = 64

# What the kernel knows, in its order (csrc/fused_cpu.cpp).
_CPU_PRECONDITIONERS: Final = ("amsgrad", "adam", "none")
_CPU_MODES: Final = (
    "decoupled_weight_decay",
    "cautious_weight_decay",
    "bias_correction",
    "precondition_first",
    "maximize",
    "capturable",
)

_compiling_failed = False
_kernel_failed = False


def supports(hyper: Hyperparameters, params: list[Tensor]) -> bool:
    """Say whether `fused_step` implements these settings, for these tensors."""
    by_kernel = hyper.preconditioner in _CPU_PRECONDITIONERS and hyper.uses_only(_CPU_MODES)
    # What the kernel leaves goes to `foreach_step`, which also is what is compiled.
    return foreach.supports(hyper, params) and (by_kernel or not params[0].is_cpu)


def fused_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: Steps,
    *,
    hyper: Hyperparameters,
    corrections: Sequence[Tensor] = (),
    firsts: Sequence[int] = (),
) -> None:
    """Update all parameters in one pass over memory.

    See `StepFunction` for the arguments and `reference.arsg_update` for the rule.
    On CPU no temporary tensors are made, and the result depends neither on the number of threads nor on the
    CPU's instruction set. Parameters with gaps or overlaps in memory, or whose gradient or moments are laid
    out otherwise, are left to the reference implementation, and those whose gradient has another dtype to
    `foreach_step`. Inside `torch.compile` the multi-tensor definition is traced, which the compiler fuses.
    """
    if not params:
        return
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    if torch.compiler.is_compiling():
        foreach_step(*lists, steps, hyper=hyper, corrections=corrections, firsts=firsts)
    elif params[0].is_cpu:
        assert hyper.found_inf is None, "a host can read it"
        _cpu_step(*lists, steps, hyper=hyper, corrections=corrections, firsts=firsts)
    else:
        _gpu_step(*lists, steps, hyper=hyper, corrections=corrections, firsts=firsts)


def _cpu_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: Steps,
    *,
    hyper: Hyperparameters,
    corrections: Sequence[Tensor] = (),
    firsts: Sequence[int] = (),
) -> None:
    kernel, lists = cpu_kernel(), (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    if kernel is None or grads[0].dtype != params[0].dtype:
        foreach_step(*lists, steps, hyper=hyper, corrections=corrections, firsts=firsts)
        return
    moments: list[Any] = [exp_avgs, exp_avg_sqs, max_exp_avg_sqs]
    eight_bit = isinstance(exp_avgs[0], EightBit)
    left = kernel(
        params,
        grads,
        *([[moment.codes for moment in kept] for kept in moments] if eight_bit else moments),
        [int(step) for step in steps] if _needs_steps(exp_avgs, hyper) else [],
        preconditioner=_CPU_PRECONDITIONERS.index(hyper.preconditioner),
        lr=float(hyper.lr),
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        mu=float(hyper.mu),
        eps=hyper.eps,
        coupled_decay=0.0 if hyper.decoupled_weight_decay else hyper.weight_decay,
        decoupled_decay=hyper.weight_decay if hyper.decoupled_weight_decay else 0.0,
        opposed_decay=hyper.opposed_decay,
        gradient_factor=-float(hyper.gradient_factor) if hyper.maximize else float(hyper.gradient_factor),
        corrects_first=hyper.corrects_first,
        corrects_second=hyper.corrects_second,
        precondition_first=hyper.precondition_first,
        exponents=[moment.exponents for kept in moments for moment in kept] if eight_bit else [],
        corrections=list(corrections),
        firsts=list(firsts),
    )
    if left:
        x, g, m, v, v_hat, c = (
            [tensors[i] for i in left] if tensors else [] for tensors in (*lists, corrections)
        )
        reference_step(
            x, g, m, v, v_hat, cast(Steps, [steps[i] for i in left] if steps else []), hyper=hyper,
            corrections=c, firsts=[firsts[i] for i in left] if firsts else [],
        )  # fmt: skip


@cache
def cpu_kernel() -> Callable[..., list[int]] | None:
    """Return the compiled kernel, or warn once and return None where there is none that can be used."""
    try:
        cpu_library.register()
    except cpu_library.UnusableLibraryError as error:
        warnings.warn(
            f"ARSG runs without its CPU kernel, several times slower (foreach=True): {error}. Install arsg-dist's "
            "wheel, or build it where a C++20 compiler is (gcc 11 or newer): in its checkout, pip install "
            "--force-reinstall --no-deps .",
            stacklevel=2,
        )
        return None
    return cast(Callable[..., list[int]], torch.ops.arsg_dist.update_.default)


def _gpu_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: Steps,
    *,
    hyper: Hyperparameters,
    corrections: Sequence[Tensor] = (),
    firsts: Sequence[int] = (),
) -> None:
    global _kernel_failed
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    if params[0].is_cuda and not _kernel_failed:
        try:
            from arsg_dist.optim.kernels.triton_kernel import KernelUnavailableError, triton_step
        except ImportError:  # torch for GPUs brings Triton along, other builds may not
            _kernel_failed = True
        else:
            try:
                triton_step(*lists, steps, hyper=hyper, corrections=corrections, firsts=firsts)
                return
            except KernelUnavailableError as error:
                _kernel_failed = True
                warnings.warn(f"ARSG runs without its GPU kernel: {error}", stacklevel=2)
    if hyper.found_inf is not None:
        if bool(hyper.found_inf):
            return
        hyper = replace(hyper, found_inf=None)
    compiled_step(*lists, steps, hyper=hyper, corrections=corrections, firsts=firsts)


def compiled_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: Steps,
    *,
    hyper: Hyperparameters,
    corrections: Sequence[Tensor] = (),
    firsts: Sequence[int] = (),
) -> None:
    """Run `foreach_step` compiled by `torch.compile`, for tensors on accelerators.

    What changes between steps (α, μ, t) is handed over as tensors, so only a change of other settings, of
    shapes or of dtypes compiles anew. Nothing here synchronises with the device.
    """
    global _compiling_failed
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    # What has a form of its own is not compiled.
    if _compiling_failed or corrections or firsts or isinstance(exp_avgs[0], EightBit):
        foreach_step(*lists, steps, hyper=hyper, corrections=corrections, firsts=firsts)
        return
    device, dtype = params[0].device, compute_dtype(params[0].dtype)
    counters = _counters(steps, device, dtype) if _needs_steps(exp_avgs, hyper) else None
    lr, mu = _on_device(hyper.lr, device, dtype), _on_device(hyper.mu, device, dtype)
    settings = {name: getattr(hyper, name) for name in hyper.__slots__ if name not in ("lr", "mu")}
    if isinstance(hyper.gradient_factor, Tensor) or hyper.gradient_factor != 1:
        settings["gradient_factor"] = _on_device(hyper.gradient_factor, device, dtype)
    reason = _cache_of_others()
    if not reason:
        try:
            _compiled_update()(*lists, counters, lr, mu, settings)
            return
        except _compiler_errors() as error:
            reason = (
                f"torch.compile failed ({type(error).__name__}: {str(error).partition(chr(10))[0]}). It needs "
                "Triton and a C compiler on the compute nodes; TORCH_LOGS=dynamo tells more."
            )
    # Compiling comes before any tensor is touched, so the step can still be made another way; what fails later, such
    # as memory that is used up, has perhaps made a part of it.
    _compiling_failed = True
    warnings.warn(
        f"ARSG(fused=True) runs as foreach=True on {device.type}, in several passes over memory: {reason}",
        stacklevel=2,
    )
    foreach_step(*lists, steps, hyper=hyper)


@cache
def _cache_of_others() -> str:
    """Say why torch's directory for compiled code is not to be used; "" if it is.

    torch runs what it finds there.

    Another directory is the choice of the user, or of a program that calls `keep_compiled_code_private`.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    directory = Path(default_cache_dir())
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if chosen is not None and Path(chosen) != directory:
        return ""
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        private = is_private(directory)
    except OSError as error:
        return f"there is no directory for compiled code ({error}): set TORCHINDUCTOR_CACHE_DIR"
    return (
        ""
        if private
        else f"others may put code into {directory}, which would be run: set TORCHINDUCTOR_CACHE_DIR to a directory "
        "of your own"
    )


def _update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    counters: Tensor | None,
    lr: Tensor,
    mu: Tensor,
    settings: dict[str, Any],
) -> None:
    hyper = Hyperparameters(lr=lr, mu=mu, **settings)
    steps = [] if counters is None else list(counters.unbind())
    foreach_step(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, hyper=hyper)


@cache
def _compiled_update() -> Callable[..., None]:
    """Return `_update` compiled, with room for `_RECOMPILE_LIMIT` kinds of groups.

    Made at the first call: importing the compiler takes seconds, which nobody else should wait for.
    """
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = _RECOMPILE_LIMIT
        return cast(Callable[..., None], torch.compile(_update, **options))
    # Before torch 2.12 the limit was one for the whole process, and had another name before 2.7.
    import torch._dynamo.config as config

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    compiled = torch.compile(_update, **options)

    def limited(*arguments: Any) -> None:
        with cast(Any, config).patch(**{name: _RECOMPILE_LIMIT}):
            compiled(*arguments)

    return limited


@cache
def _compiler_errors() -> tuple[type[Exception], ...]:
    """Return what is raised while code is compiled, and not when it runs."""
    import torch._dynamo.exc as dynamo
    import torch._inductor.exc as inductor

    names = (
        (dynamo, "TorchDynamoException"),
        (dynamo, "FailOnRecompileLimitHit"),
        (inductor, "InductorError"),
    )
    return tuple(
        getattr(module, name) for module, name in names if hasattr(module, name)
    )  # before torch 2.7 not all


def _needs_steps(exp_avgs: list[Tensor], hyper: Hyperparameters) -> bool:
    few_bits = exp_avgs[0].dtype == torch.bfloat16 or isinstance(exp_avgs[0], EightBit)
    return hyper.preconditioner == "adam" or few_bits


def _counters(steps: Steps, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return t of every parameter, in one tensor on the device."""
    if isinstance(steps[0], Tensor):
        return torch.stack(cast(list[Tensor], steps)).to(dtype)
    return torch.tensor(steps, dtype=dtype).to(device, non_blocking=True)


def _on_device(value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a 0-dim tensor on the device."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype, non_blocking=True)
    return torch.full((), value, dtype=dtype, device=device)
