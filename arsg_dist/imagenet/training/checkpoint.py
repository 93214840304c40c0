"""Save where a run stands with its engine's state, and resume from it."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from arsg_dist.checkpoint import CheckpointStore, SavedRun, prepare_save, save_run
from arsg_dist.engine import EngineState, JobError
from arsg_dist.engine.dtensors import add_tensors, read_like
from arsg_dist.engine.state import EXTRA, key_of
from arsg_dist.imagenet.output.run_directory import CHECKPOINTS, CLASSES, directory_of, read_classes
from arsg_dist.imagenet.output.states import OutputState, refusal
from arsg_dist.imagenet.training.identity import OPTIMIZER, Difference, differences
from arsg_dist.imagenet.training.parts import SWITCHES, RunParts, Stateful
from arsg_dist.imagenet.training.rank_state import add_rank_state, load_rank_state
from arsg_dist.safe_io.files import inside
from arsg_dist.safe_io.text import printable

_SUMS = ("epoch_loss", "recent_loss")


@dataclass
class Position:
    """Counts of a run, the same on every rank.

    Attributes:
        update: weight updates made.
        images: of the training stream used so far (`TrainingSampler.position`), the number of the next one.
        epoch: epochs trained and validated.
        epoch_loss: sum of the training losses of the epoch under way.
        epoch_images: how many images it is over.
        recent_loss: sum of the training losses since the last record.
        recent_images: how many images it is over.
        bad_images: left out because they could not be decoded.
        num_images: in the training split.
    """

    update: int = 0
    images: int = 0
    epoch: int = 0
    epoch_loss: float = 0.0
    epoch_images: int = 0
    recent_loss: float = 0.0
    recent_images: int = 0
    bad_images: int = 0
    num_images: int = 0

    def add(self, loss: float, images: int) -> None:
        """Count training losses."""
        self.epoch_loss += loss
        self.epoch_images += images
        self.recent_loss += loss
        self.recent_images += images

    def take_recent(self) -> float:
        """Return the mean loss since the last call."""
        mean = self.recent_loss / max(self.recent_images, 1)
        self.recent_loss, self.recent_images = 0.0, 0
        return mean

    def end_epoch(self) -> float:
        """Count an epoch; return its mean training loss."""
        mean = self.epoch_loss / max(self.epoch_images, 1)
        self.epoch_loss, self.epoch_images = 0.0, 0
        self.epoch += 1
        return mean

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Position":
        """Make it from a checkpoint's dict, which may hold more.

        Raises:
            ValueError: a number is missing, or none.
        """
        if not isinstance(values, dict):
            raise ValueError("the checkpoint's position is none")
        names = [known.name for known in fields(cls)]
        missing = [name for name in names if name not in values]
        if missing:
            raise ValueError(
                f"the checkpoint lacks {', '.join(missing)}: it is of another version of arsg-imagenet"
            )
        for name in names:
            whole = isinstance(values[name], int) and not isinstance(values[name], bool)
            counted = whole and 0 <= values[name] < 1 << 63
            if not (counted or (name in _SUMS and isinstance(values[name], float))):
                raise ValueError(f"the checkpoint's {name} is {printable(values[name], limit=100)!r}")
        return cls(**{name: values[name] for name in names})


class RunCheckpoints:
    """The checkpoints of one run: engine, stateful parts, position, rank states.

    Args:
        parts: of the run.
        output: the run's directory.

    Attributes:
        shown: lr and μ of the last update, for the record of an epoch that a start before this one trained; empty where
            a checkpoint does not say.
        any_saved: whether this start has saved a checkpoint or gone on from one; the same on every rank.

    Raises:
        JobError: on every rank, when the directory of the checkpoints, or one of them, is a link, or a score is none.
    """

    def __init__(self, parts: RunParts, output: Path) -> None:
        self._parts, self._output = parts, output
        self.shown: dict[str, float] = {}
        self.any_saved = False
        self._prepared = False
        with parts.communicator.fail_together(ValueError, OSError):
            directory = directory_of(output, CHECKPOINTS)
            self._store = CheckpointStore(directory, parts.communicator, keep=parts.config.keep_checkpoints)
            self._store.check()

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint."""
        return self._store.latest()

    def save(self, at: Position, *, score: float | None = None) -> None:
        """Write a checkpoint. Collective.

        Args:
            at: where the run stands.
            score: validation accuracy at the end of an epoch, None inside one.
        """
        self.any_saved = self._prepared = True
        state, progress = self._state(at)
        save_run(
            self._store,
            at.update,
            state,
            progress,
            self._parts.communicator,
            score=score,
            wait=not self._parts.config.async_save,
        )

    def prepare(self) -> None:
        """Make the first save in the background stop the training no longer than the later ones. Collective.

        After an update: before the first, an optimizer has no state. Does nothing where nothing is to be prepared.
        """
        if self._parts.config.async_save and not self._prepared:
            self._prepared = True
            prepare_save(self._store, self._state(Position())[0])

    def _state(self, at: Position) -> tuple[EngineState, dict[str, Any]]:
        """Make what a checkpoint holds: state and progress. Collective."""
        parts = self._parts
        rank, world_size = parts.communicator.rank, parts.communicator.world_size
        progress: dict[str, Any] = {"position": at.as_dict(), **self._fixed(), "identity": parts.identity}
        progress["shown"] = self.shown
        state = parts.engine.state()
        for name, part in parts.stateful.items():
            own = part.state_dict() if part else {}
            if _of_tensors(own):
                tensors = {key_of(EXTRA, f"{name} {key}"): tensor for key, tensor in own.items()}
                add_tensors(state, tensors, rank, world_size)
                progress[name] = part is not None
            else:
                progress[name] = own
        add_rank_state(state, parts.networks, rank)
        return state, progress

    def finish(self) -> None:
        """Wait until the last checkpoint is in place. Collective.

        Raises:
            JobError: it could not be written; raised on every rank.
        """
        self._store.finish()

    def resume(
        self, *, num_images: int, skip_damaged: bool, allowed: Collection[str] = ()
    ) -> tuple[Position, list[str]]:
        """Go on from where the last checkpoint stands. Collective.

        Nothing in the run's directory is changed.

        Args:
            num_images: of the training split.
            skip_damaged: take the newest checkpoint that is not damaged; else a damaged one is an error.
            allowed: kinds of `identity.ALLOWED` that may differ from the run that saved it.

        Returns:
            Where the run stands, and what the user should know about it.

        Raises:
            JobError: there is no checkpoint, or it is of another run, with each difference; raised on every rank.
        """
        parts = self._parts
        saved, notes = self._newest(skip_damaged=skip_damaged)
        with parts.communicator.fail_together():
            at, self.shown = _position(saved), _shown(saved)
            found = self._differences(saved, at, num_images)
            if refused := [difference.text for difference in found if difference.kind not in allowed]:
                raise ValueError("--resume: " + "\n".join(refused))
            notes += [
                f"{difference.what} (allowed by --allow_other_{difference.kind})" for difference in found
            ]
            notes += self._unsaid(saved)
        self.any_saved = True
        parts.engine.load_state(saved)
        with parts.communicator.fail_together():
            for name, part in parts.stateful.items():
                if part:
                    part.load_state_dict(_saved_state(saved, name, part))
            settings = {
                difference.key: difference.key.removeprefix(OPTIMIZER)
                for difference in found
                if difference.kind == "optimizer"
            }
            parts.schedules.change_optimizer(
                {name: saved.progress["identity"][key] for key, name in settings.items()},
                {name: parts.identity[key] for key, name in settings.items()},
            )
            same_ranks = load_rank_state(
                saved, parts.networks, parts.communicator, seed=parts.config.seed, update=at.update
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

    def _differences(self, saved: SavedRun, at: Position, num_images: int) -> list[Difference]:
        """Name everything that makes a checkpoint another run's; those that no flag lets pass first."""
        parts = self._parts
        now = {**parts.identity, **self._fixed()}
        before = saved.progress.get("identity", {})
        known = {name: saved.progress[name] for name in self._fixed() if saved.progress.get(name) is not None}
        found = differences({**before, **known} if isinstance(before, dict) else before, now)
        of_classes = None if any(one.key == "num_classes" for one in found) else self._other_classes()
        if of_classes:  # with the names, which the record does not have
            found = [of_classes, *(one for one in found if one.key != "classes")]
        if at.num_images != num_images:
            what = (
                f"the training split had {at.num_images} images and has {num_images} now: the order of images cannot "
                "be continued"
            )
            found = [
                Difference("num_images", what, "put them back, or start a new run in another --output"),
                *(one for one in found if one.key != "train_files"),
            ]
        for name, setting in SWITCHES.items():
            if saved.progress.get(name) != (parts.stateful[name] is not None):
                what = f"{setting} cannot be switched on or off within a run"
                found.append(
                    Difference(setting, what, "set it as it was, or start a new run in another --output")
                )
        return sorted(found, key=lambda one: one.kind != "")

    def _other_classes(self) -> Difference | None:
        try:
            before = read_classes(self._output)
        except FileNotFoundError:
            return None
        now = self._parts.classes
        if before == now:
            return None
        gone, new = (
            printable(", ".join([name for name in some if name not in others][:10]) or "nothing else")
            for some, others in ((before, now), (now, before))
        )
        kind = "classes" if len(before) == len(now) else ""
        goes_on = "go on by --allow_other_classes if each label means the same as before, " if kind else ""
        return Difference(
            "classes",
            "the classes are not those of the run, and labels would mean others: "
            f"{self._output / CLASSES} has {gone}, the data has {new}, in this order or another",
            f"give the directories their names back, {goes_on}or start a new run in another --output",
            kind,
        )

    def _unsaid(self, saved: SavedRun) -> list[str]:
        """Say what a checkpoint of an earlier version cannot be asked."""
        notes = [
            f"{saved.where} does not say with which {name} it was made: it must be {value}"
            for name, value in self._fixed().items()
            if saved.progress.get(name) is None
        ]
        if "identity" not in saved.progress:
            notes.append(
                f"{saved.where} does not say with which data, model, loss, optimizer and precision it was made: "
                "they must be those of now"
            )
        return notes

    def _newest(self, *, skip_damaged: bool) -> tuple[SavedRun, list[str]]:
        """Find the newest checkpoint, and check every byte on some rank. Collective."""
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
        nothing = (
            f"--resume: {self._output} has no complete checkpoint that is whole; start anew with another --output"
            if complete
            else refusal(OutputState.RECORDS, True, self._output)
        )
        raise JobError("\n".join([*notes, nothing]))

    def _fixed(self) -> dict[str, int]:
        """Return the settings that no start of a run may change."""
        return {name: getattr(self._parts.config, name) for name in ("seed", "batch_size")}


def _of_tensors(state: dict[str, Any]) -> bool:
    return all(isinstance(value, Tensor) for value in state.values())


def _saved_state(saved: SavedRun, name: str, part: Stateful) -> Any:
    """Read the state of a part: tensors of its shapes, or plain values unchecked."""
    own = part.state_dict()
    if not _of_tensors(own):
        return saved.progress[name]
    for key, tensor in own.items():
        saved.check_shape(EXTRA, f"{name} {key}", tensor.shape)
    return {key: read_like(saved, EXTRA, f"{name} {key}", tensor) for key, tensor in own.items()}


def _shown(saved: SavedRun) -> dict[str, float]:
    shown = saved.progress.get("shown", {})
    good = isinstance(shown, dict) and all(
        name in ("lr", "mu") and isinstance(value, float) for name, value in shown.items()
    )
    if not good:
        raise ValueError(f"the checkpoint's shown is {printable(shown, limit=100)!r}")
    return dict(shown)


def _position(saved: SavedRun) -> Position:
    if "position" not in saved.progress or "schedules" not in saved.progress:
        raise ValueError(f"--resume: {saved.where} was not saved by arsg-imagenet")
    return Position.from_dict(saved.progress["position"])
