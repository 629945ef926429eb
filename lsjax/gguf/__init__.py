"""Converts GGUF files, the format of llama.cpp, to Hugging Face folders.

Needs the extra `gguf`, whose package reads the metadata and dequantizes the tensors.
"""

from lsjax.gguf.convert import convert_gguf_to_hf
from lsjax.gguf.file import GGUFFile, open_gguf

__all__ = ["GGUFFile", "convert_gguf_to_hf", "open_gguf"]
