"""Start a training on this machine, a list of hosts, or through a scheduler."""
