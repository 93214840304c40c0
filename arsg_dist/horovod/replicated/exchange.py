"""Reduce gradients, or with Adasum the updates themselves, over replicated ranks."""

import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch import mpi_ops
from horovod.torch.compression import Compression
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from arsg_dist.horovod.comm.environment import in_elastic_job
from arsg_dist.horovod.comm.interface import check_passes, check_predivide_factor
from arsg_dist.horovod.replicated.compression import WireFormat
from arsg_dist.horovod.replicated.in_flight import InFlight

Named = Sequence[tuple[str, Tensor]]

_sent_by: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter → weak reference to the stand-in whose hook sends its gradients."""


@dataclass(frozen=True, kw_only=True)
class ExchangeSettings:
    """Hold the arguments of `DistributedOptimizer` beside optimizer and names.

    Raises:
        ValueError: a value out of range, or settings that contradict each other.
        TypeError: a value of the wrong kind.
    """

    compression: Any = Compression.none
    backward_passes_per_step: int = 1
    op: Any = hvd.Average
    gradient_predivide_factor: float = 1.0
    groups: int | list[list[Tensor]] | None = None
    sparse_as_dense: bool = False
    process_set: Any = hvd.global_process_set

    def __post_init__(self) -> None:
        check_passes(self.backward_passes_per_step)
        if self.op not in (hvd.Average, hvd.Sum, hvd.Adasum):
            raise ValueError(f"op must be hvd.Average, hvd.Sum or hvd.Adasum, got {self.op!r}")
        if not (hasattr(self.compression, "compress") and hasattr(self.compression, "decompress")):
            raise TypeError(f"compression must be one of hvd.Compression, got {self.compression!r}")
        check_predivide_factor(self.gradient_predivide_factor, self.op)
        self._check_groups()
        if self.op == hvd.Adasum:
            self._check_adasum()

    def _check_groups(self) -> None:
        if self.groups and in_elastic_job():
            raise ValueError(
                "groups need all ranks when the optimizer is wrapped, which a rank that joins an elastic job later "
                "waits for in vain: leave groups out"
            )
        if isinstance(self.groups, list):
            members = [member for group in self.groups for member in group]
            if not all(isinstance(member, Tensor) for member in members):
                raise TypeError("groups must be a number or a list of lists of parameters")
            if len({id(member) for member in members}) != len(members):
                raise ValueError("a parameter can only appear once in groups")
        elif self.groups is not None and (
            isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 0
        ):
            raise ValueError(
                f"groups must be a non-negative integer or a list of lists of parameters, got {self.groups!r}"
            )

    def _check_adasum(self) -> None:
        if self.groups or self.sparse_as_dense or self.process_set != hvd.global_process_set:
            raise ValueError("op=hvd.Adasum does not take groups, sparse_as_dense or a process_set")
        size = hvd.size()
        if size > 1 and not hvd.mpi_enabled():
            raise ValueError("op=hvd.Adasum needs Horovod's MPI controller: start the ranks with mpirun")
        if size & (size - 1):
            raise ValueError(f"op=hvd.Adasum needs a power of two of ranks, got {size}")


class Exchange(ABC):
    """Exchange what a replicated optimizer needs from the other ranks."""

    @property
    @abstractmethod
    def in_flight(self) -> bool:
        """Whether something was sent that has not been waited for."""

    @abstractmethod
    def connect(self, parameters: Named) -> None:
        """Take part for further parameters, the same on every rank. Collective."""

    @abstractmethod
    def synchronize(self) -> None:
        """Finish the reduction of gradients, then the same everywhere. Collective."""

    @abstractmethod
    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change after how many backward passes gradients are sent."""

    @abstractmethod
    def reset(self) -> None:
        """Forget what is in flight."""

    def before_update(self) -> None:  # noqa: B027
        """Prepare an update; to be called before every one."""

    def after_update(self) -> None:  # noqa: B027
        """Complete an update; to be called after every one. Collective."""


class GradientExchange(Exchange):
    """Reduce gradients while `backward()` computes them, by Horovod's own wrapper.

    Horovod's `DistributedOptimizer` sits on a stand-in that is never stepped and lends its hooks and its
    `synchronize()`. Parameters connected later get a stand-in of their own.

    Args:
        settings: of the exchange.
        dense_only: the optimizer takes dense gradients only; with `sparse_as_dense` it gets them.
    """

    def __init__(self, settings: ExchangeSettings, *, dense_only: bool) -> None:
        self._settings = settings
        self._passes = settings.backward_passes_per_step
        self._dense_only = dense_only
        self._parts: list[Any] = []
        self._sent: dict[Tensor, InFlight] = {}
        self._sparse: dict[Tensor, int] = {}  # how many dimensions of a parameter its gradients index
        self._seen: set[Tensor] = set()  # parameters for which some rank has had a gradient
        self._exchanged: list[frozenset[Tensor]] = []  # of each part, with frozen ones

    @property
    def in_flight(self) -> bool:
        """Whether gradients were sent, or held back, that nobody has waited for."""
        return any(part._handles for part in self._parts) and not self._ended

    @property
    def _ended(self) -> bool:
        return any(isinstance(part._allreduce_delay, _Never) for part in self._parts)

    def connect(self, parameters: Named) -> None:
        """Register the hooks that send gradients. Collective at first, with `groups`.

        An earlier optimizer's exchange of the same parameters ends; gradients that it has in flight arrive before.
        """
        parameters = list(parameters)
        _take_over(parameters)
        settings = self._settings
        part = hvd.DistributedOptimizer(
            torch.optim.SGD([parameter for _, parameter in parameters]),
            named_parameters=parameters,
            compression=WireFormat(settings.compression, keep=True),
            backward_passes_per_step=self._passes,
            op=settings.op,
            gradient_predivide_factor=settings.gradient_predivide_factor,
            groups=(settings.groups or None) if not self._parts else None,
            sparse_as_dense=settings.sparse_as_dense,
            process_set=settings.process_set,
        )
        if self._dense_only and not settings.sparse_as_dense:
            part._sparse_allreduce_grad_async = _refuse_sparse
        else:
            part._sparse_allreduce_grad_async = functools.partial(_send_sparse, settings)
        for one_or_several in ("_allreduce_grad_async", "_grouped_allreduce_grad_async"):
            send = functools.partial(_send, getattr(part, one_or_several), self._sent, self._sparse)
            setattr(part, one_or_several, send)
        if part._grad_accs:  # none on a single rank
            for _, parameter in parameters:
                _sent_by[parameter] = weakref.ref(part)
        self._parts.append(part)
        self._exchanged.append(frozenset(part._requires_update))

    def synchronize(self) -> None:
        """Wait until every gradient is reduced, zeros where there is none. Collective.

        Raises:
            RuntimeError: a gradient was removed or changed after `backward()`; it is the reduced one as it was sent.
                Or a later optimizer has taken over.
        """
        if self._ended:
            raise RuntimeError(
                "a later DistributedOptimizer has taken over parameters of this one, which has ended"
            )
        changed = self._changed()
        for p in changed:
            if p in self._sent:
                p.grad = self._sent[p].gradient  # the other ranks have to have it
        self._learn_layouts()
        for part, exchanged in zip(self._parts, self._exchanged, strict=True):
            part._requires_update = {p for p in exchanged if p.requires_grad}
            _launch_incomplete_groups(part)
            for p in self._sparse.keys() & part._requires_update:
                if p.grad is None:  # Horovod would send a dense one, and wait for ever for the other ranks'
                    p.grad = _no_rows(p, self._sparse[p])
        for part in self._parts:
            reduced = [p for key in part._handles for p in _parameters_of(key)]
            part.synchronize()
            for p in reduced:
                gradient = p.grad
                if self._dense_only and gradient is not None and gradient.is_sparse:
                    p.grad = gradient.to_dense()
                if not p.requires_grad:
                    p.grad = None
        self._sent.clear()
        if changed:
            raise RuntimeError(
                f"the gradient of {', '.join(changed.values())} was changed, replaced or set to None between "
                "backward() and the end of its exchange, which would be lost or reduced twice: call "
                "optimizer.synchronize() before clipping or unscaling gradients, then "
                "'with optimizer.skip_synchronize(): optimizer.step()', and clear gradients after step() only"
            )

    def _learn_layouts(self) -> None:
        """Learn from the other ranks which gradients are sparse, before this rank has had one. Collective.

        Horovod would send zeros for a parameter that this rank did not use, and wait for ever for the ranks that sent
        rows and values. Nothing is sent once every parameter has been used.
        """
        if self._dense_only or self._settings.sparse_as_dense:
            return
        unknown = {
            name: p
            for part in self._parts
            if part._grad_accs  # none on a single rank, or outside the process set
            for p, name in part._parameter_names.items()
            if p not in self._seen
        }
        if not unknown:
            return
        names = sorted(unknown)
        kinds = hvd.allreduce(
            torch.tensor([_kind_of(unknown[name].grad) for name in names]),
            op=hvd.Max,
            name=f"{names[0]}.layouts",
            process_set=self._settings.process_set,
        ).tolist()
        for name, kind in zip(names, kinds, strict=True):
            if kind:
                self._seen.add(unknown[name])
            if kind > 1:
                self._sparse.setdefault(unknown[name], kind - 1)

    def _changed(self) -> dict[Tensor, str]:
        """Find the parameters, with names, whose gradient is no more what backward left."""
        names = {p: name for part in self._parts for p, name in part._parameter_names.items()}
        held_back = [p for part in self._parts for key in part._handles for p in _parameters_of(key)]
        return {
            p: names[p]
            for p in {**dict.fromkeys(held_back), **self._sent}
            if (self._sent[p].changed(p.grad) if p in self._sent else p.grad is None)
        }

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change after how many backward passes gradients are sent."""
        self._passes = passes
        for part in self._parts:
            part.set_backward_passes_per_step(passes)

    def reset(self) -> None:
        """Forget what is in flight, as after a failure or a loaded checkpoint."""
        for part in self._parts:
            part._group_counts = dict.fromkeys(part._group_counts, 0)
            part.load_state_dict(part.state_dict())
        self._sent.clear()


class AdasumExchange(Exchange):
    """Combine the updates of the ranks by Adasum (arXiv 2006.02924).

    Each rank updates with its own gradient and state. Optimizer states differ between the ranks by design. Nothing
    overlaps with the backward pass.
    """

    def __init__(self, settings: ExchangeSettings) -> None:
        self._wire = WireFormat(settings.compression)
        self._parameters: list[tuple[str, Tensor]] = []
        self._starts: list[Tensor] = []

    @property
    def in_flight(self) -> bool:
        """Never: everything happens within a step."""
        return False

    def connect(self, parameters: Named) -> None:
        """Include further parameters."""
        self._parameters.extend(parameters)

    def synchronize(self) -> None:
        """Do nothing: gradients stay each rank's own."""

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Do nothing: a step takes the gradients as they are."""

    def reset(self) -> None:
        """Forget the starting point of an update."""
        self._starts = []

    @torch.no_grad()
    def before_update(self) -> None:
        """Remember where the update starts."""
        self._starts = [parameter.detach().clone() for _, parameter in self._parameters]

    @torch.no_grad()
    def after_update(self) -> None:
        """Replace this rank's update by the combined one. Collective."""
        sent = []
        for (name, parameter), start in zip(self._parameters, self._starts, strict=True):
            update, context = self._wire.compress(parameter - start)
            sent.append((hvd.allreduce_async(update, name=f"adasum.{name}", op=hvd.Adasum), context))
        for (_, parameter), start, (handle, context) in zip(
            self._parameters, self._starts, sent, strict=True
        ):
            parameter.copy_(start + self._wire.decompress(hvd.synchronize(handle), context))
        self._starts = []


def build_exchange(settings: ExchangeSettings, *, dense_only: bool) -> Exchange:
    """Build the exchange that the settings ask for; Adasum among one rank is none."""
    if settings.op == hvd.Adasum and hvd.size() > 1:
        return AdasumExchange(settings)
    return GradientExchange(settings, dense_only=dense_only)


class _Never(dict[Tensor, int]):
    """Count backward passes for a stand-in whose hooks have nothing to send any more."""

    def __getitem__(self, parameter: Tensor) -> int:
        return 1

    def __setitem__(self, parameter: Tensor, passes: int) -> None:
        pass


def _take_over(parameters: Named) -> None:
    """End an earlier optimizer's exchange, which would send the gradients too."""
    references = [_sent_by.get(parameter) for _, parameter in parameters]  # type: ignore[no-untyped-call]
    parts = {id(part): part for reference in references if reference and (part := reference()) is not None}
    for part in parts.values():
        if any(handle is not None for handle, _ in part._handles.values()):
            for parameter in part._requires_update:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            part.synchronize()  # the other ranks' part of what is in flight
        part._allreduce_delay = _Never()


def _send(
    send: Callable[[Any], Any], in_flight: dict[Tensor, InFlight], sparse: dict[Tensor, int], key: Any
) -> Any:
    """Send the gradient of a parameter or of a group as Horovod does, and note it."""
    handle, contexts = send(key)
    for parameter, context in zip(
        _parameters_of(key), contexts if isinstance(key, tuple) else (contexts,), strict=True
    ):
        gradient = parameter.grad
        assert gradient is not None
        copied = context is None or context.copied or context.gradient is not gradient
        in_flight[parameter] = InFlight.of(gradient, copied=copied)
        if gradient.is_sparse:
            sparse[parameter] = gradient.sparse_dim()
    return handle, contexts


def _kind_of(gradient: Tensor | None) -> int:
    """Return 0 for none, 1 for a dense one, more for a sparse one that indexes one dimension or more."""
    if gradient is None:
        return 0
    return 1 + gradient.sparse_dim() if gradient.is_sparse else 1


def _no_rows(parameter: Tensor, indexed: int) -> Tensor:
    """Make a sparse gradient without elements."""
    return torch.sparse_coo_tensor(
        torch.empty((indexed, 0), dtype=torch.int64, device=parameter.device),
        torch.empty((0, *parameter.shape[indexed:]), dtype=parameter.dtype, device=parameter.device),
        parameter.shape,
    )


def _parameters_of(key: Any) -> Sequence[Tensor]:
    """List the parameters of a key of Horovod's handles: one, or a group of them."""
    return key if isinstance(key, tuple) else (key,)


def _send_sparse(
    settings: ExchangeSettings, parameter: Tensor, name: str
) -> tuple[Callable[[], Tensor], None]:
    """Send a sparse gradient as Horovod does, bfloat16 too."""
    gradient = parameter.grad
    assert gradient is not None
    wire = gradient.float() if gradient.dtype == torch.bfloat16 else gradient
    handle = mpi_ops.sparse_allreduce_async(wire, name=name, op=settings.op, process_set=settings.process_set)
    return lambda: handle().to(gradient.dtype), None


def _refuse_sparse(parameter: Tensor, name: str) -> Any:
    raise RuntimeError(
        f"{name} has a sparse gradient, and ARSG and RemoteObservation need dense ones: pass sparse_as_dense=True, or "
        "build the embedding without sparse=True"
    )


def _launch_incomplete_groups(part: Any) -> None:
    """Send groups of which this rank used some parameters, zeros for the others.

    Horovod sends what such a group has one by one, and waits for ever for ranks that used the whole group.
    """
    for group in part._group_counts:
        if group in part._handles or not any(parameter.requires_grad for parameter in group):
            continue
        for parameter in group:
            part._handles.pop(parameter, None)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        part._handles[group] = part._grouped_allreduce_grad_async(group)
        part._group_counts[group] = 0
