"""Measures what an int8 or int4 KV cache changes in a model's predictions of a text.

See lsjax/cli/evals/cache.py.
"""

from lsjax.cli.evals.cache import program

if __name__ == "__main__":
    program()
