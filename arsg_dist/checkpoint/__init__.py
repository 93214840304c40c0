"""Checkpoints on disk: which exist, which is the newest complete one, and how a new one appears all at once."""

from arsg_dist.checkpoint.store import CheckpointStore

__all__ = ["CheckpointStore"]
