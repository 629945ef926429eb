"""Flax modules: they define parameters and the order of operations, nothing else."""
