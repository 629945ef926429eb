"""Measures the loss by position on a text file, for one or more RoPE scalings.

    python scripts/eval_perplexity.py --text_file book.txt --length 4096 --rope_scaling off \
        --rope_scaling '{"rope_type": "yarn", "factor": 8.0}' --plot curve.png
"""

import dataclasses
import json

from absl import flags

from lsjax.cli.flags import define_model_flags, model_options
from lsjax.cli.program import run_program
from lsjax.evals.perplexity import loss_curve
from lsjax.evals.plots import plot_curves
from lsjax.language_model import load
from lsjax.runtime.compilation import enable_persistent_cache
from lsjax.runtime.text_files import check_writable, read_text, write_atomically

FLAGS = flags.FLAGS


def define_flags() -> None:
    define_model_flags()
    flags.DEFINE_string("text_file", None, "UTF-8 text of at least --length tokens.", required=True)
    flags.DEFINE_integer("length", None, "Number of tokens to read.", required=True, lower_bound=2)
    flags.DEFINE_integer(
        "prompt_length",
        0,
        "Number of these tokens that are the prompt; the others are decoded one by one, and only "
        "they are scored. 0: prefill and score all of them.",
        lower_bound=0,
    )
    flags.DEFINE_multi_string(
        "rope_scaling",
        [],
        "RoPE scaling to measure: JSON as in config.json, off, or auto. Repeat the flag for "
        "several. Default: config.json's.",
    )
    flags.DEFINE_string("output_json", None, "File to write the loss curves to.")
    flags.DEFINE_string("plot", None, "PNG file to plot the loss curves in.")


def main(argv: list[str]) -> None:
    del argv
    enable_persistent_cache()
    for path in filter(None, (FLAGS.output_json, FLAGS.plot)):
        check_writable(path)
    text = read_text(FLAGS.text_file)
    model = load(**model_options())
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


def program() -> None:
    run_program(main, define_flags)
