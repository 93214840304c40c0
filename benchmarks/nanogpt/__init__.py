"""The optimizer track of modded-nanogpt with this package's optimizers: README.md."""
