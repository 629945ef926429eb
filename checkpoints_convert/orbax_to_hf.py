"""Converts a folder that hf_to_orbax.py wrote back into a Hugging Face folder.

python checkpoints_convert/orbax_to_hf.py --input_dir=Qwen3-8B-orbax --output_dir=Qwen3-8B
"""

import jax
from absl import flags

from lsjax import cli
from lsjax.checkpoint import checkpoint_bytes, convert_orbax_to_hf
from lsjax.progress import byte_bar

_INPUT_DIR = flags.DEFINE_string(
    "input_dir", None, "Converted folder: config.json and params.", required=True
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "The folder to make; it must not exist, or be empty.", required=True
)
_MAX_SHARD_GB = flags.DEFINE_float(
    "max_shard_gb", 5.0, "Largest *.safetensors file, in GB of 10^9 bytes.", lower_bound=1e-6
)


def main(_: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    with byte_bar("converting", checkpoint_bytes(_INPUT_DIR.value)) as bar:
        convert_orbax_to_hf(
            _INPUT_DIR.value,
            _OUTPUT_DIR.value,
            bar.update,
            max_shard_bytes=int(_MAX_SHARD_GB.value * 1e9),
        )


if __name__ == "__main__":
    cli.run(main)
