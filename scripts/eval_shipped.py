"""What each kind of scaling does to the shipped models: table, plot, JSON.

python scripts/eval_shipped.py --plot scaling.png --output_json scaling.json
"""

import dataclasses
import json
import sys

from absl import flags
from tqdm import tqdm

from lsjax import cli
from lsjax.compilation import enable_persistent_cache
from lsjax.evals.plots import plot_shares
from lsjax.files import check_writable, write_atomically
from lsjax.shipped.evaluation import SETTINGS, measure

FLAGS = flags.FLAGS

flags.DEFINE_list("lengths", ["512", "1024", "2048", "4096", "8192", "16384"], "Tokens of text.")
flags.DEFINE_multi_enum("setting", SETTINGS, SETTINGS, "What to measure; may be repeated.")
flags.DEFINE_integer("keys", 100, "Pass keys for each length and setting.", 1)
flags.DEFINE_integer("max_batch_size", 20, "Texts answered together.", 1)
flags.DEFINE_string("output_json", None, "Write the figures here.")
flags.DEFINE_string("plot", None, "Write a PNG here.")


def main(argv: list[str]) -> None:
    del argv
    enable_persistent_cache()
    for path in filter(None, (FLAGS.output_json, FLAGS.plot)):
        check_writable(path)
    lengths, settings = cli.lengths(FLAGS.lengths), FLAGS.setting
    total = len(lengths) * len(settings) * FLAGS.keys
    with tqdm(total=total, unit="text", file=sys.stderr) as bar:
        cells = list(
            measure(
                settings,
                lengths,
                FLAGS.keys,
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


if __name__ == "__main__":
    sys.exit(cli.run(main))
