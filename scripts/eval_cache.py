"""Measures what an int8 or int4 KV cache changes in a model's predictions of a text.

See lsjax/cli/eval_cache.py.
"""

from lsjax.cli.eval_cache import program

if __name__ == "__main__":
    program()
