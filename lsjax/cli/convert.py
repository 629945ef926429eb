"""Converts a model folder from Hugging Face to Orbax, or the result back to Hugging Face.

lsjax-convert --input_dir Qwen3-8B --output_dir Qwen3-8B-orbax
lsjax-convert --input_dir Qwen3-8B-orbax --output_dir Qwen3-8B
"""

import jax
from absl import flags

from lsjax.checkpoint import (
    checkpoint_bytes,
    convert_hf_to_orbax,
    convert_orbax_to_hf,
    is_orbax,
)
from lsjax.cli.program import run_program
from lsjax.errors import UserError
from lsjax.nn.int8_weights import WEIGHT_DTYPES
from lsjax.runtime.progress import byte_bar

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string(
        "input_dir",
        None,
        "Model folder to convert: config.json with *.safetensors (Hugging Face) or with params "
        "(Orbax).",
        required=True,
    )
    flags.DEFINE_string(
        "output_dir",
        None,
        "Folder to write, in the other format; it must not exist, or be empty.",
        required=True,
    )
    flags.DEFINE_enum(
        "weight_dtype",
        "auto",
        ["auto", *WEIGHT_DTYPES],
        "Dtype of the matrices that are written: int8, which Orbax folders can hold and which "
        "halves bfloat16's size; auto keeps them as they are.",
    )
    flags.DEFINE_float(
        "max_shard_gb",
        5.0,
        "Largest *.safetensors file to write, in GB of 10^9 bytes.",
        lower_bound=1e-6,
    )


def to_orbax(_: list[str]) -> None:
    if FLAGS["max_shard_gb"].present:
        raise UserError("--max_shard_gb is for *.safetensors files; Orbax writes none.")
    jax.config.update("jax_platforms", "cpu")
    with byte_bar("converting", checkpoint_bytes(FLAGS.input_dir)) as bar:
        convert_hf_to_orbax(FLAGS.input_dir, FLAGS.output_dir, bar.update, FLAGS.weight_dtype)


def to_hf(_: list[str]) -> None:
    if FLAGS.weight_dtype != "auto":
        raise UserError("--weight_dtype is for Orbax folders; a Hugging Face folder holds floats.")
    jax.config.update("jax_platforms", "cpu")
    size = int(FLAGS.max_shard_gb * 1e9)
    with byte_bar("converting", checkpoint_bytes(FLAGS.input_dir)) as bar:
        convert_orbax_to_hf(FLAGS.input_dir, FLAGS.output_dir, bar.update, max_shard_bytes=size)


def main(argv: list[str]) -> None:
    (to_hf if is_orbax(FLAGS.input_dir) else to_orbax)(argv)


def program() -> None:
    """Converts to Orbax, or to Hugging Face if the input folder is an Orbax one."""
    run_program(main, define_flags)


def hf_to_orbax() -> None:
    run_program(to_orbax, define_flags)


def orbax_to_hf() -> None:
    run_program(to_hf, define_flags)
