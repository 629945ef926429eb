"""Reads a document once and answers questions about it.

See lsjax/cli/ask.py.
"""

from lsjax.cli.ask import program

if __name__ == "__main__":
    program()
