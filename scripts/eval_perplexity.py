"""Loss by position on a text file, for several rope settings in one run.

    python scripts/eval_perplexity.py --text_file book.txt --length 4096 --rope_scaling off \
        --rope_scaling '{"rope_type": "yarn", "factor": 8.0}' --plot curve.png
"""

import dataclasses
import json
import sys

from absl import flags

from lsjax import cli
from lsjax.compilation import enable_persistent_cache
from lsjax.evals.perplexity import loss_curve
from lsjax.evals.plots import plot_curves
from lsjax.files import check_writable, read_text, write_atomically
from lsjax.language_model import load

FLAGS = flags.FLAGS

cli.define_model_flags()
flags.DEFINE_string("text_file", None, "A UTF-8 text of at least --length tokens.", required=True)
flags.DEFINE_integer("length", None, "Tokens read.", required=True, lower_bound=2)
flags.DEFINE_integer(
    "prompt_length",
    0,
    "Of these, tokens of prompt; the others are decoded one by one, and count. 0: all are prompt.",
    lower_bound=0,
)
flags.DEFINE_multi_string(
    "rope_scaling",
    [],
    "JSON as in config.json, off, or auto; may be repeated. config.json's if not.",
)
flags.DEFINE_string("output_json", None, "Write the curves here.")
flags.DEFINE_string("plot", None, "Write a PNG here.")


def main(argv: list[str]) -> None:
    del argv
    enable_persistent_cache()
    for path in filter(None, (FLAGS.output_json, FLAGS.plot)):
        check_writable(path)
    text = read_text(FLAGS.text_file)
    model = load(**cli.model_options())
    ids = model.tokenizer.encode(text)
    models = {s: model.with_rope_scaling(s) for s in FLAGS.rope_scaling} or {"config": model}
    curves = {}
    for name, scaled in models.items():
        curves[name] = loss_curve(scaled, ids, FLAGS.length, FLAGS.prompt_length)
        print(f"{curves[name].perplexity:10.4f}  {name}", flush=True)
    if FLAGS.output_json:
        result = {name: dataclasses.asdict(curve) for name, curve in curves.items()}
        write_atomically(FLAGS.output_json, json.dumps(result, indent=1) + "\n")
    if FLAGS.plot:
        plot_curves(curves, model.config.trained_length, FLAGS.plot)


if __name__ == "__main__":
    sys.exit(cli.run(main))
