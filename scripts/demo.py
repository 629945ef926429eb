"""Asks a published model about a text that is longer than the model was trained for.

See lsjax/cli/demo.py.
"""

from lsjax.cli.demo import program

if __name__ == "__main__":
    program()
