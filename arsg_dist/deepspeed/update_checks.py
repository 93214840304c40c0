"""Check before each update of an ARSG that it will be the one of a single process.

What DeepSpeed 0.19.8 would leave out or overwrite without a word is refused, and so are settings that differ between
the ranks. All of it travels in one small message per update, while DeepSpeed computes norms and looks for overflows,
so that every rank raises the same error.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from deepspeed.runtime.engine import DeepSpeedEngine as _Engine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from arsg_dist.deepspeed.checkpoint.partitioning import Piece
from arsg_dist.deepspeed.checkpoint.zero_state import Shard, shards_of
from arsg_dist.deepspeed.patches.training_step import empty_in_place, forget_sums
from arsg_dist.deepspeed.patching import Method, wrap_once
from arsg_dist.deepspeed.versions import adds_up_at_stage_2, fails_over_further_passes, keeps_gradients
from arsg_dist.engine import Communicator, JobError, SingleProcessCommunicator, TorchCommunicator
from arsg_dist.engine.consistency import fingerprint
from arsg_dist.engine.settings import start_comparison
from arsg_dist.optim.by_name import OURS
from arsg_dist.optim.state import set_places

_LOOKED_AT: Final = 4096
"""Elements of this rank's shards that are looked at before each update."""
_NAMED: Final = 3


def check_updates() -> None:
    """Wrap DeepSpeed's engine; calling this again changes nothing.

    Raises:
        RuntimeError: this DeepSpeed is built differently.
    """
    wrap_once(_Engine, "_check_for_duplicates", _with_frozen_noted)
    wrap_once(_Engine, "__init__", _with_checks)
    wrap_once(_Engine, "_backward_prologue", _with_backward_looked_at)
    wrap_once(_Engine, "_backward_epilogue", _with_backward_counted)
    wrap_once(_Engine, "_take_model_step", _with_update_checked)
    wrap_once(_Engine, "zero_grad", _with_gradients_discarded)
    for owner in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        wrap_once(owner, "zero_grad", _with_backwards_forgotten)


def _with_frozen_noted(method: Method) -> Method:
    """Note the parameters that DeepSpeed takes out of the optimizer's groups next."""

    def _check_for_duplicates(engine: Any, optimizer: Any) -> None:
        method(engine, optimizer)
        if isinstance(optimizer, OURS):
            engine._frozen_at_start = [
                parameter
                for group in optimizer.param_groups
                for parameter in group["params"]
                if not parameter.requires_grad
            ]

    return _check_for_duplicates


def _with_checks(method: Method) -> Method:
    def initialize(engine: Any, *args: Any, **kwargs: Any) -> None:
        method(engine, *args, **kwargs)
        if isinstance(getattr(engine, "basic_optimizer", None), OURS):
            engine._update_checks = engine.optimizer._update_checks = UpdateChecks(engine)
            _note_places(engine)

    return initialize


def _note_places(engine: Any) -> None:
    """Have moments rounded as in a single process, wherever DeepSpeed put their elements."""
    try:
        shards = list(shards_of(engine))
    except ValueError:
        return  # of experts or NVMe
    for shard in shards:
        if shard.process_group is not None:
            set_places(shard.master, [(piece.offset, piece.numel, piece.start) for piece in shard.pieces])


def _with_backward_looked_at(method: Method) -> Method:
    def _backward_prologue(engine: Any, *args: Any, **kwargs: Any) -> Any:
        if (checks := checks_of(engine)) is not None:
            checks.begin_backward()
        return method(engine, *args, **kwargs)

    return _backward_prologue


def _with_backward_counted(method: Method) -> Method:
    def _backward_epilogue(engine: Any, *args: Any, **kwargs: Any) -> None:
        checks = checks_of(engine)
        if checks is None:
            method(engine, *args, **kwargs)
            return
        with checks.count_backward():
            method(engine, *args, **kwargs)

    return _backward_epilogue


def _with_update_checked(method: Method) -> Method:
    def _take_model_step(engine: Any, *args: Any, **kwargs: Any) -> None:
        checks = checks_of(engine)
        if checks is None:
            method(engine, *args, **kwargs)
            return
        checks.begin_update()
        groups = engine.basic_optimizer.param_groups
        members = [group["params"] for group in groups]
        try:
            try:
                method(engine, *args, **kwargs)
            finally:  # also where the update is left out, or failed: the other ranks ask this one
                checks.finish_comparison()
        except JobError:
            # DeepSpeed steps group by group, and puts the others aside meanwhile.
            engine.basic_optimizer.param_groups = groups
            for group, parameters in zip(groups, members, strict=True):
                group["params"] = parameters
            raise
        checks.end_update()

    return _take_model_step


def _with_gradients_discarded(method: Method) -> Method:
    """Discard the gradients that DeepSpeed keeps elsewhere (stage 3, and stage 2 between micro-batches)."""

    def zero_grad(engine: Any, *args: Any, **kwargs: Any) -> None:
        method(engine, *args, **kwargs)
        if (checks := checks_of(engine)) is not None:
            checks.discard_gradients()

    return zero_grad


def _with_backwards_forgotten(method: Method) -> Method:
    def zero_grad(wrapper: Any, *args: Any, **kwargs: Any) -> None:
        method(wrapper, *args, **kwargs)
        if (checks := checks_of(wrapper)) is not None:
            checks.forget_backwards()

    return zero_grad


def checks_of(owner: Any) -> "UpdateChecks | None":
    """Return the checks of an engine with ARSG, or of its optimizer."""
    checks: UpdateChecks | None = vars(owner).get("_update_checks")
    return checks


class UpdateChecks:
    """Check the updates of an engine.

    Args:
        engine: with ARSG.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._communicator: Communicator | None = None
        self._finish: Callable[[], None] | None = None
        self._passes = 0
        """Backward passes since the last update."""
        self._last_passes = 0
        """Those of them that an update was to follow."""
        self._gone = False
        """Whether gradients were discarded since the last backward pass."""
        self._in_epilogue = False
        self._warned = False
        self._frozen: list[Tensor] = []
        if engine.optimizer is not engine.basic_optimizer:  # stage 0 in fp32, which keeps them
            self._frozen = engine._frozen_at_start
        self._weights = _Weights(engine)
        engine.basic_optimizer.register_step_pre_hook(lambda *_: self.finish_comparison())

    def begin_backward(self) -> None:
        """Look whether DeepSpeed would fail over a backward pass.

        Raises:
            JobError: it would; on every rank that begins this pass.
        """
        wrapper = self._engine.optimizer
        if not (isinstance(wrapper, DeepSpeedZeroOptimizer) and fails_over_further_passes(wrapper)):
            return
        if self._last_passes:
            raise JobError(_too_many_passes(self._last_passes + 1))

    @contextmanager
    def count_backward(self) -> Iterator[None]:
        """Count a backward pass, around what DeepSpeed does with its gradients."""
        engine = self._engine
        self._in_epilogue = True
        try:
            yield
        finally:
            self._in_epilogue = False
        self._gone = False
        self._passes += 1
        if engine.is_gradient_accumulation_boundary() and not engine.inside_no_sync_ctxt:
            self._last_passes += 1

    def forget_backwards(self) -> None:
        """Note that gradients were discarded."""
        # By DeepSpeed itself, which has taken them; a pipeline does it between backward passes and update.
        if self._in_epilogue or self._engine.pipeline_parallelism:
            return
        self._passes = self._last_passes = 0
        self._gone = bool(self._engine.zero_optimization())
        wrapper = self._engine.optimizer
        if isinstance(wrapper, DeepSpeedZeroOptimizer) and fails_over_further_passes(wrapper):
            empty_in_place(wrapper.averaged_gradients)

    def begin_update(self) -> None:
        """Look for what would go wrong, and begin to ask the other ranks. Collective."""
        complaints = [*self._lost_gradients(), *self._thawed(), *self._weights.edited()]
        if self._communicator is None:
            self._communicator = _communicator_of(self._engine)
        self._finish = start_comparison(self._engine.basic_optimizer, self._communicator, complaints)

    def finish_comparison(self) -> None:
        """Wait for the other ranks' answer, once.

        Raises:
            JobError: on every rank, before the update.
        """
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()

    def end_update(self) -> None:
        """Clear the gradients, which some versions forget; remember what the update has left."""
        if keeps_gradients(self._engine):
            self._engine.optimizer.zero_grad()
        self._passes = self._last_passes = 0
        self._gone = False
        self._weights.remember()

    def discard_gradients(self) -> None:
        """Discard the gradients of this update's backward passes."""
        passes, engine = self._passes, self._engine
        self.forget_backwards()
        if not engine.zero_optimization() or engine.pipeline_parallelism:
            return
        if passes and engine.gradient_accumulation_steps() > 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"engine.zero_grad() has thrown away the gradients of {passes} of "
                f"{engine.gradient_accumulation_steps()} micro-batches of an update, as in one process; DeepSpeed by "
                "itself keeps them at ZeRO stages 2 and 3. Call it after the update only, or leave it out",
                stacklevel=4,
            )
        wrapper = engine.optimizer
        wrapper.zero_grad()
        if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
            if getattr(wrapper, "grad_partitions_flat_buffer", None) is not None:
                wrapper.grad_partitions_flat_buffer.zero_()
            if wrapper.offload_optimizer:
                wrapper.norm_for_param_grads = {}
        elif isinstance(wrapper, DeepSpeedZeroOptimizer):
            empty_in_place(wrapper.all_grad_tensors)
            empty_in_place(wrapper.averaged_gradients)
            if wrapper.cpu_offload:
                wrapper.reset_cpu_buffers()
                forget_sums(wrapper)

    def _lost_gradients(self) -> list[str]:
        engine, wrapper = self._engine, self._engine.optimizer
        if engine.pipeline_parallelism:
            return []
        if self._gone:
            return [
                "step() after zero_grad() without a backward pass between them, and DeepSpeed would update with the "
                "gradients of before: call engine.backward(loss) first"
            ]
        # Gradients that are added up in another dtype (`grad_accum_dtype`) are kept all, at stage 2 by some versions.
        last_only = isinstance(wrapper, DeepSpeedZeroOptimizer) and (
            wrapper.cpu_offload
            or wrapper.dtype == wrapper.gradient_accumulation_dtype
            or (wrapper.partition_gradients and not adds_up_at_stage_2())
        )
        if self._last_passes > 1 and last_only:
            return [_too_many_passes(self._last_passes)]
        return []

    def _thawed(self) -> list[str]:
        names = self._engine.param_names
        thawed = [names[parameter] for parameter in self._frozen if parameter.requires_grad]
        if not thawed:
            return []
        return [
            f"{_listed(thawed)} had requires_grad=False at deepspeed.initialize, and DeepSpeed never trains it: let it "
            "require gradients there, in a parameter group with lr 0 until it is to be trained; or make a new engine "
            "now, and load the weights into it"
        ]


class _Weights:
    """Find weights that the program has written and DeepSpeed would overwrite from its fp32 masters.

    Cheap: a few elements of this rank's shards, and PyTorch's count of in-place operations on each parameter; where
    that has changed, the parameter's elements. Not found is a change of few elements made past autograd (`.data`).

    Args:
        engine: with ARSG.
    """

    def __init__(self, engine: Any) -> None:
        self._parameters = {name: parameter for parameter, name in engine.param_names.items()}
        self._shards: list[Shard] = []
        try:
            found = list(shards_of(engine))
        except ValueError:
            found = []  # experts, or masters on NVMe: out of reach
        self._shards = [shard for shard in found if shard.copy is not shard.master]
        self.remember()

    def remember(self) -> None:
        """Take the weights of now for right."""
        if self._shards:
            self._versions = {name: parameter._version for name, parameter in self._parameters.items()}
            self._seen = self._fingerprint()

    @torch.no_grad()
    def edited(self) -> list[str]:
        """Say which weights of this rank's shards were written, but not their masters."""
        if not self._shards:
            return []
        written = {
            name for name, parameter in self._parameters.items() if parameter._version != self._versions[name]
        }
        names: dict[str, None] = {}
        some_changed = bool(self._fingerprint() != self._seen)
        for shard in self._shards:
            if some_changed:
                places = _differ(self._some(shard.copy), self._some(shard.master)).nonzero().view(-1)
                names |= dict.fromkeys(_pieces_at(shard, (places * self._step(shard.copy)).tolist()))
            for piece in shard.pieces if written else ():
                if piece.name in written and self._written(piece, shard):
                    names[piece.name] = None
        if not names:
            return []
        return [
            f"{_listed(list(names))} was written since the last update, and this one would bring the value of before "
            "back from DeepSpeed's fp32 copy: after writing call engine.optimizer.refresh_fp32_params() on every rank, "
            "or write by deepspeed.utils.safe_set_full_fp32_param"
        ]

    def _fingerprint(self) -> Tensor:
        """Compute a number from a few elements of every shard; nothing waits for a device."""
        return fingerprint(torch.cat([self._some(shard.copy) for shard in self._shards]))

    def _some(self, shard: Tensor) -> Tensor:
        """View a few elements from all over."""
        return _flat(shard)[:: self._step(shard)]

    def _step(self, shard: Tensor) -> int:
        return 1 + shard.numel() * len(self._shards) // _LOOKED_AT

    def _written(self, piece: Piece, shard: Shard) -> bool:
        """Look at all of a parameter's elements that are in a shard."""
        parameter, part = self._parameters[piece.name], slice(piece.offset, piece.offset + piece.numel)
        if shard.master.dim() != 1:
            return bool(_differ(parameter.detach(), shard.master).any())
        values = shard.copy[part]
        # Stage 3 holds no more than the shard of most parameters; what it holds whole may be other memory.
        if parameter.numel():
            values = parameter.detach().reshape(-1)[piece.start : piece.start + piece.numel]
        return bool(_differ(values, shard.master[part]).any())


def _too_many_passes(passes: int) -> str:
    return (
        f"{passes} backward passes before this step(), of which DeepSpeed keeps only the last at ZeRO stages 1 and 2: "
        "add up the losses and call engine.backward(loss) once; or call "
        "engine.set_gradient_accumulation_boundary(False) before the first and (True) before the last forward pass of "
        "an update; to throw earlier gradients away call engine.zero_grad()"
    )


def _communicator_of(engine: Any) -> Communicator:
    """Reach the ranks that update together; under model parallelism not all of the job."""
    if engine.seq_dp_world_size == 1:
        return SingleProcessCommunicator()
    group = engine.seq_data_parallel_group
    return TorchCommunicator(engine.device, group)


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''}"


def _flat(tensor: Tensor) -> Tensor:
    """View a shard as flat; one of stage 0 in the order of its memory."""
    return tensor if tensor.dim() == 1 else tensor.detach().as_strided((tensor.numel(),), (1,))


def _differ(copy: Tensor, master: Tensor) -> Tensor:
    """Tell, element by element, where a copy is not what its master rounds to."""
    rounded = master.to(device=copy.device, dtype=copy.dtype)
    return (copy != rounded) & ~(copy.isnan() & rounded.isnan())


def _pieces_at(shard: Shard, places: list[int]) -> list[str]:
    """Name the parameters that have elements at these places; padding has none."""
    return [
        piece.name
        for piece in shard.pieces
        if any(piece.offset <= place < piece.offset + piece.numel for place in places)
    ]
