"""Measures the shipped models with each kind of RoPE scaling and with ALiBi.

See lsjax/cli/eval_shipped.py.
"""

from lsjax.cli.eval_shipped import program

if __name__ == "__main__":
    program()
