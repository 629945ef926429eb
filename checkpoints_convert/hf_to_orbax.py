"""Converts a Hugging Face model folder into one that Orbax restores.

See lsjax/cli/convert.py.
"""

from lsjax.cli.convert import hf_to_orbax

if __name__ == "__main__":
    hf_to_orbax()
