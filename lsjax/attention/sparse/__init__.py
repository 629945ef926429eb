"""Sparse prefill: which blocks of keys queries attend to, and the attention to these alone."""
