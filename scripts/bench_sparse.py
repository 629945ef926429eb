"""Times the prefill of a text with dense attention and with sparse prefill.

    python scripts/bench_sparse.py --model_path FOLDER --text_file TEXT --length 32768 \
        --rope_scaling '{"rope_type": "yarn", "factor": 4.0}' --sparse_prefill 0.1

Both run the same chunk in turn, and after each of them the first chunk again, whose attention is
short. Attention's time is that of all chunks, less as often that of the first one. So whatever else
the machine does slows both down alike.
"""

import dataclasses
import sys
import time

import jax
import numpy as np
from absl import flags

from lsjax.cli.flags import define_model_flags, define_rope_scaling_flag, model_options
from lsjax.cli.program import run_program
from lsjax.errors import UserError
from lsjax.inference.sparsity import measure
from lsjax.language_model import LanguageModel, load
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
    options = dataclasses.replace(model.options, sparse_prefill=None)
    dense, sparse = Prefill(LanguageModel(options, model.params), ids), Prefill(model, ids)
    for prefill in (dense, sparse):
        prefill.repeat_first()  # compiles
    first, of_dense, of_sparse = [], [], []
    for start in range(0, len(ids), chunk):
        of_dense.append(dense.run(start))
        of_sparse.append(sparse.run(start))
        first.append(dense.repeat_first())
    sparsity = measure(sparse.cache, model.config, [len(ids)])
    for name, seconds in (("dense", of_dense), ("sparse", of_sparse)):
        attention = sum(seconds) - sum(first)
        print(f"{name:8} prefill {sum(seconds):8.1f} s, attention {attention:8.1f} s")
    ratio = (sum(of_dense) - sum(first)) / (sum(of_sparse) - sum(first))
    print(f"attention {ratio:.2f}x as fast; prefill {sum(of_dense) / sum(of_sparse):.2f}x")
    print(f"attended to {sparsity or 'everything'}")


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
