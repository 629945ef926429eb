"""Converts a folder that hf_to_orbax.py wrote back into a Hugging Face model folder.

See lsjax/cli/convert.py.
"""

from lsjax.cli.convert import orbax_to_hf

if __name__ == "__main__":
    orbax_to_hf()
