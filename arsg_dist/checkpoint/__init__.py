"""Keep checkpoints on disk, in one format for every engine."""

from arsg_dist.checkpoint.saved_run import SavedRun
from arsg_dist.checkpoint.store import CheckpointStore
from arsg_dist.checkpoint.writer import prepare_save, save_run

__all__ = ["CheckpointStore", "SavedRun", "prepare_save", "save_run"]
