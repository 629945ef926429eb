"""Measures how well a model uses long contexts: perplexity by position, pass keys by depth."""
