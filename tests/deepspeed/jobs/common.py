"""What every job here does: begin, end, and say what came of it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

import arsg_dist.deepspeed  # makes "type": "ARSG" known


def set_up(**options: Any) -> None:
    """Initialise DeepSpeed's communication; fp16 counts as supported, for torch computes in it on every CPU."""
    wanted = os.environ.get("ARSG_TESTED_DEEPSPEED")
    assert wanted in (None, deepspeed.__version__), f"this rank has DeepSpeed {deepspeed.__version__}"
    torch.set_num_threads(1)
    deepspeed.init_distributed(verbose=False, **options)
    arsg_dist.deepspeed.release_shared_memory()
    # DeepSpeed asks oneDNN, which has it on some CPUs only.
    type(get_accelerator()).is_fp16_supported = lambda _: True


@contextmanager
def job(output: Path) -> Iterator[dict[str, Any]]:
    """Yield a dictionary for results, which rank 0 writes to a file at the end; of all ranks, ended in order."""
    set_up()
    results: dict[str, Any] = {}
    yield results
    if deepspeed.comm.get_rank() == 0:
        torch.save(results, output)
    deepspeed.comm.barrier()
    torch.distributed.destroy_process_group()


def gathered(value: Any) -> list[Any]:
    """Every rank's value."""
    values: list[Any] = [None] * deepspeed.comm.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def refusal(call: Callable[[], Any]) -> str | None:
    """What a call raises; None if it does not."""
    try:
        call()
    except Exception as error:  # the test says which one is right
        return f"{type(error).__name__}: {error}"
    return None


def agreed(text: str | None) -> str | None:
    """The text, if all ranks have the same."""
    texts = gathered(text)
    assert len(set(texts)) == 1, f"ranks end differently: {texts}"
    return text


def loading(engine: Any, folder: Path | str, **options: Any) -> str:
    """What loading a checkpoint raises, or "accepted"."""
    return refusal(lambda: engine.load_checkpoint(str(folder), **options)) or "accepted"


def weights_of(model: Any) -> dict[str, Tensor]:
    """The model's parameters in their own dtype, whole; a collective call."""
    named = dict(model.named_parameters())
    cut = any(hasattr(parameter, "ds_id") for parameter in named.values())
    with deepspeed.zero.GatheredParameters(list(named.values()), enabled=cut):
        return {name: parameter.detach().clone() for name, parameter in named.items()}
