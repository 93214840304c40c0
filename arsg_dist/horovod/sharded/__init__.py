"""Sharded data parallelism: gradients, optimizer state and fp32 masters partitioned over the ranks."""
