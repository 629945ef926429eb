"""Measures a model on RULER's kinds of task: needles, chains of variables, frequent words.

    python scripts/eval_ruler.py --model_path /models/X --lengths 2048,8192 \
        --output_json ruler.json --plot ruler.png
"""

import collections
import sys

from absl import flags
from tqdm import tqdm

from lsjax.cli.flags import (
    define_model_flags,
    define_rope_scaling_flag,
    model_options,
    parse_lengths,
)
from lsjax.cli.program import run_program
from lsjax.evals.cells import Cells
from lsjax.evals.plots import plot_task_scores
from lsjax.evals.ruler import TASKS, Table, measure
from lsjax.inference.sparsity import Sparsity, combine
from lsjax.language_model import load
from lsjax.runtime.compilation import enable_persistent_cache
from lsjax.runtime.errors import UserError
from lsjax.runtime.text_files import check_writable

FLAGS = flags.FLAGS
_SHADES = " ▁▂▃▄▅▆▇█"


def define_flags() -> None:
    define_model_flags()
    define_rope_scaling_flag()
    flags.DEFINE_list("lengths", ["1024", "2048", "4096"], "Prompt lengths in tokens.")
    flags.DEFINE_list("tasks", list(TASKS), f"Tasks to measure, of {', '.join(TASKS)}.")
    flags.DEFINE_integer("texts_per_cell", 10, "Texts per task and length.", lower_bound=1)
    flags.DEFINE_string(
        "output_json",
        None,
        "File to keep the score of each text in. A later run asks only for what it lacks.",
    )
    flags.DEFINE_string("plot", None, "PNG file to draw the heat map in.")


def main(_: list[str]) -> None:
    enable_persistent_cache()
    lengths, tasks = parse_lengths(FLAGS.lengths), FLAGS.tasks
    if unknown := [task for task in tasks if task not in TASKS]:
        raise UserError(f"--tasks takes {', '.join(TASKS)}, not {unknown[0]!r}.")
    if FLAGS.plot:
        check_writable(FLAGS.plot)
    model = load(**model_options(), rope_scaling=FLAGS.rope_scaling)
    measured = model.fingerprint | {"kv_compression": FLAGS.kv_compression}
    cells = Cells(FLAGS.output_json, measured)
    attended: dict[int, list[Sparsity]] = collections.defaultdict(list)
    total = len(lengths) * len(tasks) * FLAGS.texts_per_cell
    with tqdm(total=total, unit="text", file=sys.stderr) as bar:
        table = measure(
            model,
            tasks,
            lengths,
            FLAGS.texts_per_cell,
            cells=cells,
            progress=bar.update,
            on_sparsity=lambda length, found: attended[length].append(found),
        )
    print(as_text(table))
    for length in filter(attended.get, lengths):
        print(f"{length:>10,} tokens  attended to {combine(attended[length])}")
    if FLAGS.plot:
        title = f"rope_scaling {FLAGS.rope_scaling or 'as in config.json'}"
        plot_task_scores(table, title, FLAGS.plot)


def as_text(table: Table) -> str:
    """Formats a table with a bar in each cell, as high as its score."""
    width = max(map(len, table.tasks))
    lines = [f"{'tokens':{width}}" + "".join(f"{length:>10,}" for length in table.lengths)]
    for task, scores in zip(table.tasks, table.scores, strict=True):
        cells = (f"{_SHADES[round(s * (len(_SHADES) - 1))]:>5}{s:5.2f}" for s in scores)
        lines.append(f"{task:{width}}" + "".join(cells))
    return "\n".join(lines)


def program() -> None:
    run_program(main, define_flags)
