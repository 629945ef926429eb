"""Measuring what a model can still do at a length: perplexity by position, pass keys by depth."""
