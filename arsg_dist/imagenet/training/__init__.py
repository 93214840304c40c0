"""Train a network: parts, loop, optimization, health, checkpoints."""
