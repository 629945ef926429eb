"""Converts a GGUF file into a Hugging Face model folder.

See lsjax/cli/convert.py.
"""

from lsjax.cli.convert import gguf_to_hf

if __name__ == "__main__":
    gguf_to_hf()
