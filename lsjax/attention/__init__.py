"""Attention's arithmetic, without parameters: partial results, and how they come and merge."""
