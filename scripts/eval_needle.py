"""Pass keys hidden in texts: how many are read right, by length and depth, for any model.

python scripts/eval_needle.py --lengths 512,2048,8192 --rope_scaling auto --plot needle.png
"""

import dataclasses
import json
import sys

import numpy as np
from absl import flags
from tqdm import tqdm

from lsjax import cli
from lsjax.compilation import enable_persistent_cache
from lsjax.errors import UserError
from lsjax.evals.needle import NeedleMap, needle_map
from lsjax.evals.plots import plot_needle_curves, plot_needles
from lsjax.files import check_writable, read_text, write_atomically
from lsjax.language_model import load

FLAGS = flags.FLAGS

cli.define_model_flags()
flags.DEFINE_list("lengths", ["512", "1024", "2048"], "Tokens of prompt.")
flags.DEFINE_integer("depths", 10, "Depths, evenly spread from the start to the end.", 1)
flags.DEFINE_integer("keys", 1, "Texts for each length and depth.", 1)
flags.DEFINE_integer("max_batch_size", 1, "Texts answered together.", 1)
flags.DEFINE_string("rope_scaling", None, "JSON as in config.json, off, or auto.")
flags.DEFINE_string("output_json", None, "Write the shares here.")
flags.DEFINE_string("plot", None, "Write a heat map here, as PNG.")
flags.DEFINE_multi_string(
    "beside",
    [],
    "name=file: a file that --output_json wrote. The plot is then of curves by length, these and "
    "this one's; may be repeated.",
)
flags.DEFINE_string("name", "this", "Of this one's curve.")


def main(argv: list[str]) -> None:
    del argv
    enable_persistent_cache()
    for path in filter(None, (FLAGS.output_json, FLAGS.plot)):
        check_writable(path)
    lengths = cli.lengths(FLAGS.lengths)
    if FLAGS.beside and not FLAGS.plot:
        raise UserError("--beside says what to plot; give --plot too.")
    earlier = dict(map(_earlier, FLAGS.beside))
    depths = np.linspace(0, 1, FLAGS.depths).round(4).tolist()
    model = load(**cli.model_options(), rope_scaling=FLAGS.rope_scaling)
    with tqdm(total=len(lengths) * len(depths) * FLAGS.keys, unit="text", file=sys.stderr) as bar:
        needles = needle_map(
            model,
            lengths,
            depths,
            FLAGS.keys,
            max_batch_size=FLAGS.max_batch_size,
            progress=bar.update,
        )
    for length, share in zip(lengths, needles.by_length(), strict=True):
        print(f"{length:>10,} tokens  {share:6.1%}")
    if FLAGS.output_json:
        result = dataclasses.asdict(needles)
        write_atomically(FLAGS.output_json, json.dumps(result, indent=1) + "\n")
    if earlier:
        plot_needle_curves(earlier | {FLAGS.name: needles}, FLAGS.plot)
    elif FLAGS.plot:
        title = f"rope_scaling {FLAGS.rope_scaling or 'as in config.json'}"
        plot_needles(needles, title, FLAGS.plot)


def _earlier(given: str) -> tuple[str, NeedleMap]:
    """What a --beside names."""
    name, _, file = given.partition("=")
    try:
        return name, NeedleMap(**json.loads(read_text(file)))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--beside {given!r} must be name=file, a file that --output_json wrote ({error})."
        ) from None


if __name__ == "__main__":
    sys.exit(cli.run(main))
