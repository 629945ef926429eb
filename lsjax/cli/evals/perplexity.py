"""Measures the loss by position on a text file, for one or more RoPE scalings.

    python scripts/eval_perplexity.py --text_file book.txt --length 4096 --rope_scaling off \
        --rope_scaling '{"rope_type": "yarn", "factor": 8.0}' --plot curve.png
"""

import dataclasses
from typing import Any

from absl import flags

from lsjax.cli.evals.comparison import define_plot_flags, read_earlier
from lsjax.cli.flags import define_model_flags, model_options
from lsjax.cli.program import run_program
from lsjax.documents import hash_of_ids
from lsjax.evals.cells import Cells
from lsjax.evals.perplexity import Curve, loss_curve
from lsjax.evals.plots import plot_curves
from lsjax.language_model import load
from lsjax.runtime.compilation import enable_persistent_cache
from lsjax.runtime.text_files import read_text

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
    flags.DEFINE_integer(
        "windows",
        4,
        "Largest number of windows of --length tokens that the loss is averaged over.",
        lower_bound=1,
    )
    flags.DEFINE_multi_string(
        "rope_scaling",
        [],
        "RoPE scaling to measure: JSON as in config.json, off, or auto. Repeat the flag for "
        "several. Default: config.json's.",
    )
    flags.DEFINE_string(
        "output_json",
        None,
        "File to write each loss curve to as it comes. A later run measures only what it lacks.",
    )
    define_plot_flags("the loss curves")


def main(argv: list[str]) -> None:
    del argv
    enable_persistent_cache()
    earlier = read_earlier(_curves)
    text = read_text(FLAGS.text_file)
    model = load(**model_options())
    ids = model.tokenizer.encode(text)
    settings = ("length", "prompt_length", "windows", "kv_compression")
    measured = {name: FLAGS[name].value for name in settings} | {"text": hash_of_ids(ids)}
    cells = Cells(FLAGS.output_json, model.fingerprint | measured)
    models = {s: model.with_rope_scaling(s) for s in FLAGS.rope_scaling} or {"config": model}
    curves = {}
    for name, scaled in models.items():
        if cells.missing([name]):
            curve = loss_curve(
                scaled, ids, FLAGS.length, FLAGS.prompt_length, windows=FLAGS.windows
            )
            cells.add({name: dataclasses.asdict(curve)})
        curves[name] = Curve(**cells.values[name])
        density = f", density {curves[name].density:.1%}" if model.options.sparse_prefill else ""
        print(f"{curves[name].perplexity:10.4f}  {name}{density}", flush=True)
    if earlier:
        curves = _labeled(earlier | {FLAGS.label: curves})
    if FLAGS.plot:
        plot_curves(curves, model.config.trained_length, FLAGS.plot)


def _curves(cells: dict[str, Any]) -> dict[str, Curve]:
    return {name: Curve(**cell) for name, cell in cells.items()}


def _labeled(runs: dict[str, dict[str, Curve]]) -> dict[str, Curve]:
    """Returns the curves of runs by label; a run of several scalings has a label for each."""
    return {
        label if len(curves) == 1 else f"{label}, {name}": curve
        for label, curves in runs.items()
        for name, curve in curves.items()
    }


def program() -> None:
    run_program(main, define_flags)
