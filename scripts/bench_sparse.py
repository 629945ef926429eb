"""Times the prefill of a text with dense attention and with sparse prefill, by alpha.

    python scripts/bench_sparse.py --model_path FOLDER --text_file TEXT --length 32768 \
        --rope_scaling '{"rope_type": "yarn", "factor": 4.0}' --alphas 0.1,0.2

The time of attention is that of all chunks, less as often the time of the first chunk, whose
attention is short. Every prompt is run once, after its programs have been compiled.
"""

import dataclasses
import sys
import time

import jax
import numpy as np
from absl import flags

from lsjax.attention.sparse_rule import SparsePrefill
from lsjax.cli.flags import define_model_flags, define_rope_scaling_flag, model_options
from lsjax.cli.program import run_program
from lsjax.errors import UserError
from lsjax.inference.sparsity import Sparsity, measure
from lsjax.language_model import LanguageModel, load
from lsjax.runtime.text_files import read_text

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Times:
    """Times of a prompt's prefill in seconds.

    Attributes:
      first: that of the first chunk.
      chunks: that of all chunks.
      attention: that of attention, see above.
      sparsity: what the prompt has attended to; None if to everything.
    """

    first: float
    chunks: float
    attention: float
    sparsity: Sparsity | None


def define_flags() -> None:
    define_model_flags()
    define_rope_scaling_flag()
    flags.DEFINE_string("text_file", None, "UTF-8 text of at least --length tokens.", required=True)
    flags.DEFINE_integer("length", 8192, "Tokens of the prompt.", lower_bound=1)
    flags.DEFINE_list("alphas", ["0.1"], "Values of alpha to time.")


def main(argv: list[str]) -> None:
    del argv
    model = load(**model_options(), rope_scaling=FLAGS.rope_scaling)
    ids = model.tokenizer.encode(read_text(FLAGS.text_file))[: FLAGS.length]
    chunk = model.options.prefill_chunk
    if len(ids) < FLAGS.length or len(ids) % chunk:
        raise UserError(f"give a text of --length tokens, a multiple of the chunk of {chunk}.")
    dense = prefill(model, ids)
    _say("dense", dense, dense)
    for alpha in map(float, FLAGS.alphas):
        options = dataclasses.replace(model.options, sparse_prefill=SparsePrefill(alpha))
        _say(f"alpha {alpha:g}", prefill(LanguageModel(options, model.params), ids), dense)


def prefill(model: LanguageModel, ids: list[int]) -> Times:
    """Times the prefill of a prompt of whole chunks."""
    engine, chunk = model.engine, model.options.prefill_chunk
    tables, lengths = engine.tables([len(ids)]), np.array([len(ids)], np.int32)

    def run(cache, last, start: int):
        tokens = np.array([ids[start : start + chunk]])
        out = engine.prefill(model.params, tables, cache, tokens, start, lengths, last)
        return jax.block_until_ready(out)

    spec = model.options.cache_spec(1, len(ids), 1)
    cache, last = run(engine.new_cache(spec), None, 0)  # compiles
    cache, seconds = engine.new_cache(spec), []
    for start in range(0, len(ids), chunk):
        begin = time.perf_counter()
        cache, last = run(cache, last, start)
        seconds.append(time.perf_counter() - begin)
    total = sum(seconds)
    attention = total - len(seconds) * seconds[0]
    return Times(seconds[0], total, attention, measure(cache, model.config, lengths))


def _say(name: str, times: Times, dense: Times) -> None:
    ratio = dense.attention / times.attention
    print(
        f"{name:12} prefill {times.chunks:8.1f} s, attention {times.attention:8.1f} s, "
        f"{ratio:5.2f}x of dense; attended to {times.sparsity or 'everything'}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(run_program(main, define_flags))
