"""Converts GGUF files, the format of llama.cpp, to Hugging Face folders.

Needs the extra `gguf`, whose package reads the metadata and dequantizes the tensors.
"""

from lsjax.checkpoint.gguf.model import GGUFModel, read_gguf

__all__ = ["GGUFModel", "read_gguf"]
