"""Run the command `arsg-dist`: start a training anywhere, and ask questions before one. One module per subcommand."""
