"""Reduce gradients to the ranks that update with them, bucket by bucket, during the backward pass."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from arsg_dist.ddp.shards import Bucket, Shards, untrained
from arsg_dist.engine import Communicator, JobError

_IN_FLIGHT = 4
"""Buckets on their way at a time; on CPU each has memory for what it receives."""
_NAMED = 5


class Reducer:
    """Average gradients over the ranks, and give each rank's parts what they update with.

    Gradients live in memory laid out as the buckets, as under `DistributedDataParallel`. A bucket is sent as soon as
    all of its parameters have their gradient: by a reduce-scatter, on CPU by an all-to-all, since Gloo's reduce-scatter
    sends as much as an all-reduce. All ranks send in one order. The gradient of a whole parameter is None afterwards.

    Args:
        module: on this rank's device.
        shards: of its parameters.
        communicator: of the ranks.
        find_unused: leave a parameter as it is that no rank's loss has used, and count a rank whose loss has not used
            it with a gradient of zero; otherwise such an update is refused.

    Raises:
        ValueError: the shards have a parameter that is not of the module.

    Attributes:
        others: parameters that require a gradient, and are in no group; each rank has their averaged gradient.
    """

    def __init__(
        self, module: nn.Module, shards: Shards, communicator: Communicator, *, find_unused: bool
    ) -> None:
        self._communicator, self._find_unused = communicator, find_unused
        self._name_of = {parameter: name for name, parameter in module.named_parameters()}
        place = {parameter: index for index, parameter in enumerate(self._name_of)}
        if any(parameter not in place for members in shards.members for parameter in members):
            raise ValueError("the shards have a parameter that is not of this network")
        self.others = [parameter for _, parameter in untrained(module, shards) if parameter.requires_grad]
        # A bucket is complete when the one of its parameters that comes first in the network has its gradient.
        self._buckets = sorted(
            (_Gradients(bucket, communicator) for bucket in shards.buckets),
            key=lambda gradients: -min(place[parameter] for parameter in gradients.views),
        )
        self._sends, self._sent = False, 0
        self._used: dict[nn.Parameter, bool] = {}
        self._memory: dict[tuple[int, torch.dtype], Tensor] = {}
        weakref.finalize(self, _remove, [self._hook(gradients) for gradients in self._buckets])

    def _hook(self, gradients: "_Gradients") -> list[RemovableHandle]:
        """Have gradients taken over as they come, as long as this object lives."""
        weak = weakref.ref(self)

        def take(parameter: nn.Parameter) -> None:
            if (reducer := weak()) is not None:
                reducer._take(gradients, parameter)

        handles = []
        for parameter in gradients.views:
            needed = parameter.requires_grad
            parameter.requires_grad_()  # also what is unfrozen later
            handles.append(parameter.register_post_accumulate_grad_hook(take))  # type: ignore[no-untyped-call]
            parameter.requires_grad_(needed)
        return handles

    def begin(self, *, ends_update: bool) -> None:
        """Prepare the next micro-batch, whose gradients are sent if it is the last of an update, else added up."""
        self._sends, self._sent = ends_update, 0
        self._used.clear()
        for gradients in self._buckets:
            gradients.missing = {parameter for parameter in gradients.views if parameter.requires_grad}

    def _take(self, gradients: "_Gradients", parameter: nn.Parameter) -> None:
        if parameter in self._used:
            raise RuntimeError(
                f"{self._name_of[parameter]} has a gradient from a second backward pass of one micro-batch, after that "
                "of the first was sent: add the losses up and call backward once"
            )
        gradients.take(parameter)
        if self._sends:
            gradients.missing.discard(parameter)
            while self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
                self._send_next()

    def _send_next(self) -> None:
        gradients = self._buckets[self._sent]
        if self._sent >= _IN_FLIGHT:
            self._buckets[self._sent - _IN_FLIGHT].wait()
        self._used |= {parameter: parameter.grad is not None for parameter in gradients.views}
        gradients.send(self._received(self._sent % _IN_FLIGHT, gradients))
        self._sent += 1

    def _received(self, slot: int, gradients: "_Gradients") -> Tensor | None:
        """Return memory for what comes from all ranks: new memory would cost more than the messages."""
        whole = gradients.whole
        if whole.device.type != "cpu":
            return None
        kept = self._memory.get((slot, whole.dtype))
        if kept is None or kept.numel() < whole.numel():
            kept = self._memory[slot, whole.dtype] = torch.empty_like(whole)
        return kept.narrow(0, 0, whole.numel())

    def finish(self) -> None:
        """Send the rest, wait, and give every part its gradient. Collective.

        Raises:
            JobError: on every rank: the loss of one has left parameters out, and these are not to be found.
        """
        if not self._sends:
            return
        while self._sent < len(self._buckets):
            self._send_next()
        self._used |= {parameter: parameter.grad is not None for parameter in self.others}
        asked = [x for x in self._name_of if x in self._used and (x.requires_grad or self._used[x])]
        count = self._communicator.start_sum(torch.tensor([int(self._used[x]) for x in asked]))
        for parameter in self.others:
            total = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            dist.all_reduce(total.div_(self._communicator.world_size))
            parameter.grad = total
        for gradients in self._buckets:
            gradients.wait()
        ranks = dict(zip(asked, count().tolist(), strict=True))
        if not self._find_unused:
            self._refuse_unused(ranks)
        for parameter in self.others:
            if not ranks[parameter]:
                parameter.grad = None
        for gradients in self._buckets:
            for piece in gradients.bucket.pieces:
                used = ranks.get(piece.parameter, 0) > 0
                piece.part.grad = gradients.part.narrow(0, piece.at, piece.part.numel()) if used else None

    def _refuse_unused(self, ranks: dict[nn.Parameter, int]) -> None:
        unused = [self._name_of[x] for x, count in ranks.items() if count < self._communicator.world_size]
        if unused:
            more = f" and {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
            raise JobError(
                "the loss leaves parameters out: not every rank has a gradient for "
                f"{', '.join(unused[:_NAMED])}{more}. Freeze what is never used (requires_grad_(False)), or set "
                "find_unused_parameters"
            )


def _remove(hooks: list[list[RemovableHandle]]) -> None:
    for handles in hooks:
        for handle in handles:
            handle.remove()


class _Gradients:
    """Hold the gradients of a bucket's parameters, and send them.

    Attributes:
        whole: their memory, laid out as the parameters'.
        part: this rank's part of it: its own gradient, the average once it was waited for.
        views: of each parameter's gradient.
        missing: parameters without one in this micro-batch.
    """

    def __init__(self, bucket: Bucket, communicator: Communicator) -> None:
        self.bucket, self._ranks = bucket, communicator.world_size
        self.whole = torch.zeros_like(bucket.whole)
        self.part = self.whole.narrow(0, communicator.rank * bucket.part.numel(), bucket.part.numel())
        self.views = {
            parameter: self.whole.as_strided(parameter.shape, parameter.stride(), start)
            for parameter, start in bucket.starts.items()
        }
        self.missing: set[nn.Parameter] = set()
        self._wait: Callable[[], object] | None = None

    def take(self, parameter: nn.Parameter) -> None:
        """Move a gradient into this memory."""
        view = self.views[parameter]
        if parameter.grad is not None and parameter.grad is not view:
            view.copy_(parameter.grad)
            parameter.grad = view

    def send(self, received: Tensor | None) -> None:
        """Begin to bring every rank its part of the average. Collective.

        Args:
            received: as large as the whole; on CPU.
        """
        for parameter, view in self.views.items():
            if parameter.grad is None:
                view.zero_()
            parameter.grad = None
        if received is None:
            work: Any = dist.reduce_scatter_tensor(self.part, self.whole, op=dist.ReduceOp.AVG, async_op=True)
            self._wait = work.wait
        else:
            work = dist.all_to_all_single(received, self.whole, async_op=True)
            self._wait = lambda: self._average(work, received)

    def _average(self, work: Any, received: Tensor) -> None:
        work.wait()
        torch.sum(received.view(self._ranks, self.part.numel()), 0, out=self.part).div_(self._ranks)

    def wait(self) -> None:
        """Return when this rank has its part."""
        if self._wait is not None:
            self._wait()
            self._wait = None
