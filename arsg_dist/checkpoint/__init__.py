"""Checkpoints on disk: one format for every engine, which exist, and how a new one appears all at once."""

from arsg_dist.checkpoint.saved_run import SavedRun
from arsg_dist.checkpoint.store import CheckpointStore
from arsg_dist.checkpoint.writer import save_run

__all__ = ["CheckpointStore", "SavedRun", "save_run"]
