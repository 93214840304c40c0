"""Find out whether a machine, or a job's ranks, have what a training needs."""
