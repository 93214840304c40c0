"""Bridge what differs between the versions of DeepSpeed that arsg_dist works with.

Each of these has the name that the newest DeepSpeed gives it, and what is left of it in the older ones.
"""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import hjson  # type: ignore[import-untyped]
from deepspeed.ops.adam import FusedAdam
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys
from packaging.version import Version

from arsg_dist.safe_io.files import read_text

PARAM_ALIGNMENT_PADDINGS = "param_alignment_paddings"  # a key of checkpoints since 0.19.7


def _before(release: str) -> bool:
    return Version(deepspeed.__version__) < Version(release)


def is_optimized_parameter(parameter: Any) -> bool:
    """Tell whether DeepSpeed's wrappers own a parameter."""
    own = getattr(deepspeed.runtime.utils, "is_optimized_parameter", None)
    return bool(own(parameter) if own is not None else parameter.requires_grad)


def leaves_out_frozen() -> bool:
    """Tell whether at stage 0 in half precision DeepSpeed takes frozen parameters out of the optimizer's groups.

    Older ones make masters of them, which weight decay moves.
    """
    return hasattr(deepspeed.runtime.utils, "is_optimized_parameter")


def load_config(path: str) -> dict[str, Any]:
    """Read a config as DeepSpeed does: of a file, or of base64."""
    file = Path(path)
    text = read_text(file, follow=True) if file.is_file() else base64.urlsafe_b64decode(path).decode()
    content: dict[str, Any] = hjson.loads(text, object_pairs_hook=dict_raise_error_on_duplicate_keys)
    return content


def loss_scaler(wrapper: Any) -> Any:
    """Return what holds the loss scale (`cur_scale`) of `engine.optimizer`."""
    for name in ("loss_scale_config", "loss_scaler"):
        if getattr(wrapper, name, None) is not None:
            return getattr(wrapper, name)
    return wrapper  # stage 0 until 0.18.5


def fails_over_further_passes(zero: Any) -> bool:
    """Tell whether a further backward pass after an update's last one ends in a TypeError (stages 1 and 2)."""
    return _before("0.18.3") and not zero.cpu_offload


def expert_file(engine: Any, directory: Path, layer: int, expert: int) -> Path:
    """Return where the weights of an expert of a mixture are in a checkpoint."""
    own = getattr(engine, "checkpoint_mp_rank", None)
    rank = {"checkpoint_mp_rank": own} if own is not None else {"mpu": engine.mpu}
    return Path(engine._get_expert_ckpt_name(str(directory.parent), layer, expert, directory.name, **rank))


def adds_up_at_stage_2() -> bool:
    """Tell whether backward passes add up in `grad_accum_dtype` at stage 2 too; until 0.19.7 the last one counts."""
    return not _before("0.19.8")


def keeps_gradients(engine: Any) -> bool:
    """Tell whether an update leaves its gradients to the next one: at stage 0 in bf16, until 0.18.8 at the latest."""
    return _before("0.18.9") and engine.bfloat16_enabled() and not engine.zero_optimization()


def saves_stage_0() -> bool:
    """Tell whether DeepSpeed saves the optimizer at stage 0 in bf16, which it forgot until 0.18.4."""
    return not _before("0.18.5")


def resumes_stage_0() -> bool:
    """Tell whether DeepSpeed loads all of what it saves at stage 0.

    Until 0.18.4 it leaves out the optimizer in bf16, and until 0.19.2 looks for that of experts in the wrong file.
    """
    return not _before("0.19.3")


@contextmanager
def taken_for_fused_adam(zero: Any) -> Iterator[None]:
    """Let `offload_states` at stage 3 move what is not the optimizer's.

    Until 0.18.9 it asks for FusedAdam whatever it is to move.
    """
    own = zero.optimizer
    if _before("0.19.0"):
        zero.optimizer = object.__new__(FusedAdam)
    try:
        yield
    finally:
        zero.optimizer = own


def flat_offsets(zero: Any, index: int) -> list[int]:
    """Return where each of `round_robin_bit16_groups` begins in its flat group (stages 1 and 2)."""
    if hasattr(zero, "round_robin_bit16_offsets"):
        offsets: list[int] = zero.round_robin_bit16_offsets[index]
        return offsets
    sizes = [parameter.numel() for parameter in zero.round_robin_bit16_groups[index]]
    return [sum(sizes[:position]) for position in range(len(sizes))]


def ranks_of_sub_group(zero: Any, index: int) -> Any:
    """Return the process group that a sub-group is partitioned over (stage 3)."""
    if hasattr(zero, "sub_group_process_groups"):
        return zero.sub_group_process_groups[index]
    return zero.dp_process_group


def ranks_of_parameter(zero: Any, parameter: Any) -> Any:
    """Return the process group that a parameter is partitioned over (stage 3)."""
    if hasattr(zero, "_get_param_partition_group"):
        return zero._get_param_partition_group(parameter)
    return zero.dp_process_group
