"""Checkpoints: reading them onto a mesh, and converting them between layouts."""

from lsjax.checkpoint.convert import convert_hf_to_orbax, convert_orbax_to_hf
from lsjax.checkpoint.load import checkpoint_bytes, load_parameters

__all__ = [
    "checkpoint_bytes",
    "convert_hf_to_orbax",
    "convert_orbax_to_hf",
    "load_parameters",
]
