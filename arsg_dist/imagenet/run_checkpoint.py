"""What a checkpoint of a run holds."""

from pathlib import Path

from torch import nn

from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.engine import JobError
from arsg_dist.engine.state import EXTRA, key_of
from arsg_dist.imagenet.position import Position
from arsg_dist.imagenet.rank_state import add_rank_state, load_rank_state
from arsg_dist.imagenet.run_directory import CHECKPOINTS, directory_of
from arsg_dist.imagenet.run_parts import RunParts
from arsg_dist.safe_io.files import inside


class RunCheckpoints:
    """The checkpoints of one run: the engine's state, schedules, weight average, place in the data, rank states.

    Args:
        parts: of the run.
        output: the run's directory.

    Raises:
        JobError: on every rank, when the directory of the checkpoints, or one of them, is a link, or a score is none.
    """

    def __init__(self, parts: RunParts, output: Path) -> None:
        self._parts, self._output = parts, output
        with parts.communicator.fail_together(ValueError, OSError):
            directory = directory_of(output, CHECKPOINTS)
            self._store = CheckpointStore(directory, parts.communicator, keep=parts.config.keep_checkpoints)
            self._store.check()

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return self._store.latest()

    def save(self, at: Position, *, score: float | None = None) -> None:
        """Writes a checkpoint; every rank must call it.

        Args:
            at: where the run stands.
            score: validation accuracy at the end of an epoch, None inside one.
        """
        parts, config = self._parts, self._parts.config
        progress = {
            "position": at.as_dict(),
            **self._fixed(),
            "schedules": parts.schedules.state_dict(),
            "ema": parts.average is not None,
        }
        state = parts.engine.state()
        if parts.average:
            averages = {key_of(EXTRA, _ema(name)): tensor for name, tensor in parts.average.parameters()}
            state.add_replicated(averages, parts.communicator.rank, parts.communicator.world_size)
        add_rank_state(state, self._stateful(), parts.communicator.rank)
        save_run(
            self._store,
            at.update,
            state,
            progress,
            parts.communicator,
            score=score,
            wait=not config.async_save,
        )

    def finish(self) -> None:
        """Waits until the last checkpoint is in place; every rank must call it.

        Raises:
            JobError: it could not be written; raised on every rank.
        """
        self._store.finish()

    def resume(self, *, num_images: int, skip_damaged: bool) -> tuple[Position, list[str]]:
        """Goes to where the last checkpoint stands; every rank must call it.

        Args:
            num_images: of the training split.
            skip_damaged: take the newest checkpoint that is not damaged; else a damaged one is an error.

        Returns:
            Where the run stands, and what the user should know about it.

        Raises:
            JobError: there is no checkpoint, or it does not fit this run (other images, another seed or batch size);
                raised on every rank.
        """
        parts = self._parts
        saved, notes = self._newest(skip_damaged=skip_damaged)
        with parts.communicator.fail_together():
            at = _position(saved)
            if at.num_images != num_images:
                raise ValueError(
                    f"--resume: the training split had {at.num_images} images and has {num_images} now: "
                    "the order of images cannot be continued"
                )
            if saved.progress.get("ema") != (parts.average is not None):
                raise ValueError("--resume: ema_decay cannot be switched on or off within a run")
            for name, value in self._fixed().items():
                saved_value = saved.progress.get(name)
                if saved_value is None:
                    notes.append(
                        f"{saved.where} does not say with which {name} it was made: it must be {value}"
                    )
                elif saved_value != value:
                    raise ValueError(
                        f"--resume: this run was made with {name}={saved_value}, not {value}, and {_WHY_FIXED[name]}: "
                        f"resume with --{name} {saved_value}, or start a new run in another --output"
                    )
        parts.engine.load_state(saved)
        with parts.communicator.fail_together():
            parts.schedules.load_state_dict(saved.progress["schedules"])
            if parts.average:
                for name, tensor in parts.average.parameters():
                    saved.check_shape(EXTRA, _ema(name), tensor.shape)
                    tensor.copy_(saved.whole(EXTRA, _ema(name)))
            same_ranks = load_rank_state(
                saved, self._stateful(), parts.communicator, seed=parts.config.seed, update=at.update
            )
        notes.append(
            f"resuming from {saved.where}: {at.update} updates, {at.images} training images in {at.epoch} whole epochs"
        )
        before, ranks = saved.manifest.engine, saved.manifest.world_size
        if before != parts.engine.kind:
            notes.append(f"saved by the engine {before}, going on with {parts.engine.kind}")
        if not same_ranks:
            notes.append(
                f"on another number of ranks than {ranks}: the same images in the same order, but other random numbers "
                "in the network"
            )
        return at, notes

    def _newest(self, *, skip_damaged: bool) -> tuple[SavedRun, list[str]]:
        """The newest checkpoint, every byte of it checked by one of the ranks; what was skipped. Collective."""
        communicator = self._parts.communicator
        names = communicator.from_rank_0([path.name for path in self._store.complete()])
        complete = [inside(self._store.directory, name) for name in names]
        notes: list[str] = []
        for path in reversed(complete):
            damage: list[str] = []
            saved = None
            try:
                saved = SavedRun(path)
                for shard in list(saved.manifest.shards)[communicator.rank :: communicator.world_size]:
                    damage += saved.damage(shard)
            except ValueError as error:
                damage.append(str(error))
            found = sorted({line for lines in communicator.all_gather_object(damage) for line in lines})
            if not found:
                assert saved is not None
                return saved, notes
            if not skip_damaged:
                raise JobError(
                    "--resume: "
                    + "\n".join(found)
                    + "\n(--skip_damaged goes on from the newest checkpoint that is not damaged)"
                )
            notes += [f"skipped {path}: {line}" for line in found]
        nothing = f"--resume: {self._output} has no complete checkpoint; start anew with another --output"
        raise JobError("\n".join([*notes, nothing]))

    def _fixed(self) -> dict[str, int]:
        """Settings that what follows in a run has to share with what came before."""
        return {name: getattr(self._parts.config, name) for name in _WHY_FIXED}

    def _stateful(self) -> dict[str, nn.Module]:
        parts = self._parts
        return {"model": parts.model, **({"ema": parts.average.module} if parts.average else {})}


_WHY_FIXED = {
    "seed": "with another one images of this epoch would be seen twice or never",
    "batch_size": "schedules count its updates (accumulation_steps and the number of ranks may change)",
}


def _ema(name: str) -> str:
    return f"ema {name}"


def _position(saved: SavedRun) -> Position:
    if "position" not in saved.progress or "schedules" not in saved.progress:
        raise ValueError(f"--resume: {saved.where} was not saved by arsg-imagenet")
    return Position.from_dict(saved.progress["position"])
