"""Writes passages that contain a pass key, as training data.

See lsjax/cli/make_passages.py.
"""

from lsjax.cli.make_passages import program

if __name__ == "__main__":
    program()
