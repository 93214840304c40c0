"""Write and read what a run leaves behind."""
