"""Measures the loss by position on a text file, for one or more RoPE scalings.

See lsjax/cli/eval_perplexity.py.
"""

from lsjax.cli.eval_perplexity import program

if __name__ == "__main__":
    program()
