"""Attention's arithmetic, without parameters: partial results, and ways to compute and merge them."""
