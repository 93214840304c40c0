"""Export the whole model of an engine or a checkpoint to a safetensors file."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from arsg_dist.checkpoint.export import Layout, Point, check_arguments, export_saved, metadata_of
from arsg_dist.checkpoint.safetensors_file import write_safetensors
from arsg_dist.deepspeed.base_iterate import check_complete, theta_of
from arsg_dist.deepspeed.checkpoint.files import reading
from arsg_dist.deepspeed.checkpoint.partitioning import Piece, read_piece
from arsg_dist.deepspeed.checkpoint.reader import read_checkpoint
from arsg_dist.deepspeed.checkpoint.zero_state import Shard, optimizer_of, shapes_of, shards_of, trained_names
from arsg_dist.engine import TorchCommunicator
from arsg_dist.engine.replicated_state import persistent_buffers


def export(
    source: Any,
    path: str | Path,
    at: Point = "x",
    dtype: torch.dtype = torch.float32,
    *,
    trust_pickle: bool = False,
) -> None:
    """Write parameters and buffers to one safetensors file. From an engine, collective.

    The keys are those of the module's `state_dict`; tied parameters are written under each of their names, so that
    ``model.load_state_dict(safetensors.torch.load_file(path))`` works as it is. Trained parameters come from the fp32
    masters. The file appears complete or not at all.

    Only one parameter at a time is gathered and in memory, besides what the engine holds.

    Args:
        source: an engine of `deepspeed.initialize` (every rank must call this; rank 0 writes), or a checkpoint
            directory, sharded or universal, with the tag or with a file `latest` (a single process).
        path: of the file, best ending in ``.safetensors``; an existing one is replaced. Its directory must exist.
        at: "x", where the parameters are, or "theta", the base iterate.
        dtype: of trained and frozen parameters; buffers keep theirs.
        trust_pickle: execute what the files of a checkpoint directory, which are pickles, name besides data. It is
            refused otherwise.

    Raises:
        ValueError: another value of `at`, a dtype that is not floating, or a directory without such a checkpoint, or
            one that names something to execute, or was saved without the frozen parameters.
        TypeError: neither an engine with ARSG or RemoteObservation nor a directory.
        OSError: rank 0 cannot write; from an engine, JobError on every rank.
        RuntimeError: θ is asked for and the optimizer's state is incomplete, or inside `base_iterate`.
    """
    check_arguments(at, dtype)
    path = Path(path)
    if isinstance(source, str | Path):
        saved = read_checkpoint(source, trust_pickle=trust_pickle)
        if saved.module.absent:
            raise ValueError(
                f"{saved.where} was saved with exclude_frozen_parameters=True and lacks {len(saved.module.absent)} "
                f"parameters of the model, {saved.module.absent[0]!r} among them: load it into an engine whose model "
                "has them (load_module_strict=False), and export that"
            )
        with reading(saved.where):
            export_saved(saved, path, at, dtype)
        return
    optimizer_of(source)._refuse_at_base_iterate("export")
    layout, tensors = _engine_tensors(source, at, dtype)
    communicator = TorchCommunicator(source.device)
    with communicator.fail_together():
        failed = None
        if communicator.rank == 0:
            try:
                write_safetensors(path, layout, tensors, metadata_of(at))
            except OSError as error:
                failed = error
        for (
            _
        ) in tensors:  # the other ranks give their parts, and rank 0 takes part to the end though it failed
            pass
        if failed is not None:
            raise failed


def _engine_tensors(engine: Any, at: Point, dtype: torch.dtype) -> tuple[Layout, Iterator[Tensor]]:
    shapes, names = shapes_of(engine), engine.param_names
    shards = list(shards_of(engine))
    if at == "theta":
        for shard in shards:
            if shard.state:
                check_complete(shard)
    holders: dict[str, list[tuple[Shard, Piece]]] = {}
    for shard in shards:
        for piece in shard.pieces:
            holders.setdefault(piece.name, []).append((shard, piece))
    trained = trained_names(engine)
    of = {key: names[parameter] for key, parameter in engine.module.named_parameters(remove_duplicate=False)}
    parameters = {name: parameter for parameter, name in names.items()}
    buffers = persistent_buffers(engine.module)
    layout: Layout = {key: (dtype, tuple(shapes[name])) for key, name in of.items()}
    layout |= {key: (value.dtype, tuple(value.shape)) for key, value in buffers.items()}

    def tensors() -> Iterator[Tensor]:
        for key in layout:
            if key in buffers:
                yield buffers[key]
            elif of[key] in trained:
                yield _gathered(engine, shapes[of[key]], holders.get(of[key], []), at, shards).to(dtype)
            else:
                parameter = parameters[of[key]]
                with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                    yield parameter.detach().to(dtype, copy=True)

    return layout, tensors()


@torch.no_grad()
def _gathered(
    engine: Any, shape: torch.Size, holders: list[tuple[Shard, Piece]], at: Point, shards: list[Shard]
) -> Tensor:
    whole = torch.zeros(shape.numel(), dtype=torch.float32, device=engine.device)
    for shard, piece in holders:
        cut = partial(read_piece, piece=piece)
        values = theta_of(shard, cut) if at == "theta" and shard.state else cut(shard.master)
        whole.narrow(0, piece.start, piece.numel).copy_(values)
    group = shards[0].process_group
    if group is not None:
        # As integers: each element comes from one rank, and its bits arrive as they are, those of −0 and NaN too.
        torch.distributed.all_reduce(whole.view(torch.int32), group=group)
    return whole.view(shape)
