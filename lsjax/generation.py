"""From prompts to answers: chunked prefill, then decode segments until every row has ended."""

import bisect
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from lsjax.compilation import CLOCK
from lsjax.engine import Engine
from lsjax.errors import UserError
from lsjax.hosts import to_host
from lsjax.progress import prefill_cost
from lsjax.requests import Request
from lsjax.sampling import NOT_A_NUMBER
from lsjax.stop_strings import Stopper


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
      cache_bytes: of the cache, over all devices but counted once.
    """

    prefill: float = 0.0
    decode: float = 0.0
    first_token: float = 0.0
    compile: float = 0.0
    decoded: int = 0
    steps: int = 0
    cache_bytes: int = 0


def generate(
    engine: Engine,
    params: dict,
    request: Request,
    timing: Timing,
    on_prefill: Callable[[int], None] | None = None,
    stopper: Stopper | None = None,
) -> Iterator[list[list[int]]]:
    """Answers a batch.

    Args:
      engine: the model's programs.
      params: its parameters.
      request: what to answer.
      timing: filled in as the work goes on.
      on_prefill: called with the number of positions run after each chunk.
      stopper: knows the texts that end a row; None for none.

    Yields:
      The new ids of each row: first one, then up to a segment at a time. A row's last id is an
      end-of-sequence id, or completes a stop string, or is its max_output_length-th.

    Raises:
      UserError: the model's scores are not finite.
    """
    start, compile_before = time.perf_counter(), CLOCK.seconds
    lengths = np.array([len(p) for p in request.prompts], np.int32)
    tables = engine.tables(request.lengths)
    spec = request.cache_spec(engine.mesh, engine.cache_dtype, engine.dtype)
    draw = request.sampling.arrays(request.numbers)

    cache, last = _prefill(engine, params, request, spec, tables, lengths, on_prefill)
    if request.num_samples > 1:
        cache, last = engine.for_samples(params, cache, last, request.num_samples)
        tables = engine.tables(request.for_samples(request.lengths))
    timing.cache_bytes = sum(x.nbytes for x in jax.tree.leaves(cache))
    seen = _in_prompts(request, engine.config.vocab_size) if request.sampling.penalized else None
    lengths = np.array(request.for_samples(lengths))
    state = engine.first(params, cache, last, lengths, draw, seen)
    del cache, last
    rows = _Rows(request, stopper)
    new = rows.take(to_host(state.token)[:, None].tolist())
    now = time.perf_counter()
    timing.first_token = now - start
    timing.prefill = timing.first_token - (CLOCK.seconds - compile_before)
    timing.compile = CLOCK.seconds - compile_before
    yield new

    start, compile_before = time.perf_counter(), CLOCK.seconds
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
        compiling = CLOCK.seconds - compile_before
        timing.decoded += max(map(len, decoded))
        timing.steps += engine.segment
        timing.decode += time.perf_counter() - start - compiling
        timing.compile += compiling
        yield new
        start, compile_before = time.perf_counter(), CLOCK.seconds


def forced_scores(engine: Engine, params: dict, request: Request) -> Iterator[jax.Array]:
    """Scores of answers that are given: prompts are run as `generate` runs them, and then what
    follows is decoded token by token, whatever the model would have said.

    Args:
      engine: the model's programs.
      params: its parameters.
      request: its prompts, all of one length, go on after the first `input_room` tokens.

    Yields:
      [batch, up to engine.segment, vocab] float32 logits of the tokens after those.
    """
    room, (end,) = request.input_room, {len(p) for p in request.prompts}
    begun = dataclasses.replace(request, prompts=tuple(p[:room] for p in request.prompts))
    tables = engine.tables([len(p) for p in request.prompts])
    spec = request.cache_spec(engine.mesh, engine.cache_dtype, engine.dtype)
    lengths = np.array([room] * len(request.prompts), np.int32)
    cache, _ = _prefill(engine, params, begun, spec, tables, lengths, None)
    for at in range(room, end, engine.segment):
        tokens = _rows_of(request, at, at + engine.segment)
        cache, scores = engine.force(params, tables, cache, tokens, at)
        yield scores[:, : end - at]


def _prefill(engine, params, request, spec, tables, lengths, on_prefill):
    """Runs the prompts: the cache, and the last hidden states."""
    run = _prefill_by_layer if engine.by_layer else _chunked_prefill
    return run(engine, params, request, spec, tables, lengths, on_prefill)


def _chunked_prefill(engine, params, request, spec, tables, lengths, on_prefill):
    """Chunk after chunk through all layers: the cache, and the last hidden states."""
    cache = engine.new_cache(spec, request.input_room)
    last = pending = None
    for at in range(0, int(lengths.max()), request.chunk):
        tokens = _rows_of(request, at, at + request.chunk)
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
    return cache, last


def _prefill_by_layer(engine, params, request, spec, tables, lengths, on_prefill):
    """Layer after layer through all chunks; as `_chunked_prefill`."""
    longest, chunk, layers = int(lengths.max()), request.chunk, engine.config.num_layers
    chunks, told = -(-longest // chunk), 0
    cost = functools.partial(prefill_cost, engine.config, 0)

    def on_chunk(layer: int, n: int) -> None:
        """Tells of the positions that all layers would have run for the same work."""
        nonlocal told
        if (layer, n) == (layers - 1, chunks - 1):
            done = longest
        else:
            work = (layer * cost(longest) + cost(min((n + 1) * chunk, longest))) / layers
            done = bisect.bisect(range(longest), work, key=cost) - 1
        if on_prefill and done > told:
            on_prefill(done - told)
            told = done

    tokens = _rows_of(request, 0, chunks * chunk)
    room = request.input_room
    return engine.prefill_by_layer(params, tables, tokens, lengths, spec, room, on_chunk)


def _rows_of(request: Request, begin: int, end: int) -> np.ndarray:
    """[batch, end - begin] ids of the prompts there, zeros after their ends."""
    tokens = np.zeros((len(request.prompts), end - begin), np.int32)
    for row, prompt in zip(tokens, request.prompts, strict=True):
        part = prompt[begin:end]
        row[: len(part)] = part
    return tokens


def _lookup_rows(request: Request, room: int) -> tuple[np.ndarray, np.ndarray]:
    """[batch, room] ids of the prompts, and [batch] positions of the last tokens wanted."""
    tokens = _rows_of(request, 0, room)
    last = [len(prompt) for prompt in request.prompts]  # no more than the first for fillers
    for row in range(request.count):
        last[row] += request.max_output_length - 1
    return tokens, np.array(last)


def _those_that_stand(tokens: np.ndarray, counts: np.ndarray) -> list[list[int]]:
    """[batch, steps, drafted + 1] ids and how many count of each step -> ids of each row."""
    stand = np.arange(tokens.shape[-1]) < counts[..., None]
    return [row[these].tolist() for row, these in zip(tokens, stand, strict=True)]


def _in_prompts(request: Request, vocab_size: int) -> np.ndarray:
    """[batch, vocab_size] whether a row's prompt holds a token."""
    seen = np.zeros((len(request.prompts), vocab_size), np.bool_)
    for row, prompt in zip(seen, request.prompts, strict=True):
        row[list(prompt)] = True
    return np.repeat(seen, request.num_samples, axis=0)


class _Rows:
    """Which rows have ended, and how much of a segment counts."""

    def __init__(self, request: Request, stopper: Stopper | None):
        # Rows that only fill the batch up are not waited for.
        fillers = len(request.prompts) - request.count
        left = [request.max_output_length] * request.count + [0] * fillers
        self._left = request.for_samples(left)
        self._eos, self._stopper = request.eos_token_ids, stopper

    @property
    def ended(self) -> bool:
        return not any(self._left)

    def take(self, tokens: list[list[int]]) -> list[list[int]]:
        return [self._take(row, ids) for row, ids in enumerate(tokens)]

    def _take(self, row: int, ids: Sequence[int]) -> list[int]:
        ids = list(ids[: self._left[row]])
        if NOT_A_NUMBER in ids:
            raise UserError(
                "the model's scores are not numbers (nan or infinite), so no token can be chosen: "
                "its weights are damaged, or too large for the dtype. Download them again, or try "
                "dtype float32."
            )
        stand = next((i + 1 for i, token in enumerate(ids) if token in self._eos), None)
        if self._stopper is not None:
            stop = self._stopper.stands(row, ids[:stand])
            stand = stop or stand
        self._left[row] = self._left[row] - len(ids) if stand is None else 0
        return ids[:stand]
