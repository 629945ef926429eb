"""Converts a model from Hugging Face to Orbax, or from Orbax or GGUF to Hugging Face.

lsjax-convert --input_dir Qwen3-8B --output_dir Qwen3-8B-orbax
lsjax-convert --input_dir Qwen3-8B-orbax --output_dir Qwen3-8B
lsjax-convert --input_dir Qwen3-8B-Q4_K_M.gguf --output_dir Qwen3-8B
"""

import os

import jax
from absl import flags

from lsjax.checkpoint import (
    check_free,
    checkpoint_bytes,
    convert_hf_to_orbax,
    convert_orbax_to_hf,
    is_orbax,
)
from lsjax.cli.flags import define_progress_flag
from lsjax.cli.program import import_extra, run_program
from lsjax.nn.int8_weights import WEIGHT_DTYPES
from lsjax.runtime.errors import UserError
from lsjax.runtime.progress import byte_bar

FLAGS = flags.FLAGS


def define_flags() -> None:
    define_progress_flag()
    flags.DEFINE_string(
        "input_dir",
        None,
        "Model to convert: a folder that holds config.json with *.safetensors (Hugging Face) or "
        "with params (Orbax), or a GGUF file.",
        required=True,
    )
    flags.DEFINE_string(
        "output_dir",
        None,
        "Folder to write: Orbax from Hugging Face, otherwise Hugging Face; it must not exist, or "
        "be empty.",
        required=True,
    )
    flags.DEFINE_enum(
        "weight_dtype",
        "auto",
        ["auto", *WEIGHT_DTYPES],
        "Dtype of the matrices that are written: int8, which Orbax folders can hold and which "
        "halves bfloat16's size; auto keeps them as they are.",
    )
    flags.DEFINE_enum(
        "dtype",
        "bfloat16",
        ["bfloat16", "float32"],
        "Dtype of the weights that are written from a GGUF file: bfloat16 rounds them, float32 "
        "holds them exactly.",
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
    _refuse_dtype()
    jax.config.update("jax_platforms", "cpu")
    with byte_bar("converting", checkpoint_bytes(FLAGS.input_dir)) as bar:
        convert_hf_to_orbax(FLAGS.input_dir, FLAGS.output_dir, bar.update, FLAGS.weight_dtype)


def to_hf(_: list[str]) -> None:
    _refuse_weight_dtype()
    _refuse_dtype()
    jax.config.update("jax_platforms", "cpu")
    with byte_bar("converting", checkpoint_bytes(FLAGS.input_dir)) as bar:
        convert_orbax_to_hf(
            FLAGS.input_dir, FLAGS.output_dir, bar.update, max_shard_bytes=_max_shard_bytes()
        )


def from_gguf(_: list[str]) -> None:
    _refuse_weight_dtype()
    jax.config.update("jax_platforms", "cpu")
    gguf = import_extra("gguf", "lsjax.checkpoint.gguf")
    check_free(FLAGS.output_dir)
    model = gguf.read_gguf(FLAGS.input_dir, FLAGS.dtype)
    with byte_bar("converting", model.nbytes) as bar:
        model.save_hf(FLAGS.output_dir, bar.update, _max_shard_bytes())


def _refuse_dtype() -> None:
    if FLAGS["dtype"].present:
        raise UserError(
            "--dtype is for GGUF files; other conversions keep the dtypes that are there."
        )


def _refuse_weight_dtype() -> None:
    if FLAGS.weight_dtype != "auto":
        raise UserError("--weight_dtype is for Orbax folders; a Hugging Face folder holds floats.")


def _max_shard_bytes() -> int:
    return int(FLAGS.max_shard_gb * 1e9)


def main(argv: list[str]) -> None:
    if os.path.isfile(FLAGS.input_dir):
        from_gguf(argv)
    else:
        (to_hf if is_orbax(FLAGS.input_dir) else to_orbax)(argv)


def program() -> None:
    """Converts in the direction that the input asks for."""
    run_program(main, define_flags)


def hf_to_orbax() -> None:
    run_program(to_orbax, define_flags)


def orbax_to_hf() -> None:
    run_program(to_hf, define_flags)


def gguf_to_hf() -> None:
    run_program(from_gguf, define_flags)
