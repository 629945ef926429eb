"""Measures how many pass keys hidden in texts a model reads right, by length and depth.

python scripts/eval_needle.py --lengths 512,2048,8192 --rope_scaling auto --plot needle.png
"""

import collections
import sys

import numpy as np
from absl import flags
from tqdm import tqdm

from lsjax.cli.evals.comparison import define_plot_flags, read_earlier
from lsjax.cli.flags import (
    define_model_flags,
    define_rope_scaling_flag,
    model_options,
    parse_lengths,
)
from lsjax.cli.program import run_program
from lsjax.evals.cells import Cells
from lsjax.evals.needle import NeedleMap, needle_map
from lsjax.evals.plots import plot_needle_curves, plot_needles
from lsjax.inference.sparsity import Sparsity, combine
from lsjax.language_model import load
from lsjax.runtime.compilation import enable_persistent_cache

FLAGS = flags.FLAGS


def define_flags() -> None:
    define_model_flags()
    flags.DEFINE_list("lengths", ["512", "1024", "2048"], "Prompt lengths in tokens.")
    flags.DEFINE_integer(
        "depths", 10, "Number of depths, evenly spaced from start to end.", lower_bound=1
    )
    flags.DEFINE_integer(
        "keys_per_cell", 1, "Texts per combination of length and depth.", lower_bound=1
    )
    flags.DEFINE_integer("max_batch_size", 1, "Texts answered together.", lower_bound=1)
    define_rope_scaling_flag()
    flags.DEFINE_string(
        "output_json",
        None,
        "File to write to whether each key was read right. A later run goes on with it.",
    )
    define_plot_flags("the heat map")


def main(argv: list[str]) -> None:
    del argv
    enable_persistent_cache()
    lengths, earlier = parse_lengths(FLAGS.lengths), read_earlier(NeedleMap.of)
    depths = np.linspace(0, 1, FLAGS.depths).round(4).tolist()
    model = load(**model_options(), rope_scaling=FLAGS.rope_scaling)
    measured = model.fingerprint | {"kv_compression": FLAGS.kv_compression}
    cells = Cells(FLAGS.output_json, measured)
    attended: dict[int, list[Sparsity]] = collections.defaultdict(list)
    with tqdm(
        total=len(lengths) * len(depths) * FLAGS.keys_per_cell, unit="text", file=sys.stderr
    ) as bar:
        needles = needle_map(
            model,
            lengths,
            depths,
            FLAGS.keys_per_cell,
            max_batch_size=FLAGS.max_batch_size,
            cells=cells,
            progress=bar.update,
            on_sparsity=lambda length, found: attended[length].append(found),
        )
    for length, share in zip(lengths, needles.by_length(), strict=True):
        density = f"  density {combine(attended[length]).density:.1%}" if attended[length] else ""
        print(f"{length:>10,} tokens  {share:6.1%}{density}")
    if earlier:
        plot_needle_curves(earlier | {FLAGS.label: needles}, FLAGS.plot)
    elif FLAGS.plot:
        title = f"rope_scaling {FLAGS.rope_scaling or 'as in config.json'}"
        plot_needles(needles, title, FLAGS.plot)


def program() -> None:
    run_program(main, define_flags)
