"""Convert ARSG's DeepSpeed checkpoints to the universal layout, without loss.

usage: python -m arsg_dist.deepspeed.universal [--trust-pickle] INPUT OUTPUT

A DeepSpeed checkpoint is a set of pickles. Data alone is taken from them: what would be executed is refused by name,
unless --trust-pickle is given. The result resumes on any number of ranks and under any ZeRO stage:
``"checkpoint": {"load_universal": true}`` in the DeepSpeed config, then `engine.load_checkpoint`. Needs no GPU and no
launcher, and memory for one parameter at a time.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final

import deepspeed
import torch

from arsg_dist.checkpoint.convert import TRUST_HELP, members_of, number_or_tensor
from arsg_dist.deepspeed.checkpoint.files import (
    ARSG_SECTION,
    check_state_is_there,
    reading,
    resolve_tag,
    steps_of,
)
from arsg_dist.deepspeed.checkpoint.pickles import load
from arsg_dist.deepspeed.checkpoint.reader import ShardedCheckpoint
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import BUFFER, PARAMETER
from arsg_dist.safe_io.files import inside, make_directory, new_directory, write_text, writing

FORMAT_VERSION = 1

_MASTER: Final = "fp32"


def convert(source: str | Path, target: str | Path, *, trust_pickle: bool = False) -> Path:
    """Write a universal checkpoint.

    The layout is DeepSpeed's: ``zero/PARAMETER/{fp32,exp_avg,exp_avg_sq}.pt``, and here every other state tensor of
    the parameter as well (max_exp_avg_sq, slow_param) and ``step.pt`` where ARSG counts; ``zero/optimizer_state.pt``
    has the settings of each group and the names of its parameters; the model file has buffers and frozen parameters.

    Args:
        source: checkpoint directory with the tag, or the one above it, whose file `latest` names the tag.
        target: a directory that does not exist yet. It appears when it is complete; then `latest_universal` beside it
            names it.
        trust_pickle: execute what the source's files, which are pickles, name besides data, as objects of your own
            classes in the client state. It is refused otherwise.

    Returns:
        The target's path.

    Raises:
        ValueError: the source is no checkpoint of an engine with ARSG, incomplete, without the optimizer's state, names
            something to execute, or the target exists.
        OSError: the target cannot be written.
    """
    target = _new(target)
    where = resolve_tag(Path(source))
    with reading(where):
        saved = ShardedCheckpoint(where, partial(load, trust_pickle=trust_pickle))
        check_state_is_there(where, saved.counters, found=any(map(saved.entries, saved.trained)))
    module = saved.module
    model = {
        **module.common,
        "module": {name: tensor.clone() for name, tensor in {**module.buffers, **module.frozen}.items()},
        "buffer_names": list(module.buffers),
        ARSG_SECTION: {"aliases": module.aliases, "frozen": [*module.frozen, *module.absent]},
    }
    _write_all(target, saved, model, module.common.get("ds_version"))
    return target


def convert_saved(saved: SavedState, target: str | Path) -> Path:
    """Write a universal checkpoint of a run that no engine of DeepSpeed saved; see `convert`.

    It has no schedule: load it with ``load_lr_scheduler_states=False``, or without a scheduler in the config.

    Args:
        saved: any run that tells the group of each parameter; of ARSG, or of an optimizer that DeepSpeed itself loads.
        target: as in `convert`.

    Returns:
        The target's path.

    Raises:
        ValueError: the target exists, or the run lacks something or is damaged.
        OSError: the target cannot be written.
    """
    target = _new(target)
    members_of(saved)
    steps = [int(saved.number(name, "step")) for name in saved.trained if "step" in saved.entries(name)]
    made = max([0, *steps, int(getattr(saved, "progress", {}).get("update", 0))])
    frozen = [name for name in saved.parameters if name not in set(saved.trained)]
    tensors = {name: (BUFFER, name) for name in saved.buffers} | {name: (PARAMETER, name) for name in frozen}
    model = {
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": made,
        "global_samples": 0,
        "skipped_steps": 0,
        **saved.counters,
        "ds_version": deepspeed.__version__,
        "module": {name: saved.whole(*source).clone() for name, source in tensors.items()},
        "buffer_names": saved.buffers,
        ARSG_SECTION: {"aliases": saved.aliases, "frozen": frozen},
    }
    _write_all(target, saved, model, deepspeed.__version__)
    return target


def _new(target: str | Path) -> Path:
    target = Path(target).absolute()
    if os.path.lexists(target):
        raise ValueError(f"{target} exists already; choose another output directory or remove it")
    return target


def _write_all(target: Path, saved: SavedState, model: dict[str, Any], version: Any) -> None:
    with new_directory(target) as directory:
        for name in saved.trained:
            _write_parameter(make_directory(directory, "zero", *steps_of(name, saved.where)), saved, name)
        zero = make_directory(directory, "zero")
        _write(zero / "optimizer_state.pt", _optimizer_state(saved, version))
        # Stages 0 to 2 look for the first name, stage 3 for the other.
        _write(directory / "mp_rank_00_model_states.pt", model)
        os.link(
            directory / "mp_rank_00_model_states.pt", directory / "zero_pp_rank_0_mp_rank_00_model_states.pt"
        )
    write_text(target.parent / "latest_universal", target.name)


def _write_parameter(directory: Path, saved: SavedState, name: str) -> None:
    for key in (_MASTER, *sorted(saved.entries(name))):
        entry = PARAMETER if key == _MASTER else key
        with reading(saved.where):
            whole = saved.spec(entry, name) is not None
            value = saved.whole(entry, name) if whole else number_or_tensor(saved, name, entry)
        _write(inside(directory, f"{key}.pt"), {"param": value, "cat_dim": 0} if whole else value)


def _optimizer_state(saved: SavedState, version: Any) -> dict[str, Any]:
    names = members_of(saved)
    groups = [{**_as_torch_has_them(group), "params": [index]} for index, group in enumerate(saved.groups)]
    counted = next((name for name in saved.trained if "step" in saved.entries(name)), None)
    step = {} if counted is None else {"step": number_or_tensor(saved, counted, "step")}
    return {
        "param_groups": groups,
        # Where DeepSpeed's stage 3 looks for the settings and the step, of other optimizers than ARSG.
        "optimizer_state_dict": {"state": {0: step}, "param_groups": groups},
        "ds_version": version,
        ARSG_SECTION: {"version": FORMAT_VERSION, "groups": names, "loss_scale": saved.loss_scale},
    }


def _as_torch_has_them(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def _write(path: Path, content: Any) -> None:
    with writing(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # how torch's writer says that the disk is full
            raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m arsg_dist.deepspeed.universal", description=__doc__)
    parser.add_argument("input", help="checkpoint directory, as checkpoints/global_step100 or checkpoints")
    parser.add_argument("output", help="directory to make, best beside the input")
    parser.add_argument("--trust-pickle", action="store_true", help=TRUST_HELP)
    parsed = parser.parse_args(arguments)
    try:
        target = convert(parsed.input, parsed.output, trust_pickle=parsed.trust_pickle)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print(  # noqa: T201
        f'wrote {target}: set "checkpoint": {{"load_universal": true}} in the DeepSpeed config and load it with '
        f"engine.load_checkpoint({str(target.parent)!r})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
