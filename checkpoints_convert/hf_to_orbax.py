"""Converts a Hugging Face folder into one that Orbax restores.

python checkpoints_convert/hf_to_orbax.py --input_dir=Qwen3-8B --output_dir=Qwen3-8B-orbax
"""

import jax
from absl import flags

from lsjax import cli
from lsjax.checkpoint import checkpoint_bytes, convert_hf_to_orbax
from lsjax.progress import byte_bar

_INPUT_DIR = flags.DEFINE_string(
    "input_dir", None, "Hugging Face folder: config.json and *.safetensors.", required=True
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "The folder to make; it must not exist, or be empty.", required=True
)


def main(_: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    with byte_bar("converting", checkpoint_bytes(_INPUT_DIR.value)) as bar:
        convert_hf_to_orbax(_INPUT_DIR.value, _OUTPUT_DIR.value, bar.update)


if __name__ == "__main__":
    cli.run(main)
