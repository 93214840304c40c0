"""Find out whether this machine, or the ranks of a job, have what a training needs."""
