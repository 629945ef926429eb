"""Measures the shipped models with each kind of RoPE scaling and with ALiBi.

See lsjax/cli/evals/shipped.py.
"""

from lsjax.cli.evals.shipped import program

if __name__ == "__main__":
    program()
