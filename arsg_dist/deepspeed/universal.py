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
from typing import Any

import torch

from arsg_dist.checkpoint.convert import TRUST_HELP
from arsg_dist.deepspeed.checkpoint.files import (
    ARSG_SECTION,
    SavedCheckpoint,
    check_state_is_there,
    reading,
    resolve_tag,
    steps_of,
)
from arsg_dist.deepspeed.checkpoint.pickles import load
from arsg_dist.deepspeed.checkpoint.reader import ShardedCheckpoint
from arsg_dist.safe_io.files import inside, make_directory, new_directory, write_text, writing

FORMAT_VERSION = 1


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
    target = Path(target).absolute()
    if os.path.lexists(target):
        raise ValueError(f"{target} exists already; choose another output directory or remove it")
    where = resolve_tag(Path(source))
    with reading(where):
        saved = ShardedCheckpoint(where, partial(load, trust_pickle=trust_pickle))
        check_state_is_there(where, saved.counters, found=any(map(saved.entries, saved.trained)))
    with new_directory(target) as directory:
        for name in saved.trained:
            _write_parameter(make_directory(directory, "zero", *steps_of(name, where)), saved, name)
        zero = make_directory(directory, "zero")
        _write(zero / "optimizer_state.pt", _optimizer_state(saved))
        # Stages 0 to 2 look for the first name, stage 3 for the other.
        _write(directory / "mp_rank_00_model_states.pt", _model_state(saved))
        os.link(
            directory / "mp_rank_00_model_states.pt", directory / "zero_pp_rank_0_mp_rank_00_model_states.pt"
        )
    write_text(target.parent / "latest_universal", target.name)
    return target


def _write_parameter(directory: Path, saved: SavedCheckpoint, name: str) -> None:
    for key in ("fp32", *sorted(saved.entries(name))):
        with reading(saved.where):
            value = saved.master(name) if key == "fp32" else saved.state(name, key)
        _write(inside(directory, f"{key}.pt"), value if key == "step" else {"param": value, "cat_dim": 0})


def _optimizer_state(saved: SavedCheckpoint) -> dict[str, Any]:
    assert saved.group_of is not None
    names: list[list[str]] = [[] for _ in saved.groups]
    for name, index in saved.group_of.items():
        names[index].append(name)
    groups = [{**group, "params": [index]} for index, group in enumerate(saved.groups)]
    return {
        "param_groups": groups,
        "ds_version": saved.module.common.get("ds_version"),
        ARSG_SECTION: {"version": FORMAT_VERSION, "groups": names, "loss_scale": saved.loss_scale},
    }


def _model_state(saved: SavedCheckpoint) -> dict[str, Any]:
    module = saved.module
    return {
        **module.common,
        "module": {name: tensor.clone() for name, tensor in {**module.buffers, **module.frozen}.items()},
        "buffer_names": list(module.buffers),
        ARSG_SECTION: {"aliases": module.aliases, "frozen": [*module.frozen, *module.absent]},
    }


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
