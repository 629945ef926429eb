"""From prompts to answers: chunked prefill, then decode segments until every row has ended."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from lsjax.engine import SEGMENT, Engine
from lsjax.hosts import to_host
from lsjax.requests import Request


@dataclasses.dataclass
class Timing:
    """Seconds of one batch, compiling apart.

    Attributes:
      prefill: until the first token of every row.
      decode: from then on.
      first_token: prefill and the compiling before it: what someone waits.
      compile: tracing and compiling, all of it.
      decoded: tokens decoded after the first, the rows' longest count.
      steps: times that the model was run for them.
    """

    prefill: float = 0.0
    decode: float = 0.0
    first_token: float = 0.0
    compile: float = 0.0
    decoded: int = 0
    steps: int = 0


def generate(
    engine: Engine,
    params: dict,
    request: Request,
    timing: Timing,
    on_prefill: Callable[[int], None] | None = None,
) -> Iterator[list[list[int]]]:
    """Answers a batch.

    Args:
      engine: the model's programs.
      params: its parameters.
      request: what to answer.
      timing: filled in as the work goes on.
      on_prefill: called with the number of positions run after each chunk.

    Yields:
      The new ids of each row: first one, then up to a segment at a time. A row's last id is an
      end-of-sequence id, or its max_output_length-th.
    """
    clock, start = engine.clock, time.perf_counter()
    compile_before = clock.seconds
    lengths = np.array([len(p) for p in request.prompts], np.int32)
    tables = engine.tables(request.lengths)
    batch = len(request.prompts)
    spec = request.cache_spec(engine.mesh, engine.cache_dtype, engine.dtype)
    cache = engine.new_cache(spec)
    draw = request.sampling.arrays()

    last = pending = None
    for at in range(0, int(lengths.max()), request.chunk):
        tokens = np.zeros((batch, request.chunk), np.int32)
        for row, prompt in zip(tokens, request.prompts, strict=True):
            part = prompt[at : at + request.chunk]
            row[: len(part)] = part
        cache, last = engine.prefill(params, tables, cache, tokens, at, lengths, last)
        # Wait for the chunk before, so that the device always has the next one queued.
        if pending is not None:
            jax.block_until_ready(pending[1])
            if on_prefill:
                on_prefill(pending[0])
        pending = min(request.chunk, int(lengths.max()) - at), last
    jax.block_until_ready(last)
    if on_prefill:
        on_prefill(pending[0])
    state = engine.first(params, cache, last, lengths, draw)
    del cache
    rows = _Rows(request)
    new = rows.take(to_host(state.token)[:, None].tolist())
    now = time.perf_counter()
    timing.first_token = now - start
    timing.prefill = timing.first_token - (clock.seconds - compile_before)
    timing.compile = clock.seconds - compile_before
    yield new

    start, compile_before = time.perf_counter(), clock.seconds
    if drafted := request.prompt_lookup_num_tokens:
        state = engine.start_lookup(state, *_lookup_rows(request, spec.capacity + 1))
    while not rows.ended:
        if drafted:
            state, tokens = engine.decode_with_lookup(params, tables, state, drafted)
            decoded = _those_that_stand(*map(to_host, tokens))
        else:
            state, tokens = engine.decode(params, tables, state, draw)
            decoded = to_host(tokens).tolist()
        new = rows.take(decoded)
        compiling = clock.seconds - compile_before
        timing.decoded += max(map(len, decoded))
        timing.steps += SEGMENT
        timing.decode += time.perf_counter() - start - compiling
        timing.compile += compiling
        yield new
        start, compile_before = time.perf_counter(), clock.seconds


def _lookup_rows(request: Request, room: int) -> tuple[np.ndarray, np.ndarray]:
    """[batch, room] ids of the prompts, and [batch] positions of the last tokens wanted."""
    tokens = np.zeros((len(request.prompts), room), np.int32)
    for row, prompt in zip(tokens, request.prompts, strict=True):
        row[: len(prompt)] = prompt
    last = [len(prompt) for prompt in request.prompts]  # no more than the first for fillers
    for row in range(request.count):
        last[row] += request.max_output_length - 1
    return tokens, np.array(last)


def _those_that_stand(tokens: np.ndarray, counts: np.ndarray) -> list[list[int]]:
    """[batch, steps, drafted + 1] ids and how many count of each step -> ids of each row."""
    stand = np.arange(tokens.shape[-1]) < counts[..., None]
    return [row[these].tolist() for row, these in zip(tokens, stand, strict=True)]


class _Rows:
    """Which rows have ended, and how much of a segment counts."""

    def __init__(self, request: Request):
        # Rows that only fill the batch up are not waited for.
        fillers = len(request.prompts) - request.count
        self._left = [request.max_output_length] * request.count + [0] * fillers
        self._eos = request.eos_token_ids

    @property
    def ended(self) -> bool:
        return not any(self._left)

    def take(self, tokens: list[list[int]]) -> list[list[int]]:
        return [self._take(row, ids) for row, ids in enumerate(tokens)]

    def _take(self, row: int, ids: Sequence[int]) -> list[int]:
        ids = ids[: self._left[row]]
        self._left[row] -= len(ids)
        for i, token in enumerate(ids):
            if token in self._eos:
                self._left[row] = 0
                return list(ids[: i + 1])
        return list(ids)
