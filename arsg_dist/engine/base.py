"""Define the interface between a training loop and what distributes it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from arsg_dist.engine.communicator import Communicator
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import EngineState
from arsg_dist.optim.base_iterate import refuse_at_base_iterate


@dataclass(frozen=True)
class Capabilities:
    """Say what code above an engine may count on.

    Attributes:
        no_twin: "" where the engine can hold a second network as it holds the trained one, and run a compiled one; else
            under what it cannot, and what to use instead, for a message.
        no_replicas: "" where several ranks hold the same between updates; else the same.
    """

    no_twin: str = ""
    no_replicas: str = ""


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Tell whether all elements are finite, waiting for the device once."""
    held = [tensor for tensor in tensors if tensor.numel()]
    largest = torch._foreach_norm(held, torch.inf) if held else []
    return not largest or bool(torch.stack([norm.float() for norm in largest]).isfinite().all())


def copy_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copy a module's state dict; see `copy_weight`."""
    return {name: copy_weight(tensor) for name, tensor in module.state_dict().items()}


def copy_weight(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to a contiguous one on the CPU, a floating one as float32."""
    plain = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    return plain.to("cpu", copy=True).contiguous()


class Engine(ABC):
    """Train a model on one rank of a job, its gradients reduced over all.

    A training loop is the same on every engine::

        for micro_batch in micro_batches:      # accumulation_steps of them make one update
            loss = criterion(engine.module(inputs), labels)   # mean over the micro-batch
            engine.backward(loss)
            engine.step()                      # changes the weights after the last of them

    After `accumulation_steps` calls the weights have moved along the gradient of the mean loss over all
    accumulation_steps × world_size micro-batches (of equal size).

    Attributes:
        kind: name of the kind of engine, for checkpoints and messages.
        communicator: collectives over the ranks of this engine.
        module: the model to call; its forward pass takes inputs of `input_dtype` on `device`.
        optimizer: the innermost `torch.optim.Optimizer`, whose `param_groups` hold lr, mu, ... and may be changed.
        accumulation_steps: micro-batches per update and rank.
        loss_scaling: whether updates whose scaled gradient overflows are left out as a matter of course (fp16).
        skipped_updates: updates left out so far, since their gradient was not finite; the same on every rank.
        capabilities: what code above it may count on.
        shards_of_ranks: number of what each rank holds of the weights, where some hold other parts than others.
    """

    kind: str
    communicator: Communicator
    module: nn.Module
    optimizer: torch.optim.Optimizer
    accumulation_steps: int
    device: torch.device
    input_dtype: torch.dtype = torch.float32
    loss_scaling: bool = False
    skipped_updates: int = 0
    capabilities: Capabilities = Capabilities()
    shards_of_ranks: Sequence[int] = ()

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` (a scalar, mean over this rank's micro-batch)."""

    @abstractmethod
    def step(self) -> None:
        """End a micro-batch; after the last of an update, step and clear gradients."""

    @abstractmethod
    def state(self) -> EngineState:
        """Make what this rank contributes to a checkpoint of the run.

        Its pieces are views of the training's own memory as far as possible: write or copy them before the next update.

        Raises:
            ValueError: state of a kind that is not saved; on every rank alike.
        """

    @abstractmethod
    def load_state(self, saved: SavedState) -> None:
        """Load a saved run, whichever engine and number of ranks saved it. Collective.

        Raises:
            JobError: on every rank: the saved run does not fit this model and optimizer, which is found before anything
                changes; or a file of it is damaged, after which this engine is to be thrown away or to load another.
        """

    @abstractmethod
    def whole_weights(self) -> dict[str, torch.Tensor]:
        """Copy the model's state dict to rank 0's main memory. Collective.

        Returns:
            Contiguous CPU tensors by name, floating ones float32, on rank 0; nothing on the others.
        """

    def local_parameters(self) -> Iterator[torch.Tensor]:
        """Yield what this rank holds of the model's parameters: all of them, or its parts."""
        yield from self.module.parameters()

    def hold(self, module: nn.Module) -> None:
        """Put another network of the trained one's structure, alike on all ranks, where and as that one is. Collective.

        Its parameters may be parts from then on. It is not trained: each forward pass sees what they are.
        """
        module.to(self.device)

    def weights_of(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Do as `whole_weights`, for a network that was given to `hold`. Collective."""
        return copy_weights(module) if self.communicator.rank == 0 else {}

    @property
    def at_base_iterate(self) -> bool:
        """Whether a `base_iterate` context is entered."""
        return False

    def _refuse_at_base_iterate(self, what: str) -> None:
        refuse_at_base_iterate(self.at_base_iterate, what)

    def replicated_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and tensor of what ranks that hold the same part must hold alike between updates.

        Raises:
            NotImplementedError: an engine of which no two ranks hold the same.
        """
        raise NotImplementedError(f"{type(self).__name__} has no replicated weights")

    def check_next_sums(self) -> None:  # noqa: B027
        """Have the next update's gradients reduced twice. Collective.

        That is so where one rank updates a part of the weights for all. Every rank must call it.
        """

    def faulty_sums(self) -> list[str]:
        """Return what `check_next_sums` has found, alike on every rank. Collective."""
        return []

    def base_iterate(self) -> AbstractContextManager[None]:
        """Move the parameters to the base iterate θ inside a context. Collective.

        Every rank must enter and leave it. x returns bit by bit; `backward`, `step`, `state` and `load_state` raise
        RuntimeError inside, and so does nested use. See `arsg_dist.ARSG.base_iterate`.

        Raises:
            TypeError: the optimizer is neither ARSG nor RemoteObservation.
            NotImplementedError: an engine that cannot do it.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot evaluate at the base iterate")
