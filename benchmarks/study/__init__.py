"""Optimizers compared after the same tuning, on small tasks of today's kinds and on the paper's."""
