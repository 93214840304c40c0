"""How fast ARSG learns, against its peers: the paper's tables and what goes beyond them. See README.md."""
