"""Trains a model on long texts.

See lsjax/cli/train.py.
"""

from lsjax.cli.train import program

if __name__ == "__main__":
    program()
