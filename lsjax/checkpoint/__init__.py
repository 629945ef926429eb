"""Loads checkpoints onto a mesh, saves them, and converts between their layouts."""

from lsjax.checkpoint.atomic_directory import check_free
from lsjax.checkpoint.convert import convert_hf_to_orbax, convert_orbax_to_hf
from lsjax.checkpoint.load import checkpoint_bytes, load_parameters
from lsjax.checkpoint.model_folder import read_model_config
from lsjax.checkpoint.orbax_checkpoint import holds_int8, is_orbax
from lsjax.checkpoint.save import export_parameters, save_parameters

__all__ = [
    "check_free",
    "checkpoint_bytes",
    "convert_hf_to_orbax",
    "convert_orbax_to_hf",
    "export_parameters",
    "holds_int8",
    "is_orbax",
    "load_parameters",
    "read_model_config",
    "save_parameters",
]
