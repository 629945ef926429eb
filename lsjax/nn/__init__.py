"""The Flax modules: parameters and the order of operations, nothing else."""
