"""Trains the small models that come with the library.

    python scripts/train_shipped.py --output_dir=/tmp/passkey
    python scripts/train_shipped.py --positions=alibi --output_dir=/tmp/passkey_alibi

Needs the extra `train` (optax) and takes about ten minutes a model on two CPU cores.
"""

import pathlib
import sys

import jax
from absl import flags

from lsjax import cli
from lsjax.checkpoint.new_folder import new_folder
from lsjax.shipped.export import export
from lsjax.shipped.model import HF_CONFIGS

FLAGS = flags.FLAGS

flags.DEFINE_string("output_dir", None, "New folder for the trained model.", required=True)
flags.DEFINE_enum("positions", "rotary", list(HF_CONFIGS), "How tokens know their places.")
flags.DEFINE_integer("seed", 0, "Of the first parameters and of all passages.")

_MODEL_BYTES = 4_000_000


def main(argv: list[str]) -> None:
    del argv
    from lsjax.shipped.training import Settings, train  # after the flags: optax is an extra

    hf_config = HF_CONFIGS[FLAGS.positions]
    with new_folder(FLAGS.output_dir, _MODEL_BYTES) as temporary:
        params = jax.device_get(train(hf_config, Settings(seed=FLAGS.seed)))
        export(hf_config, params, pathlib.Path(temporary))


if __name__ == "__main__":
    sys.exit(cli.run(main))
