"""Writes passages with a pass key as data to train on.

python scripts/make_passages.py --length 4096 --count 1000 --output passages.jsonl
"""

import json
import sys

from absl import flags
from tqdm import tqdm

from lsjax import cli
from lsjax.files import check_writable, write_atomically
from lsjax.shipped.model import ANSWER_TOKENS
from lsjax.shipped.passages import make_passage
from lsjax.shipped.weights import weighted

FLAGS = flags.FLAGS

flags.DEFINE_integer("length", None, "Tokens of each, answer and end included.", 128, required=True)
flags.DEFINE_integer("count", None, "How many.", 1, required=True)
flags.DEFINE_string("output", None, "The JSON-lines file to write.", required=True)
flags.DEFINE_string("seed", "0", "Of all that is random; evaluations use others.")
flags.DEFINE_integer("most_mentions", 4, "A passage tells its key up to this many times.", 1)
flags.DEFINE_float("answer_weight", 5.0, "What a token of a key told again counts,", 0.0)
flags.DEFINE_float("other_weight", 0.1, "and what any other does.", 0.0)


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


if __name__ == "__main__":
    sys.exit(cli.run(main))
