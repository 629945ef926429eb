"""Measures what an int8 or int4 KV cache changes in a model's predictions of a text.

python scripts/eval_cache.py --model_path /models/X --text_file book.txt --length 8192
"""

import dataclasses

from absl import flags

from lsjax.cache import CACHE_DTYPES
from lsjax.cli.flags import define_model_flags, define_rope_scaling_flag, model_options
from lsjax.cli.program import run_program
from lsjax.documents import hash_of_ids
from lsjax.evals.cache_dtypes import Scores, difference, scores
from lsjax.evals.cells import Cells
from lsjax.language_model import LanguageModel, load
from lsjax.runtime.compilation import enable_persistent_cache
from lsjax.runtime.errors import UserError
from lsjax.runtime.text_files import read_text

FLAGS = flags.FLAGS


def define_flags() -> None:
    define_model_flags()
    define_rope_scaling_flag()
    flags.DEFINE_string("text_file", None, "UTF-8 text of at least --length tokens.", required=True)
    flags.DEFINE_integer("length", None, "Number of tokens to read.", required=True, lower_bound=2)
    flags.DEFINE_list(
        "compare",
        ["int8", "int4"],
        f"Dtypes to compare with --kv_cache_dtype, of {', '.join(CACHE_DTYPES)}.",
    )
    flags.DEFINE_string(
        "output_json",
        None,
        "File to keep each dtype's predictions in. A later run measures only what it lacks.",
    )


def main(_: list[str]) -> None:
    enable_persistent_cache()
    if unknown := [dtype for dtype in FLAGS.compare if dtype not in CACHE_DTYPES]:
        raise UserError(f"--compare takes {', '.join(CACHE_DTYPES)}, not {unknown[0]!r}.")
    text = read_text(FLAGS.text_file)
    model = load(**model_options(), rope_scaling=FLAGS.rope_scaling)
    ids = model.tokenizer.encode(text)
    if len(ids) < FLAGS.length:
        raise UserError(
            f"{FLAGS.text_file} has {len(ids)} tokens; give a longer text, or that --length."
        )
    ids = ids[: FLAGS.length]
    measured = model.fingerprint | {"text": hash_of_ids(ids)}
    cells = Cells(FLAGS.output_json, measured)
    reference = model.options.kv_cache_dtype
    print("cache         loss   change  per token  same top token")
    for dtype in dict.fromkeys([reference, *FLAGS.compare]):
        if cells.missing([dtype]):
            cells.add({dtype: dataclasses.asdict(scores(_with_cache(model, dtype), ids))})
        found = Scores(**cells.values[dtype])
        d = difference(found, Scores(**cells.values[reference]))
        print(
            f"{dtype:8}{d.loss:10.5f}{d.change:+9.3%}{d.per_token:11.5f}{d.agreement:16.2%}",
            flush=True,
        )


def _with_cache(model: LanguageModel, dtype: str) -> LanguageModel:
    options = dataclasses.replace(model.options, kv_cache_dtype=dtype)
    return LanguageModel(options, model.params)


def program() -> None:
    run_program(main, define_flags)
