"""Measures how many pass keys hidden in texts a model reads right, by length and depth.

See lsjax/cli/evals/needle.py.
"""

from lsjax.cli.evals.needle import program

if __name__ == "__main__":
    program()
