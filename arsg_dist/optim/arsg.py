"""Optimize with ARSG."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from arsg_dist.optim import convert
from arsg_dist.optim.base_iterate import base_iterate_point, moved_to_base_iterate, refuse_at_base_iterate
from arsg_dist.optim.hyperparameters import (
    EIGHT_BIT,
    LOOKAHEAD_BETA1_LIMIT,
    BiasCorrection,
    Hyperparameters,
    Preconditioner,
    compute_dtype,
)
from arsg_dist.optim.kernels.dispatch import has_triton, step_function
from arsg_dist.optim.kernels.eight_bit import EightBit
from arsg_dist.optim.kernels.fused import fused_step
from arsg_dist.optim.state import (
    TensorLists,
    count_step,
    keep_form,
    local,
    moment_dtype,
    needs_step,
    new_state,
    new_step,
    places_of,
    real,
    required,
    restore_loaded,
    shield_dtypes,
)


class ARSG(Optimizer):
    r"""Adaptive remote stochastic gradient method (Chen et al., arXiv 1905.01422).

    With the gradient g taken at the parameters x, element by element::

        g ← g + λx        m ← β1·m + (1−β1)·g        v ← β2·v + (1−β2)·g²        v̂ ← max(v̂, v, ε)
        x ← x − α·((1−μ)·m + μ·g) / √v̂

    The network is trained and evaluated at x: there is no train/eval switch. No bias correction in this mode.

    Args:
        params: parameters, named parameters, or parameter groups.
        lr: learning rate α; a float or a 1-element tensor.
        betas: decay rates (β1, β2) of the first and second moment.
        eps: ε. For "amsgrad" the floor of v̂, inside the root (1e-8: "fast mode", 1e-3: "fine mode", which
            generalizes better); for "adam" it is added to the root.
        weight_decay: λ, coupled (L2) unless `decoupled_weight_decay`.
        mu: observation factor μ in [0, 1); the observation distance is η = μβ1/(1−β1). A float or a 1-element
            tensor.
        preconditioner: "amsgrad" (ARSG: √v̂), "adam" (bias-corrected m and √v + ε) or "none" (RSG: 1).
        decoupled_weight_decay: x ← x(1 − αλ) instead of g ← g + λx.
        cautious_weight_decay: decoupled decay only of elements that the update does not move away from 0 (arXiv
            2510.12402); with `decoupled_weight_decay`.
        bias_correction: of preconditioner "adam", which moments are corrected for their start at 0: "both", "second"
            (as Simplified AdEMAMix) or "none".
        precondition_first: m averages g/√v̂, as LaProp, instead of g, which is divided afterwards.
        maximize: ascend instead of descend.
        foreach: multi-tensor kernels. None: if `fused` is None too, on accelerators without Triton.
        fused: one pass over memory per step. None: if `foreach` is None too, for plain tensors on CPU, CUDA, ROCm.
        capturable: step without synchronising with the device, for CUDA graphs and `torch.compile`.
        state_dtype: dtype of m, v and v̂: "float32", "bfloat16" (stochastically rounded, computed in float32), "8bit"
            (likewise, with one exponent per block of 2,048 elements; tensors of fewer than 4,096 stay in float32) or
            None: float32 for half-precision parameters, else the parameter's dtype. Takes effect where state is
            created or loaded.
        master: "split" keeps a float32 master of parameters in bfloat16 as the parameter and 16 bits more.
        lookahead_k: every k steps slow ← slow + a(x − slow), x ← slow. 0: off.
        lookahead_alpha: a in [0, 1].
        count_steps: keep the number of steps of each parameter as `state["step"]` where the update does not need it:
            for an optimizer around this one that reads it there.

    Raises:
        ValueError: a setting out of range, or contradicting settings.
        TypeError: a setting of the wrong kind.
    """

    _step_supports_amp_scaling = True
    """torch's GradScaler leaves unscaling, and skipping what overflowed, to `step`: `grad_scale` and `found_inf`."""
    _at_base_iterate = False
    _warned_of_lookahead = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.999, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        mu: float | Tensor = 0.1,
        preconditioner: Preconditioner = "amsgrad",
        decoupled_weight_decay: bool = False,
        cautious_weight_decay: bool = False,
        bias_correction: BiasCorrection = "both",
        precondition_first: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        state_dtype: torch.dtype | str | None = None,
        master: Literal["split"] | None = None,
        lookahead_k: int = 0,
        lookahead_alpha: float = 0.5,
        count_steps: bool = False,
    ) -> None:
        given = locals()
        defaults = {name: given.get(name, default) for name, default in _CLASS_DEFAULTS.items()}
        defaults.update(Hyperparameters.validated(defaults))
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: a setting out of range, or contradicting settings.
            TypeError: a setting of the wrong kind.
        """
        if isinstance(param_group, dict):
            param_group.update(Hyperparameters.validated({**self.defaults, **param_group}))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_forms(group)
        except ValueError:
            self.param_groups.pop()
            raise
        if (
            group["lookahead_k"] > 0
            and group["betas"][0] >= LOOKAHEAD_BETA1_LIMIT
            and not self._warned_of_lookahead
        ):
            self._warned_of_lookahead = True
            warnings.warn(
                f"lookahead is not recommended with beta1 = {group['betas'][0]} >= {LOOKAHEAD_BETA1_LIMIT}: "
                "the momentum built up over many steps is kept while the parameters are pulled back",
                stacklevel=2,
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults = {**_CLASS_DEFAULTS, **self.defaults}
        for group in self.param_groups:
            for name, value in _CLASS_DEFAULTS.items():
                group.setdefault(name, value)
            _check_forms(group)
            for param in group["params"]:
                if param in self.state:
                    restore_loaded(self.state[param], param, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by `state_dict`; see `torch.optim.Optimizer.load_state_dict`.

        Unlike torch's own method this keeps the precision of the state: moments get the dtype that the loaded
        groups' `state_dtype` asks for, whatever the parameter's.

        Raises:
            RuntimeError: inside `base_iterate`.
        """
        self._refuse_at_base_iterate("load_state_dict")
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: shield_dtypes(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one step on every parameter that has a gradient.

        Attributes that torch's GradScaler sets meanwhile, and others may: the gradients are divided by `grad_scale`
        and stay as they are, and where `found_inf` is not 0 nothing changes. Neither synchronises with a GPU where
        Triton is there and no steps are counted on the host (preconditioner "adam", bfloat16 state, lookahead).

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: for sparse gradients, inside `base_iterate`, if a parameter's state does not fit
                its group's settings, or in the capture of a CUDA graph without `capturable`.
        """
        self._refuse_at_base_iterate("step")
        _refuse_capture(self.param_groups)
        # torch.compile takes the error for a reason to run this as it is.
        if torch.compiler.is_compiling() and any(
            group["state_dtype"] == EIGHT_BIT or group["master"] for group in self.param_groups
        ):
            raise RuntimeError(
                "ARSG.step() with state_dtype='8bit' or master='split' is not for torch.compile: call it outside of "
                "what is compiled, where it is one pass over memory"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and not all(_skips_on_device(group) for group in self.param_groups):
            if found_inf.item():
                return loss
            found_inf = None
        for group in self.param_groups:
            self._step_group(group, grad_scale, found_inf)
        return loss

    def _step_group(
        self, group: dict[str, Any], grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        hyper = Hyperparameters.of_group(group)
        lists_of: dict[tuple[Any, ...], TensorLists] = {}
        stepped = []
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.layout != torch.strided:
                raise RuntimeError(f"ARSG does not support sparse gradients (got layout {param.grad.layout})")
            state = self.state[param]
            if len(state) == 0:
                state.update(new_state(param, group))
            if group["count_steps"] and not needs_step(group):
                state.setdefault("step", new_step(0, param, group["capturable"]))
            stepped.append((param, state))
            keep_form(state, param, group)
            counted = "step" in state or needs_step(group)
            if counted:
                count_step(state, param, group["capturable"])
            x, grad = real(local(param)), real(local(param.grad))
            exp_avg = local(required(state, "exp_avg"))
            key = (x.device, x.dtype, grad.dtype, exp_avg.dtype, isinstance(exp_avg, EightBit), counted)
            lists = lists_of.setdefault(key, TensorLists())
            lists.append(x, grad, state, hyper.preconditioner, places_of(param, group))
        if not stepped:
            return
        for lists in lists_of.values():
            if not lists.params:  # parts of nothing but padding
                continue
            if lists.counters and isinstance(lists.counters[0], Tensor):
                torch._foreach_add_(lists.counters, 1)
            step_function(group, hyper, lists.params)(
                lists.params,
                lists.grads,
                lists.exp_avgs,
                lists.exp_avg_sqs,
                lists.max_exp_avg_sqs,
                lists.steps,
                hyper=_with_scale(hyper, grad_scale, found_inf, lists.params[0].device),
                corrections=lists.corrections,
                firsts=lists.firsts if any(lists.firsts) else (),
            )
            if found_inf is not None and lists.counters:
                left_out = (found_inf != 0).to(lists.counters[0].device, torch.float32)
                torch._foreach_sub_(lists.counters, [left_out] * len(lists.counters))
        if group["lookahead_k"] > 0:
            for param, state in stepped:
                lookahead_(
                    local(param),
                    local(state["slow_param"]),
                    state["step"],
                    group["lookahead_k"],
                    group["lookahead_alpha"],
                )
        _record(group, hyper.lr * hyper.observation_distance)

    @classmethod
    def from_adam(cls, optimizer: Optimizer, *, keep_state: bool = True, **settings: Any) -> Self:
        """Make an ARSG from torch's Adam, AdamW or NAdam and its state.

        | of Adam | of ARSG |
        |---|---|
        | amsgrad=False | preconditioner="adam", same eps: with mu=0 the very same rule |
        | amsgrad=True | preconditioner="amsgrad", eps squared (a floor inside the root), no correction |
        | lr, betas, weight_decay (decoupled or not), maximize, capturable, foreach, fused | the same |
        | NAdam | preconditioner="adam", mu = 1 − β1, its limit for many steps |
        | not NAdam | mu = 0.1, the default; give mu=0 to go on as before |

        Args:
            optimizer: the source; it is left as it is.
            keep_state: copy the moments and step counts, else start afresh. They are transferred
                bias-corrected where the preconditioner applies no correction; v̂ starts at v where the source
                keeps no maximum.
            settings: ARSG's settings that override the mapping in every group, e.g. `mu`, `preconditioner`.

        Raises:
            TypeError: another kind of optimizer.
            ValueError: differentiable=True.
        """
        groups = convert.converted_groups(
            optimizer, lambda group: convert.adam_group(group, optimizer), settings
        )
        return cls._converted(optimizer, groups, convert.adam_state if keep_state else None)

    @classmethod
    def from_qhm(cls, optimizer: Optimizer, *, keep_state: bool = True, **settings: Any) -> Self:
        """Make an RSG (preconditioner "none") from a `qhoptim.pyt.QHM` and its state.

        lr is the same, β1 = momentum, μ = 1 − ν; weight_decay_type "grad" is the coupled, "direct" the
        decoupled weight decay. It is the same method: the trajectory goes on unchanged.

        Args:
            optimizer: the source; it is left as it is.
            keep_state: copy the momentum buffer, else start afresh.
            settings: ARSG's settings that override the mapping in every group.

        Raises:
            TypeError: another kind of optimizer.
            ValueError: ν = 0 (plain SGD), or state kept for another preconditioner.
        """
        groups = convert.converted_groups(optimizer, convert.qhm_group, settings)
        return cls._converted(optimizer, groups, convert.qhm_state if keep_state else None)

    @classmethod
    def from_adamw(cls, optimizer: Optimizer, *, keep_state: bool = True, **settings: Any) -> Self:
        """Make an ARSG that goes on as torch's Adam or AdamW: `from_adam` with μ = 0.

        The very same method, but with amsgrad=True, where it is the nearest: one correction of the moments at the
        start, ε inside the root. From there raise `mu`.

        Args:
            optimizer: the source; it is left as it is.
            keep_state: copy the moments and step counts, else start afresh.
            settings: ARSG's settings that override the mapping in every group.

        Raises:
            TypeError: another kind of optimizer, NAdam included (see `from_adam`).
            ValueError: differentiable=True.
        """
        if convert.is_nesterov(optimizer):
            raise TypeError("from_adamw takes torch's Adam or AdamW: for NAdam use from_adam")
        return cls.from_adam(optimizer, keep_state=keep_state, **{"mu": 0.0, **settings})

    @classmethod
    def from_sgd(cls, optimizer: Optimizer, *, keep_state: bool = True, **settings: Any) -> Self:
        """Make an RSG (preconditioner "none") that goes on as torch's SGD.

        | of SGD | of ARSG |
        |---|---|
        | momentum β, lr a | β1 = β, lr = a/(1−β): m is an average where SGD has a sum |
        | nesterov | μ = 1 − β1; else μ = 0 |
        | dampening d | lr = a(1−d)/(1−β) |
        | weight_decay, maximize, foreach | the same; SGD's decay is the coupled one |

        The very same method; with dampening only where the state is kept, for SGD does not dampen its first step.
        Learning rates that schedulers keep in the groups (`initial_lr`) are converted along.

        Args:
            optimizer: the source; it is left as it is.
            keep_state: copy the momentum buffer, else start afresh.
            settings: ARSG's settings that override the mapping in every group; lr is then ARSG's.

        Raises:
            TypeError: another kind of optimizer.
            ValueError: differentiable=True, dampening = 1, or state kept for another preconditioner.
        """
        convert.require_sgd(optimizer)
        groups = convert.converted_groups(optimizer, convert.sgd_group, settings)
        return cls._converted(optimizer, groups, convert.sgd_state if keep_state else None)

    @classmethod
    def from_qhadam(cls, optimizer: Optimizer, *, keep_state: bool = True, **settings: Any) -> Self:
        """Make an ARSG with preconditioner "adam" that goes on as `qhoptim.pyt.QHAdam`: μ = 1 − ν1.

        The very same method for ν2 = 1; lr, betas, eps, weight decay and its kind are the same.

        Args:
            optimizer: the source; it is left as it is.
            keep_state: copy the moments, else start afresh.
            settings: ARSG's settings that override the mapping in every group.

        Raises:
            TypeError: another kind of optimizer.
            ValueError: ν2 ≠ 1, which ARSG does not have, or ν1 outside (0, 1].
        """
        groups = convert.converted_groups(optimizer, convert.qhadam_group, settings)
        return cls._converted(optimizer, groups, convert.qhadam_state if keep_state else None)

    @classmethod
    def from_ademamix(
        cls,
        optimizer: Optimizer,
        *,
        momentum: convert.Momentum | None = None,
        keep_state: bool = True,
        **settings: Any,
    ) -> Self:
        """Make an ARSG with preconditioner "adam" that goes on as Simplified AdEMAMix (arXiv 2502.02431).

        Its update is (m + a·g)/(√v + ε), with a weight a (`alpha`) of the gradient beside the momentum, of which only v
        is corrected for its start at 0: `bias_correction="second"`.

        | of Simplified AdEMAMix | of ARSG |
        |---|---|
        | m ← β1·m + g (the authors': momentum="sum") | μ/(1−μ) = a(1−β1), lr·(1−μ)(1−β1) = theirs |
        | m ← β1·m + (1−β1)·g (pytorch_optimizer's: "average") | μ/(1−μ) = a, lr·(1−μ) = theirs |
        | betas, eps, decoupled weight decay | the same; λ such that lr·λ is theirs |

        The very same method as in the paper. pytorch_optimizer's `SimplifiedAdEMAMix` corrects v the other way round in
        its first steps, until β2ᵗ has faded; from there on it is the same.

        Args:
            optimizer: the source; it is left as it is.
            momentum: how it keeps m; None: known from the name of its class.
            keep_state: copy the moments, else start afresh.
            settings: ARSG's settings that override the mapping in every group; lr is then ARSG's.

        Raises:
            TypeError: another kind of optimizer, AdEMAMix with two averages included.
            ValueError: an unknown kind of momentum, a warm-up of β1 that is not over, decay that does not follow the
                learning rate.
        """
        kind = convert.ademamix_momentum(optimizer, momentum)
        groups = convert.converted_groups(
            optimizer, lambda group: convert.ademamix_group(group, kind, optimizer), settings
        )

        def state(of: dict[str, Any], source: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
            return convert.ademamix_state(of, source, target, kind)

        return cls._converted(optimizer, groups, state if keep_state else None)

    @classmethod
    def _converted(
        cls,
        optimizer: Optimizer,
        groups: list[dict[str, Any]],
        convert_state: Callable[..., dict[str, Any]] | None,
    ) -> Self:
        converted = cls(groups)
        if convert_state is not None:
            for source, group in zip(optimizer.param_groups, converted.param_groups, strict=True):
                for param in group["params"]:
                    if optimizer.state.get(param):
                        state = converted.state[param]
                        state.update(new_state(param, group))
                        convert.fill_state(state, convert_state(optimizer.state[param], source, group))
        return converted

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the maximum: v̂ ← max(v, ε), where the preconditioner is "amsgrad".

        Also rebuilds a `max_exp_avg_sq` that a checkpoint lost.
        """
        for group in self.param_groups:
            if group["preconditioner"] != "amsgrad":
                continue
            hyper = Hyperparameters.of_group(group)
            for param in group["params"]:
                state = self.state.get(param)
                if not state:
                    continue
                v = required(state, "exp_avg_sq")
                v_hat = state.setdefault("max_exp_avg_sq", torch.zeros_like(v))
                floor = hyper.floor(compute_dtype(param.dtype))
                real(local(v_hat)).copy_(real(local(v)).clamp(min=floor))

    @contextmanager
    def base_iterate(self) -> Iterator[None]:
        """Move the parameters to the base iterate θ, and back to x on leaving.

        θ = x + α·η·m/√v̂ with η = μβ1/(1−β1), and with the α, η of the last step (the denominator is the
        preconditioner's). Leaving, also by an exception, restores x bit by bit; this costs one copy of the
        parameters. Parameters never stepped stay where they are. An option for evaluation, never required.

        Raises:
            RuntimeError: nested use, or `step` or `load_state_dict` inside.
        """

        def point(param: Tensor, group: dict[str, Any]) -> Tensor | None:
            state = self.state.get(param)
            return base_iterate_point(local(param), state, group) if state else None

        with moved_to_base_iterate(self, point):
            yield

    def _refuse_at_base_iterate(self, what: str) -> None:
        refuse_at_base_iterate(self._at_base_iterate, what)


_CLASS_DEFAULTS = {
    **{
        name: parameter.default
        for name, parameter in inspect.signature(ARSG.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    },
    # Not a setting: α·η of the last step, for base_iterate(); here so that it is saved and loaded.
    "base_iterate_scale": 0.0,
}
"""What a group holds; also what one saved before a setting existed is taken to mean."""


def _refuse_capture(groups: list[dict[str, Any]]) -> None:
    """Refuse a CUDA graph of an update whose numbers are the host's; torch's own check is private, and was renamed."""
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return
    if torch.cuda.is_current_stream_capturing() and not all(group["capturable"] for group in groups):
        raise RuntimeError("the update of a CUDA graph needs ARSG(..., capturable=True), in every group")


def _check_forms(group: dict[str, Any]) -> None:
    """Refuse forms of state that a group's parameters cannot have.

    Raises:
        ValueError: with the reason.
    """
    for param in group["params"]:
        if group["state_dtype"] == EIGHT_BIT:
            moment_dtype(param, EIGHT_BIT)
        if group["master"] == "split" and param.dtype != torch.bfloat16:
            raise ValueError(
                f"master='split' is for parameters in bfloat16, not {param.dtype}: make the model bfloat16, or leave "
                "it out"
            )


def _skips_on_device(group: dict[str, Any]) -> bool:
    """Say whether a group's update can be left out by the device alone: by the GPU's kernel, and without a count."""
    params = [real(local(param)) for param in group["params"] if param.grad is not None]
    if not params:
        return True
    counted = (needs_step(group) or group["count_steps"]) and not group["capturable"]
    if counted or group["lookahead_k"] > 0 or not all(param.is_cuda for param in params):
        return False
    return has_triton() and step_function(group, Hyperparameters.of_group(group), params) is fused_step


def _with_scale(
    hyper: Hyperparameters, grad_scale: Tensor | None, found_inf: Tensor | None, device: torch.device
) -> Hyperparameters:
    """Add what a GradScaler asks of a step."""
    if grad_scale is None and found_inf is None:
        return hyper
    factor: float | Tensor = 1.0
    if grad_scale is not None:
        inverse = grad_scale.double().reciprocal().float()  # as GradScaler's own unscaling
        factor = inverse.item() if device.type == "cpu" else inverse.to(device, non_blocking=True)
    if found_inf is not None:
        found_inf = found_inf.to(device, dtype=torch.float32, non_blocking=True)
    return replace(hyper, gradient_factor=factor, found_inf=found_inf)


def _record(group: dict[str, Any], base_iterate_scale: float | Tensor) -> None:
    """Record α·η of this step; in place where a captured graph finds a tensor."""
    recorded = group["base_iterate_scale"]
    if not isinstance(base_iterate_scale, Tensor):
        group["base_iterate_scale"] = base_iterate_scale
    elif isinstance(recorded, Tensor):
        recorded.copy_(base_iterate_scale)
    else:
        group["base_iterate_scale"] = base_iterate_scale.clone()


def lookahead_(param: Tensor, slow_param: Tensor, step: int | Tensor, k: int, alpha: float) -> None:
    """Pull back every k steps: slow ← slow + a(x − slow), x ← slow. In place.

    Args:
        param: x, any dtype.
        slow_param: the slow copy, of the same shape, in the computing dtype.
        step: steps taken so far; a 0-dim tensor is never read on the host.
        k: period, > 0.
        alpha: a in [0, 1].
    """
    if isinstance(step, Tensor):
        due = step % k == 0
        slow_param.copy_(torch.where(due, slow_param.lerp(param.to(slow_param.dtype), alpha), slow_param))
        param.copy_(torch.where(due, slow_param.to(param.dtype), param))
    elif step % k == 0:
        slow_param.lerp_(param.to(slow_param.dtype), alpha)
        param.copy_(slow_param)
