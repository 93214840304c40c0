"""Sharded data parallelism: every rank holds a partition of the optimizer."""
