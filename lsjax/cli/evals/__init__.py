"""Programs that measure a model: each behind a script of scripts/, eval_*.py."""
