"""Replicated data parallelism: every rank holds the whole optimizer."""
