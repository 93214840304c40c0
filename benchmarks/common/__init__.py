"""What benchmarks share: the machine, models to train, results that are kept."""
