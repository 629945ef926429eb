"""Writes passages that contain a pass key, as training data.

python scripts/make_passages.py --length 4096 --count 1000 --output passages.jsonl
"""

import json
import sys

from absl import flags
from tqdm import tqdm

from lsjax.cli.program import run_program
from lsjax.evals.passkey import make_passage
from lsjax.runtime.text_files import check_writable, write_atomically
from lsjax.shipped.model import ANSWER_TOKENS, weighted

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_integer(
        "length",
        None,
        "Tokens per passage, answer and end token included.",
        lower_bound=128,
        required=True,
    )
    flags.DEFINE_integer("count", None, "Number of passages.", lower_bound=1, required=True)
    flags.DEFINE_string("output", None, "JSON Lines file to write.", required=True)
    flags.DEFINE_string("seed", "0", "Random seed; evaluations use other seeds.")
    flags.DEFINE_integer(
        "most_mentions", 4, "Maximum number of times a passage states its key.", lower_bound=1
    )
    flags.DEFINE_float(
        "answer_weight",
        5.0,
        "Loss weight of tokens of the answer and of repeated keys.",
        lower_bound=0.0,
    )
    flags.DEFINE_float("other_weight", 0.1, "Loss weight of all other tokens.", lower_bound=0.0)


def main(argv: list[str]) -> None:
    del argv
    check_writable(FLAGS.output)
    lines = []
    for i in tqdm(range(FLAGS.count), unit="passage", file=sys.stderr):
        passage = make_passage(
            f"train {FLAGS.seed} {i}",
            FLAGS.length - ANSWER_TOKENS,
            most_mentions=FLAGS.most_mentions,
        )
        document = weighted(passage, FLAGS.answer_weight, FLAGS.other_weight)
        weights = document.weights.round(6).tolist()
        lines.append(json.dumps({"ids": document.ids.tolist(), "weights": weights}) + "\n")
    write_atomically(FLAGS.output, "".join(lines))


def program() -> None:
    run_program(main, define_flags)
