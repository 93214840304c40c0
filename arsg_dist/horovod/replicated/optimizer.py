"""Replicate an optimizer over Horovod's ranks."""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch.compression import Compression
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from arsg_dist.horovod.comm.environment import check_world_size
from arsg_dist.horovod.comm.interface import HorovodOptimizer, check_passes
from arsg_dist.horovod.comm.settings_check import same_settings
from arsg_dist.horovod.replicated.exchange import Exchange, ExchangeSettings, build_exchange
from arsg_dist.optim.by_name import OURS

_PICKLED = "_horovod_exchange"


def DistributedOptimizer(  # noqa: N802  # the name Horovod's users know
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: Any = hvd.Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | list[list[Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: Any = hvd.global_process_set,
) -> "ReplicatedOptimizer":
    """Wrap an optimizer so that `step()` uses the gradient averaged over all ranks.

    The arguments are those of `hvd.DistributedOptimizer` (Horovod 0.28.1), and the result is used in the same way. It
    shares parameter groups and state with `optimizer`: a trained optimizer goes on where it is. An earlier one of the
    same parameters has ended then.

    Args:
        optimizer: `ARSG`, `RemoteObservation`, or any of torch's.
        named_parameters: (name, parameter) of at least the optimizer's parameters, usually
            `model.named_parameters()`; the names must be the same on every rank. None: numbered.
        compression: of the gradients on their way, e.g. `hvd.Compression.fp16`. bfloat16 gradients that it leaves as
            they are travel in float32.
        backward_passes_per_step: gradients are summed over as many backward passes before they are sent.
        op: `hvd.Average`, `hvd.Sum` or `hvd.Adasum`.
        gradient_predivide_factor: with Average, divide by it before the sum and multiply by it afterwards.
        num_groups: older name of `groups` as a number.
        groups: gradients that travel together: how many groups to make, or lists of parameters.
        sparse_as_dense: send sparse gradients as dense ones; ARSG and RemoteObservation also get them dense.
        process_set: ranks that work together.

    Returns:
        An instance of a class that is both `ReplicatedOptimizer` and `type(optimizer)`.

    Raises:
        ValueError: Horovod is not initialised or has another number of ranks than the launcher; names missing or
            repeated; settings out of range or contradicting each other.
        TypeError: an argument of the wrong kind, or an optimizer that is wrapped already.
    """
    check_world_size(whole_job=False)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, ReplicatedOptimizer) or hasattr(optimizer, "skip_synchronize"):
        raise TypeError("optimizer is wrapped for Horovod already; wrap the optimizer inside it, once")
    settings = ExchangeSettings(
        compression=compression,
        backward_passes_per_step=backward_passes_per_step,
        op=op,
        gradient_predivide_factor=gradient_predivide_factor,
        groups=groups if groups is not None else num_groups,
        sparse_as_dense=sparse_as_dense,
        process_set=process_set,
    )
    if op == hvd.Adasum and isinstance(optimizer, LBFGS):
        raise ValueError("op=hvd.Adasum does not go with LBFGS, whose ranks would each search their own way")
    names = _checked_names(optimizer, named_parameters)
    inner: Any = type(optimizer)
    wrapped = _replicated_class(inner)
    replicated = wrapped.__new__(wrapped)
    # Shared, not rebuilt from param_groups: rebuilding would drop the state, and run an __init__ that may want more.
    # A `step` of the instance is a scheduler's, bound to the class without an exchange.
    replicated.__dict__.update({key: value for key, value in vars(optimizer).items() if key != "step"})
    replicated._given = optimizer
    replicated._join(settings, names)
    return replicated


class ReplicatedOptimizer(HorovodOptimizer):
    """Add to an optimizer's class what `DistributedOptimizer` promises.

    `torch.save` and `copy.deepcopy` work. The copy exchanges gradients as well if Horovod is initialised where it is
    unpickled and neither `groups` nor a `process_set` were given; otherwise its `step()` says that it does not.
    """

    _settings: ExchangeSettings | None = None
    _exchange: Exchange | None = None
    _given: Any = None
    _names: dict[Tensor, str]
    _passes: int
    _connected: set[Tensor]
    _synchronized = False

    def _join(self, settings: ExchangeSettings, names: dict[Tensor, str]) -> None:
        self._settings = settings
        self._passes = settings.backward_passes_per_step
        self._exchange = build_exchange(settings, dense_only=isinstance(self, OURS))
        self._names = names
        self._connected = set()
        self._connect_new()

    def _connect_new(self) -> None:
        """Include parameters that were added or unfrozen since."""
        new = []
        for index, group in enumerate(self.param_groups):
            for position, parameter in enumerate(group["params"]):
                if parameter.requires_grad and parameter not in self._connected:
                    name = self._names.setdefault(parameter, f"allreduce.noname.{index}.{position}")
                    new.append((name, parameter))
        if new:
            self._joined().connect(new)
            self._connected.update(parameter for _, parameter in new)

    def _joined(self) -> Exchange:
        if self._exchange is None:
            raise RuntimeError(
                "this optimizer was unpickled or copied where its gradients could not be connected to the other ranks: "
                "load its state_dict() into an optimizer wrapped by arsg_dist.horovod.DistributedOptimizer"
            )
        return self._exchange

    @property
    def _parameter_names(self) -> dict[Tensor, str]:
        """Parameter → name, as Horovod calls what its users read."""
        return self._names

    @property
    def backward_passes_per_step(self) -> int:
        """Backward passes whose gradients are summed before they are sent."""
        return self._passes

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change `backward_passes_per_step`; not between `backward()` and `step()`.

        Raises:
            ValueError: not a positive integer.
        """
        check_passes(passes)
        self._joined().set_backward_passes_per_step(passes)
        self._passes = passes

    def synchronize(self) -> None:
        """Wait until gradients are those of all ranks, before clipping. Collective.

        `step()` then does not repeat it, with or without `skip_synchronize()`.

        Raises:
            RuntimeError: a gradient was changed or removed since `backward()`; or the ranks have different settings
                (lr, ...).
        """
        self._connect_new()
        exchange = self._joined()
        process_set = hvd.global_process_set if self._settings is None else self._settings.process_set
        first = next(iter(self._names.values()), "")
        with same_settings(self, process_set, f"{first}.update"):
            exchange.synchronize()
            self._synchronized = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update with the gradients of all ranks. Collective.

        Args:
            closure: clears the gradients, computes the loss and calls `backward()`; the gradients are exchanged after
                each call of it.

        Returns:
            What the closure returned: this rank's loss; under LBFGS, which decides by it, that of all ranks.

        Raises:
            RuntimeError: inside `skip_synchronize()` without `synchronize()` before; or as `synchronize()`.
        """
        exchange = self._joined()
        if closure is None:
            self._finish_exchange(exchange)
            evaluate = None
        else:

            def evaluate() -> Any:
                with torch.enable_grad():
                    loss = closure()
                self._finish_exchange(exchange)
                return self._of_all_ranks(loss) if isinstance(self, LBFGS) else loss

        exchange.before_update()
        result = super().step(evaluate)
        exchange.after_update()
        if self._given is not None:
            self._given._opt_called = True  # a scheduler made from it warns otherwise
        return result

    def _of_all_ranks(self, loss: Any) -> Any:
        """Average (or sum up) a loss as the gradients are: all ranks must go the same way. Collective."""
        settings = self._settings
        assert settings is not None
        if not settings.process_set.included() or settings.process_set.size() == 1:
            return loss
        mine = torch.as_tensor(loss).detach().double().cpu()
        first = next(iter(self._names.values()), "")
        return hvd.allreduce(mine, op=settings.op, name=f"{first}.loss", process_set=settings.process_set)

    # Torch wraps a class's step to call the step hooks. The inner class's step calls them already, after the exchange.
    step.hooked = True  # type: ignore[attr-defined]

    def _finish_exchange(self, exchange: Exchange) -> None:
        if not self._should_synchronize and exchange.in_flight:
            raise RuntimeError(
                "step() inside skip_synchronize() while gradients are in flight: call synchronize() before"
            )
        if self._should_synchronize and (exchange.in_flight or not self._synchronized):
            self.synchronize()
        self._synchronized = False

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Refuse torch's GradScaler, which asks as its step begins, gradients in flight."""
        if self._exchange is not None and self._exchange.in_flight:
            raise RuntimeError(
                "a GradScaler must not look at gradients in flight: call optimizer.synchronize() before "
                "scaler.unscale_(optimizer) or scaler.step(optimizer)"
            )
        return bool(vars(self).get("_step_supports_amp_scaling", False))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients.

        Raises:
            RuntimeError: between `backward()` and `step()` or `synchronize()`.
        """
        if self._exchange is not None and self._exchange.in_flight:
            raise RuntimeError(
                "zero_grad() between backward() and step() or synchronize(), while gradients are in flight"
            )
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, the same on every rank. Collective."""
        super().add_param_group(param_group)
        if self._exchange is not None:
            self._connect_new()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; gradients in flight are forgotten."""
        if self._exchange is not None:
            self._exchange.reset()
        self._synchronized = False
        super().load_state_dict(state_dict)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        settings = self._settings
        if settings is not None and (settings.groups or settings.process_set != hvd.global_process_set):
            settings = None
        portable = settings and {
            "compression": settings.compression,
            "backward_passes_per_step": self._passes,
            "op": int(settings.op),
            "gradient_predivide_factor": settings.gradient_predivide_factor,
            "sparse_as_dense": settings.sparse_as_dense,
        }
        names = [self._names.get(p) for group in self.param_groups for p in group["params"]]
        base = type(self).__bases__[1]
        return _blank, (base,), {**self.__getstate__(), _PICKLED: (portable, names)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        portable, names = state.pop(_PICKLED, (None, None))
        super().__setstate__(state)
        if names is None:
            return  # load_state_dict calls this too
        parameters = [p for group in self.param_groups for p in group["params"]]
        known = {p: name for p, name in zip(parameters, names, strict=True) if name is not None}
        if portable and hvd.is_initialized():
            self._join(ExchangeSettings(**portable), known)
        else:
            self._names, self._connected = known, set()


@cache
def _replicated_class(base: Any) -> type[ReplicatedOptimizer]:
    """Make the class of `base` with the exchange; named as `base`, as Horovod's is."""
    return type(base.__name__, (ReplicatedOptimizer, base), {"__module__": __name__})


def _blank(base: Any) -> ReplicatedOptimizer:
    """Make what pickle fills."""
    replicated = _replicated_class(base)
    return replicated.__new__(replicated)


def _checked_names(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]] | None
) -> dict[Tensor, str]:
    if named_parameters is None:
        return {
            p: f"allreduce.noname.{i}.{j}"
            for i, group in enumerate(optimizer.param_groups)
            for j, p in enumerate(group["params"])
        }
    pairs = list(named_parameters)
    for pair in pairs:
        if not (
            isinstance(pair, tuple)
            and len(pair) == 2
            and isinstance(pair[0], str)
            and isinstance(pair[1], Tensor)
        ):
            raise TypeError(
                "named_parameters must be (name, parameter) tuples, as model.named_parameters() gives them, "
                f"got {type(pair).__name__}"
            )
    names = [name for name, _ in pairs]
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ValueError(f"names in named_parameters must be unique, these are not: {', '.join(repeated)}")
    known = {parameter: name for name, parameter in sorted(pairs, key=lambda pair: pair[0])}
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            if p not in known:
                raise ValueError(
                    f"param_groups[{i}]['params'][{j}], of shape {tuple(p.shape)}, is not in named_parameters"
                )
    return known
