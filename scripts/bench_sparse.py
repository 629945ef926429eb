"""Times the prefill of a text with dense attention and with sparse prefill.

    python scripts/bench_sparse.py --model_path FOLDER --text_file TEXT --length 32768 \
        --rope_scaling '{"rope_type": "yarn", "factor": 4.0}' --sparse_prefill 0.05

Both run the same chunk in turn, and after each of them the first chunk again, whose attention is
short. Attention's time is that of all chunks, less as often that of the first one. So whatever else
the machine does slows both down alike.
"""

import sys
import time

import jax
import numpy as np
from absl import flags

from lsjax.cli.flags import define_model_flags, define_rope_scaling_flag, model_options
from lsjax.cli.program import run_program
from lsjax.inference.sparsity import measure
from lsjax.language_model import LanguageModel, load
from lsjax.runtime.errors import UserError
from lsjax.runtime.text_files import read_text

FLAGS = flags.FLAGS


def define_flags() -> None:
    define_model_flags()
    define_rope_scaling_flag()
    flags.DEFINE_string("text_file", None, "UTF-8 text of at least --length tokens.", required=True)
    flags.DEFINE_integer("length", 8192, "Tokens of the prompt.", lower_bound=1)


def main(argv: list[str]) -> None:
    del argv
    model = load(**model_options(), rope_scaling=FLAGS.rope_scaling)
    ids = model.tokenizer.encode(read_text(FLAGS.text_file))[: FLAGS.length]
    chunk = model.options.prefill_chunk
    if len(ids) < FLAGS.length or len(ids) % chunk:
        raise UserError(f"give a text of --length tokens, a multiple of the chunk of {chunk}.")
    dense, sparse = Prefill(model.with_sparse_prefill(None), ids), Prefill(model, ids)
    for prefill in (dense, sparse):
        prefill.repeat_first()  # compiles
    seconds = np.zeros((0, 3))
    for start in range(0, len(ids), chunk):
        times = dense.run(start), sparse.run(start), dense.repeat_first()
        seconds = np.vstack([seconds, times])
        done = len(seconds)
        if (done > 1 and done & (done - 1) == 0) or done == len(ids) // chunk:
            _print_times(done * chunk, *seconds.sum(axis=0))
    print(f"attended to {measure(sparse.cache, model.config, [len(ids)]) or 'everything'}")


def _print_times(tokens: int, dense: float, sparse: float, first: float) -> None:
    ratio = (dense - first) / (sparse - first)
    print(
        f"{tokens:9,} tokens: dense {dense:.1f} s, of which attention {dense - first:.1f} s; "
        f"sparse {sparse:.1f} s and {sparse - first:.1f} s; attention {ratio:.2f}x as fast",
        flush=True,
    )


class Prefill:
    """The prefill of a prompt, chunk by chunk.

    Attributes:
      cache: cache of the prompt so far.
    """

    def __init__(self, model: LanguageModel, ids: list[int]):
        self._model, self._ids, self._last = model, ids, None
        self._tables = model.engine.tables([len(ids)])
        spec = model.options.cache_spec(1, len(ids), 1)
        self.cache, self._other = (model.engine.new_cache(spec) for _ in range(2))

    def run(self, start: int) -> float:
        """Runs the chunk at `start`; returns the seconds."""
        self.cache, seconds = self._timed(self.cache, start)
        return seconds

    def repeat_first(self) -> float:
        """Runs the first chunk in a cache of its own; returns the seconds."""
        self._other, seconds = self._timed(self._other, 0)
        return seconds

    def _timed(self, cache, start: int):
        model, stop = self._model, start + self._model.options.prefill_chunk
        tokens, lengths = np.array([self._ids[start:stop]]), np.array([len(self._ids)], np.int32)
        begin = time.perf_counter()
        cache, self._last = jax.block_until_ready(
            model.engine.prefill(
                model.params, self._tables, cache, tokens, start, lengths, self._last
            )
        )
        return cache, time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(run_program(main, define_flags))
