"""Write a checkpoint: every rank its shard, then one of them the manifest."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arsg_dist.checkpoint.manifest import (
    LIMIT,
    Manifest,
    StoredPiece,
    StoredTensor,
    decode_numbers,
    decode_tensor,
    encode_numbers,
    encode_tensor,
    merge_tensors,
)
from arsg_dist.checkpoint.memory import Memory
from arsg_dist.checkpoint.safetensors_file import write_safetensors
from arsg_dist.checkpoint.store import CheckpointStore
from arsg_dist.engine import Communicator, EngineState, package_versions
from arsg_dist.safe_io.documents import parse_json, read_json
from arsg_dist.safe_io.files import write_text


def save_run(
    store: CheckpointStore,
    step: int,
    state: EngineState,
    progress: dict[str, Any],
    communicator: Communicator,
    *,
    score: float | None = None,
    wait: bool = True,
) -> Path:
    """Make a checkpoint of a run. Collective.

    Args:
        store: where.
        step: updates made so far; names the checkpoint.
        state: of `Engine.state`, with what the program added to it.
        progress: anything JSON knows, the same on every rank.
        communicator: of all ranks.
        score: larger is better (validation accuracy); None for one that was not validated.
        wait: return when it is in place. Else this returns when the state is copied to main memory, and `store.finish`
            or the next save waits, and raises what went wrong.

    Returns:
        The checkpoint's path.

    Raises:
        JobError: on every rank, when it, or the one before, failed on any; older checkpoints are untouched.
        ValueError: the progress is nested too deeply to be read again.
    """
    store.finish()  # before the copy, which goes into the memory of the last one
    kept = state if wait else snapshot(state, store.memory)
    # As a reader will find it, whatever the caller does with it afterwards.
    progress = parse_json(json.dumps({"progress": progress}), "the program's")["progress"]
    return store.save(
        step,
        lambda directory: write_part(directory, communicator.rank, kept),
        lambda directory: write_manifest(directory, communicator.world_size, kept, progress),
        score=score,
        wait=wait,
    )


def prepare_save(store: CheckpointStore, state: EngineState) -> None:
    """Make the first save in the background as short a stop as the later ones; returns at once.

    Args:
        store: that will save.
        state: of `Engine.state`, after an update: before, an optimizer has no state yet.
    """
    store.memory.prepare(state.pieces)


def snapshot(state: EngineState, memory: Memory) -> EngineState:
    """Copy to main memory, where the training does not change it any more.

    Args:
        state: of this rank.
        memory: of the last copy, which is no longer needed. Holds this copy afterwards.
    """
    return dataclasses.replace(state, pieces=memory.copy(state.pieces))


def write_part(directory: Path, rank: int, state: EngineState) -> None:
    """Write a rank's shard and what it knows to the disk, for `write_manifest`.

    Args:
        directory: of the checkpoint; exists.
        rank: of this process.
        state: of this rank.

    Raises:
        OSError: it could not be written.
        ValueError: a dtype that cannot be stored.
    """
    name = shard_name(rank)
    tensors = {key: StoredTensor(spec, []) for key, spec in state.tensors.items()}
    layout = {piece_name(p.key, p.start): (state.tensors[p.key].dtype, (p.numel,)) for p in state.pieces}

    def values() -> Iterator[Tensor]:
        for piece in state.pieces:
            flat = piece.values().cpu().contiguous()
            tensors[piece.key].pieces.append(StoredPiece(name, piece.start, piece.numel, digest_of(flat)))
            yield flat

    write_safetensors(
        directory / name, layout, values(), {"format": "pt", "arsg_dist": f"shard of rank {rank}"}
    )
    part = {
        "tensors": {key: encode_tensor(tensor) for key, tensor in tensors.items()},
        "numbers": encode_numbers(state.numbers),
        "bytes": (directory / name).stat().st_size,
    }
    write_text(_part(directory, rank), json.dumps(part))


def write_manifest(directory: Path, world_size: int, state: EngineState, progress: dict[str, Any]) -> None:
    """Join what all ranks wrote; afterwards the checkpoint is complete.

    Args:
        directory: of the checkpoint.
        world_size: ranks that wrote a part.
        state: of one of them, for what is the same on all.
        progress: of the program; anything JSON knows.

    Raises:
        OSError: it could not be written, or a part is missing.
        ValueError: the parts do not make a whole.
    """
    parts = [read_json(_part(directory, rank), limit=LIMIT) for rank in range(world_size)]
    numbers: dict[str, dict[str, Any]] = {}
    for part in parts:
        numbers |= decode_numbers(part["numbers"])
    manifest = Manifest(
        engine=state.engine,
        world_size=world_size,
        packages=package_versions(),
        groups=state.groups,
        numbers=numbers,
        aliases=state.aliases,
        loss_scale=state.loss_scale,
        counters=state.counters,
        progress=progress,
        shards={shard_name(rank): part["bytes"] for rank, part in enumerate(parts)},
        tensors=merge_tensors(
            [{key: decode_tensor(tensor) for key, tensor in part["tensors"].items()} for part in parts]
        ),
    )
    manifest.check()
    manifest.write(directory)
    for rank in range(world_size):
        _part(directory, rank).unlink()


def shard_name(rank: int) -> str:
    """Name a rank's file."""
    return f"shard-{rank:05d}.safetensors"


def piece_name(key: str, start: int) -> str:
    """Name a piece in its file."""
    return f"{key}@{start}"


def digest_of(values: Tensor) -> str:
    """Compute the SHA-256 of a contiguous CPU tensor's bytes."""
    content = values.reshape(-1).view(torch.uint8).numpy().data if values.numel() else b""
    return hashlib.sha256(content).hexdigest()


def _part(directory: Path, rank: int) -> Path:
    return directory / f"{shard_name(rank)}.json"
