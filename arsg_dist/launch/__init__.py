"""The command `arsg-dist`: starting a training anywhere, and asking questions before one. One file per subcommand."""
