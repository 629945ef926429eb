"""Measures the loss by position on a text file, for one or more RoPE scalings.

See lsjax/cli/evals/perplexity.py.
"""

from lsjax.cli.evals.perplexity import program

if __name__ == "__main__":
    program()
