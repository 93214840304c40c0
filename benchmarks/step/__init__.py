"""Time, communication and memory of a training step in a job of several ranks, one file per engine."""
