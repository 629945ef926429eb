"""Checkpoints: reading them onto a mesh, and converting them between layouts."""

from lsjax.checkpoint.load import checkpoint_bytes, load_parameters

__all__ = ["checkpoint_bytes", "load_parameters"]
