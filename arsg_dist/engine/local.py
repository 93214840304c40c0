"""Train with an optimizer that each rank steps itself: one process, or replicas."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from arsg_dist.engine.base import Capabilities, Engine, all_finite
from arsg_dist.engine.builder import EngineBuilder, TrainingSettings
from arsg_dist.engine.communicator import Communicator, SingleProcessCommunicator, check_hosts, device_of
from arsg_dist.engine.ranks import Ranks
from arsg_dist.engine.replicated_state import load_replicated, replicated_state
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.settings import start_comparison
from arsg_dist.engine.state import EngineState

_SCALER = "GradScaler"


class LocalEngine(Engine):
    """Accumulate, scale, clip and check gradients around an optimizer.

    Args:
        module: the model, on the device to train on.
        optimizer: over the model's parameters.
        communicator: of the ranks that train it.
        accumulation_steps: micro-batches per update.
        clip_grad_norm: the gradient is scaled down to this norm if it is larger; 0 for never.
        loss_scaling: scale the loss dynamically, as fp16 autocast needs; updates whose gradients overflow are skipped.
        skip_nonfinite: leave out updates whose gradient is not finite; under loss scaling they are in any case.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        communicator: Communicator,
        *,
        accumulation_steps: int = 1,
        clip_grad_norm: float = 0.0,
        loss_scaling: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        self.communicator = communicator
        self.module = self._network = module
        self.optimizer = optimizer
        self.accumulation_steps = accumulation_steps
        self.device = next(module.parameters()).device
        self._clip_grad_norm = clip_grad_norm
        self.loss_scaling = loss_scaling
        self.skipped_updates = 0
        self._skip_nonfinite = skip_nonfinite and not loss_scaling
        self._grad_scaler = torch.amp.GradScaler(self.device.type, enabled=loss_scaling)
        self._micro_batches = 0
        self._at_base_iterate = False

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` divided by the number of micro-batches."""
        self._refuse_at_base_iterate("backward")
        scaled = self._grad_scaler.scale(loss / self.accumulation_steps)
        scaled.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Count a micro-batch; update the weights after the last of an update."""
        self._refuse_at_base_iterate("step")
        self._micro_batches += 1
        if self._micro_batches % self.accumulation_steps == 0:
            self._update()
            self.optimizer.zero_grad()
        self._announce_micro_batch()

    @property
    def _ends_update(self) -> bool:
        """Whether the next micro-batch is the last of an update."""
        return (self._micro_batches + 1) % self.accumulation_steps == 0

    def _announce_micro_batch(self) -> None:
        """Prepare the next micro-batch; called after each."""

    def _update(self) -> None:
        require_same_settings = self._start_comparison()
        if self._skip_nonfinite and not self._gradient_is_finite():
            require_same_settings()
            self.skipped_updates += 1
            return
        self._clip()
        require_same_settings()
        self._step()

    def _start_comparison(self) -> Callable[[], None]:
        """Begin to compare the ranks' settings; what is returned raises where they differ."""
        return start_comparison(self.optimizer, self.communicator)

    def _gradient_is_finite(self) -> bool:
        """Of the averaged gradient, so that all ranks say the same."""
        return all_finite(p.grad for p in self._network.parameters() if p.grad is not None)

    def _clip(self) -> None:
        if self._clip_grad_norm:
            self._grad_scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self._network.parameters(), self._clip_grad_norm)

    def _clip_parts(
        self, parts: list[torch.Tensor], *, held_by: int = 1, besides: torch.Tensor | None = None
    ) -> None:
        """Scale down parts of the gradient by the norm of all of it. Collective.

        Args:
            parts: of this rank.
            held_by: ranks that hold the same parts.
            besides: a square that counts as well, divided by the ranks that add it.
        """
        norms = [norm.float() for norm in torch._foreach_norm(parts)] if parts else []
        square = torch.stack(norms).square().sum() / held_by if norms else torch.zeros((), device=self.device)
        if besides is not None:
            square = square + besides
        norm = self.communicator.all_reduce_sum(square).sqrt()
        if parts:
            torch._foreach_mul_(parts, (self._clip_grad_norm / (norm + 1e-6)).clamp(max=1.0))

    def _unscale_shards(self) -> None:
        """Unscale where each rank has a part of the gradient: an overflow in any of them is one of all ranks."""
        self._grad_scaler.unscale_(self.optimizer)
        found = self._grad_scaler._found_inf_per_device(self.optimizer)
        overflow = self.communicator.start_any(any(bool(value) for value in found.values()))()
        for value in found.values():
            value.fill_(overflow)

    def _step(self) -> None:
        self._grad_scaler.step(self.optimizer)
        self._grad_scaler.update()

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """Copy the model's state dict on rank 0."""
        return self.weights_of(self._network)

    def state(self) -> EngineState:
        """Make this rank's share of the state."""
        self._refuse_at_base_iterate("state")
        state = self._own_state()
        state.loss_scale = self._loss_scale()
        return state

    def _own_state(self) -> EngineState:
        return replicated_state(
            self.kind,
            self._network,
            self.optimizer,
            self.communicator.rank,
            self.communicator.world_size,
        )

    def load_state(self, saved: SavedState) -> None:
        """Load what this rank holds."""
        self._refuse_at_base_iterate("load_state")
        with self.communicator.fail_together():
            self._load_own_state(saved)
        self._load_loss_scale(saved)

    def _load_own_state(self, saved: SavedState) -> None:
        load_replicated(self._network, self.optimizer, saved)

    def _loss_scale(self) -> dict[str, Any] | None:
        if not self._grad_scaler.is_enabled():
            return None
        own = self._grad_scaler.state_dict()
        return {"kind": _SCALER, "scale": own["scale"], "since_overflow": own["_growth_tracker"]}

    def _load_loss_scale(self, saved: SavedState) -> None:
        if not self._grad_scaler.is_enabled() or saved.loss_scale is None:
            return
        loaded = self._grad_scaler.state_dict() | {"scale": saved.loss_scale["scale"]}
        if saved.loss_scale["kind"] == _SCALER:
            loaded["_growth_tracker"] = int(saved.loss_scale.get("since_overflow", 0))
        self._grad_scaler.load_state_dict(loaded)

    def replicated_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield parameters and optimizer state."""
        for name, parameter in self._network.named_parameters():
            yield name, parameter
            for entry, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    yield f"{name}'s {entry}", value

    @property
    def at_base_iterate(self) -> bool:
        """Whether a `base_iterate` context is entered."""
        return self._at_base_iterate

    @contextmanager
    def base_iterate(self) -> Iterator[None]:
        """Move the parameters to θ and back."""
        base_iterate = getattr(self.optimizer, "base_iterate", None)
        if base_iterate is None:
            raise TypeError(
                f"ARSG and RemoteObservation have a base iterate; this optimizer is {type(self.optimizer).__name__}"
            )
        self._refuse_at_base_iterate("base_iterate")
        with base_iterate():
            self._at_base_iterate = True
            try:
                yield
            finally:
                self._at_base_iterate = False


class SingleProcessEngine(LocalEngine):
    """Train with plain PyTorch in a single process.

    Arguments as of `LocalEngine`, without the communicator.
    """

    kind = "single"

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        super().__init__(module, optimizer, SingleProcessCommunicator(), **options)


class LocalBuilder(EngineBuilder):
    """Build an engine that takes a network and an optimizer."""

    capabilities = Capabilities()
    _engine: Callable[..., LocalEngine]
    """Of module, optimizer, communicator and the options of a `LocalEngine`."""
    _channels_last = True

    def __init__(self, settings: TrainingSettings, world_size: int) -> None:
        self._settings = settings
        self.precision = "fp32" if settings.precision == "auto" else settings.precision

    def build(self, module: nn.Module, communicator: Communicator, ranks: Ranks) -> Engine:
        """Put the network on this rank's device and make its optimizer."""
        settings = self._settings
        module = module.to(device_of(ranks))
        if settings.channels_last and self._channels_last:
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._distribute(module, communicator)
        return self._engine(
            module,
            self._optimizer(module),
            communicator,
            accumulation_steps=settings.accumulation_steps,
            clip_grad_norm=settings.clip_grad_norm,
            loss_scaling=self.precision == "fp16",
            skip_nonfinite=settings.skip_nonfinite,
            **self._engine_options(),
        )

    def _distribute(self, module: nn.Module, communicator: Communicator) -> None:
        """Change the network's parameters, before an optimizer is made over them. Collective."""

    def _optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return self._settings.build_optimizer(self._settings.parameter_groups(module))

    def _engine_options(self) -> dict[str, Any]:
        """Return further arguments of the engine."""
        return {}


class SingleProcessBuilder(LocalBuilder):
    """Build a `SingleProcessEngine`."""

    @staticmethod
    def connect(ranks: Ranks) -> Communicator:
        """Make the communicator of one rank.

        Raises:
            JobError: the job was started for several hosts.
        """
        communicator = SingleProcessCommunicator()
        check_hosts(communicator)
        return communicator

    @staticmethod
    def _engine(
        module: nn.Module, optimizer: torch.optim.Optimizer, _: Communicator, **options: Any
    ) -> LocalEngine:
        return SingleProcessEngine(module, optimizer, **options)
