"""Measures the shipped models with each kind of RoPE scaling and with ALiBi.

    python scripts/eval_shipped.py --plot scaling.png --output_json scaling.json

or one scaling with sparse prefill:

    python scripts/eval_shipped.py --rope_settings yarn --sparse_prefill none --sparse_prefill 0.05
"""

import dataclasses
import itertools
import json
import sys

from absl import flags
from tqdm import tqdm

from lsjax.cli.flags import parse_lengths
from lsjax.cli.program import run_program
from lsjax.evals.plots import plot_shares
from lsjax.inference.sparse_prefill import parse_sparse_prefill
from lsjax.language_model import load
from lsjax.runtime.compilation import enable_persistent_cache
from lsjax.runtime.errors import UserError
from lsjax.runtime.text_files import check_writable, write_atomically
from lsjax.shipped import shipped_model_path
from lsjax.shipped.evaluation import SETTINGS, Cell, measure, named

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
    flags.DEFINE_multi_string(
        "sparse_prefill",
        ["none"],
        "Sparse prefill to measure each setting with: none, a number alpha or settings as JSON. "
        "Repeat the flag for several values of alpha.",
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
    rules = [parse_sparse_prefill(given) for given in FLAGS.sparse_prefill]
    names = [named(*column) for column in itertools.product(settings, rules)]
    if len(set(names)) < len(names):
        raise UserError("--sparse_prefill has an alpha twice; measure them in runs of their own.")
    if "alibi" in settings and any(rules):
        raise UserError(
            "sparse prefill does not go with ALiBi; leave alibi out of --rope_settings."
        )
    total = len(lengths) * len(names) * FLAGS.keys_per_cell
    with tqdm(total=total, unit="text", file=sys.stderr) as bar:
        cells = list(
            measure(
                load(),
                load(shipped_model_path("alibi")),
                settings,
                lengths,
                FLAGS.keys_per_cell,
                rules=rules,
                max_batch_size=FLAGS.max_batch_size,
                progress=bar.update,
            )
        )
    table = {(cell.setting, cell.length): cell for cell in cells}
    print("share of pass keys read right, perplexity, and with sparse prefill its density")
    print("| tokens |", " | ".join(names), "|")
    print("|---:|" + "---:|" * len(names))
    for length in lengths:
        print(f"| {length:,} |", *(_as_text(table[name, length]) for name in names))
    if FLAGS.output_json:
        result = [dataclasses.asdict(cell) for cell in cells]
        write_atomically(FLAGS.output_json, json.dumps(result, indent=1) + "\n")
    if FLAGS.plot:
        shares = {s: [table[s, length].share for length in lengths] for s in names}
        perplexities = {s: [table[s, length].perplexity for length in lengths] for s in names}
        plot_shares(lengths, shares, perplexities, FLAGS.plot)


def _as_text(cell: Cell) -> str:
    density = f", {cell.density:.0%}" if cell.density < 1 else ""
    return f"{cell.share:.2f}, {cell.perplexity:.2f}{density} |"


def program() -> None:
    run_program(main, define_flags)
