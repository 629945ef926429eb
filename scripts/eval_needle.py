"""Measures how many pass keys hidden in texts a model reads right, by length and depth.

See lsjax/cli/eval_needle.py.
"""

from lsjax.cli.eval_needle import program

if __name__ == "__main__":
    program()
