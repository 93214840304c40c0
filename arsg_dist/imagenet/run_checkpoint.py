"""What a checkpoint of a run holds."""

from pathlib import Path

from torch import nn

from arsg_dist.checkpoint import CheckpointStore
from arsg_dist.imagenet.position import Position
from arsg_dist.imagenet.rank_state import load_rank_state, save_rank_state
from arsg_dist.imagenet.run_parts import RunParts


class RunCheckpoints:
    """The checkpoints of one run: the engine's state, schedules, weight average, place in the data, rank states.

    Args:
        parts: of the run.
        output: the run's directory.
    """

    def __init__(self, parts: RunParts, output: Path) -> None:
        self._parts, self._output = parts, output
        self._store = CheckpointStore(
            output / "checkpoints", parts.communicator, keep=parts.config.keep_checkpoints
        )

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return self._store.latest()

    def save(self, at: Position, *, score: float | None = None) -> None:
        """Writes a checkpoint; every rank must call it.

        Args:
            at: where the run stands.
            score: validation accuracy at the end of an epoch, None inside one.
        """
        parts = self._parts
        progress = {
            **at.as_dict(),
            "schedules": parts.schedules.state_dict(),
            "ema": parts.average.state_dict() if parts.average else None,
        }

        def write(directory: Path) -> None:
            parts.engine.save(directory, progress)
            save_rank_state(directory, self._stateful(), parts.communicator.rank)

        self._store.save(at.update, write, score=score)

    def resume(self, *, num_images: int) -> tuple[Position, list[str]]:
        """Goes to where the last checkpoint stands; every rank must call it.

        Args:
            num_images: of the training split.

        Returns:
            Where the run stands, and what the user should know about it.

        Raises:
            JobError: there is no checkpoint, or it does not fit this run; raised on every rank.
        """
        parts = self._parts
        path = self.latest()
        with parts.communicator.fail_together():
            if path is None:
                raise ValueError(
                    f"--resume: {self._output} has no complete checkpoint; start anew with another --output"
                )
            progress = parts.engine.load(path)
            at = Position.from_dict(progress)
            if at.num_images != num_images:
                raise ValueError(
                    f"--resume: the training split had {at.num_images} images and has {num_images} now: "
                    "the order of images cannot be continued"
                )
            parts.schedules.load_state_dict(progress["schedules"])
            if (progress["ema"] is None) != (parts.average is None):
                raise ValueError("--resume: ema_decay cannot be switched on or off within a run")
            if parts.average:
                parts.average.load_state_dict(progress["ema"])
            same_ranks = load_rank_state(
                path, self._stateful(), parts.communicator, seed=parts.config.seed, update=at.update
            )
        notes = [
            f"resuming from {path}: {at.update} updates, {at.images} training images in {at.epoch} whole epochs"
        ]
        if not same_ranks:
            notes.append(
                "on another number of ranks: the same images in the same order, but other random numbers in the network"
            )
        return at, notes

    def _stateful(self) -> dict[str, nn.Module]:
        parts = self._parts
        return {"model": parts.model, **({"ema": parts.average.module} if parts.average else {})}
