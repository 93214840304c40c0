"""Start a training anywhere, and ask about one before: the command `arsg-dist`."""
