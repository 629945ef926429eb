"""Measures the shipped models with each kind of RoPE scaling and with ALiBi.

python scripts/eval_shipped.py --plot scaling.png --output_json scaling.json
"""

import dataclasses
import json
import sys

from absl import flags
from tqdm import tqdm

from lsjax.cli.flags import parse_lengths
from lsjax.cli.program import run_program
from lsjax.evals.plots import plot_shares
from lsjax.language_model import load
from lsjax.runtime.compilation import enable_persistent_cache
from lsjax.runtime.text_files import check_writable, write_atomically
from lsjax.shipped import shipped_model_path
from lsjax.shipped.evaluation import SETTINGS, measure

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_list(
        "lengths",
        ["512", "1024", "2048", "4096", "8192", "16384"],
        "Lengths in tokens, prompt and answer together.",
    )
    flags.DEFINE_multi_enum(
        "rope_settings",
        SETTINGS,
        SETTINGS,
        "RoPE settings to measure; repeat the flag for several.",
    )
    flags.DEFINE_integer("keys_per_cell", 100, "Pass keys per length and setting.", lower_bound=1)
    flags.DEFINE_integer("max_batch_size", 20, "Texts answered together.", lower_bound=1)
    flags.DEFINE_string("output_json", None, "File to write the figures to, as JSON.")
    flags.DEFINE_string("plot", None, "PNG file to plot the figures in.")


def main(argv: list[str]) -> None:
    del argv
    enable_persistent_cache()
    for path in filter(None, (FLAGS.output_json, FLAGS.plot)):
        check_writable(path)
    lengths, settings = parse_lengths(FLAGS.lengths), FLAGS.rope_settings
    total = len(lengths) * len(settings) * FLAGS.keys_per_cell
    with tqdm(total=total, unit="text", file=sys.stderr) as bar:
        cells = list(
            measure(
                load(),
                load(shipped_model_path("alibi")),
                settings,
                lengths,
                FLAGS.keys_per_cell,
                max_batch_size=FLAGS.max_batch_size,
                progress=bar.update,
            )
        )
    table = {(cell.setting, cell.length): cell for cell in cells}
    print("share of pass keys read right, and perplexity")
    print("| tokens |", " | ".join(settings), "|")
    print("|---:|" + "---:|" * len(settings))
    for length in lengths:
        row = [table[setting, length] for setting in settings]
        print(f"| {length:,} |", *(f"{c.share:.2f}, {c.perplexity:.2f} |" for c in row))
    if FLAGS.output_json:
        result = [dataclasses.asdict(cell) for cell in cells]
        write_atomically(FLAGS.output_json, json.dumps(result, indent=1) + "\n")
    if FLAGS.plot:
        shares = {s: [table[s, length].share for length in lengths] for s in settings}
        perplexities = {s: [table[s, length].perplexity for length in lengths] for s in settings}
        plot_shares(lengths, shares, perplexities, FLAGS.plot)


def program() -> None:
    run_program(main, define_flags)
