"""Trains the small model that comes with the library, or measures one that was trained.

    python scripts/train_shipped.py --output_dir=/tmp/passkey
    python scripts/train_shipped.py --evaluate=/tmp/passkey

Training needs the extra `train` (optax) and takes about half an hour on two CPU cores.
"""

import pathlib

import jax
from absl import flags

from lsjax import cli
from lsjax.checkpoint import load_parameters
from lsjax.checkpoint.new_folder import new_folder
from lsjax.errors import UserError
from lsjax.families import read_config
from lsjax.sharding import make_mesh, parse_mesh
from lsjax.shipped.evaluation import SCALINGS, held_out_passages, scaling_for, share_right
from lsjax.shipped.export import export

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "New folder for the trained model.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the first parameters and of all passages.")
_EVALUATE = flags.DEFINE_string("evaluate", None, "Folder of a model to measure instead.")
_LENGTHS = flags.DEFINE_list("lengths", ["512", "1024", "2048", "4096"], "Tokens to measure at.")
_SCALINGS = flags.DEFINE_list("scalings", list(SCALINGS), "Rope scalings to measure with.")
_KEYS = flags.DEFINE_integer("keys", 100, "Passages for each number measured.", lower_bound=1)

_MODEL_BYTES = 4_000_000


def main(_: list[str]) -> None:
    if (_OUTPUT_DIR.value is None) == (_EVALUATE.value is None):
        raise UserError("give either --output_dir, to train, or --evaluate, to measure.")
    if _OUTPUT_DIR.value is not None:
        _train(_OUTPUT_DIR.value)
    else:
        _evaluate(_EVALUATE.value)


def _train(folder: str) -> None:
    from lsjax.shipped.training import Settings, train  # optax is not needed to measure

    with new_folder(folder, _MODEL_BYTES) as temporary:
        export(jax.device_get(train(Settings(seed=_SEED.value))), pathlib.Path(temporary))


def _evaluate(folder: str) -> None:
    """Prints the share of pass keys read right, by length and scaling."""
    config = read_config(folder)
    params = load_parameters(folder, config, make_mesh(parse_mesh("")), "float32")
    print("tokens", *_SCALINGS.value, sep="\t")
    for length in map(int, _LENGTHS.value):
        passages = held_out_passages(length, _KEYS.value)
        shares = (
            share_right(config, params, passages, scaling_for(kind, length))
            for kind in _SCALINGS.value
        )
        print(length, *(f"{share:.2f}" for share in shares), sep="\t", flush=True)


if __name__ == "__main__":
    cli.run(main)
