"""Where a run stands: the numbers a checkpoint holds beside weights, optimizer and schedules."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from arsg_dist.safe_io.text import printable


@dataclass
class Position:
    """Counts of a run, the same on every rank.

    Attributes:
        update: weight updates made.
        images: of the training stream used so far (`TrainingOrder.position`): the next image is the one of this number.
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
        """Counts training losses."""
        self.epoch_loss += loss
        self.epoch_images += images
        self.recent_loss += loss
        self.recent_images += images

    def take_recent(self) -> float:
        """Mean loss since the last call."""
        mean = self.recent_loss / max(self.recent_images, 1)
        self.recent_loss, self.recent_images = 0.0, 0
        return mean

    def end_epoch(self) -> float:
        """Counts an epoch and returns its mean training loss."""
        mean = self.epoch_loss / max(self.epoch_images, 1)
        self.epoch_loss, self.epoch_images = 0.0, 0
        self.epoch += 1
        return mean

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Position":
        """From a checkpoint's dict, which may hold more.

        Raises:
            ValueError: a number is missing, or none.
        """
        if not isinstance(values, dict):
            raise ValueError("the checkpoint's position is none")
        names = [field.name for field in fields(cls)]
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


_SUMS = ("epoch_loss", "recent_loss")
