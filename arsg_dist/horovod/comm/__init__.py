"""Collectives over Horovod's ranks, and the checks around them."""
