"""Generation: chunked prefill, then decode segments until every row has ended."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from lsjax.cache import DocumentCache
from lsjax.distributed.multihost import to_host
from lsjax.inference.completion import Completion, Stats
from lsjax.inference.engine import Engine
from lsjax.inference.layerwise_prefill import layer_progress
from lsjax.inference.request import Request, chunks
from lsjax.inference.sampling import NOT_A_NUMBER
from lsjax.inference.segments import Segment, Segments, SegmentsAhead
from lsjax.inference.sparsity import OnSparsity, Sparsity, measure
from lsjax.inference.steps import DecodeState
from lsjax.inference.stop_strings import Stopper, cut
from lsjax.runtime.compilation import CLOCK
from lsjax.runtime.errors import UserError
from lsjax.runtime.memory import peak_memory_bytes
from lsjax.tokenizer import Tokenizer


@dataclasses.dataclass
class Timing:
    """Timing of one batch, in seconds, with compilation counted separately.

    Attributes:
      prefill: time until every row has its first token, without compilation.
      decode: time after that, without compilation.
      first_token: time until every row has its first token, including compilation.
      compile: time of all tracing and compiling.
      decoded: tokens decoded after the first, counting the longest row of each segment.
      steps: number of decode steps.
      cache_bytes: size of the cache over all devices, with replicas counted once.
      sparsity: what the prompts have attended to; None if to everything.
    """

    prefill: float = 0.0
    decode: float = 0.0
    first_token: float = 0.0
    compile: float = 0.0
    decoded: int = 0
    steps: int = 0
    cache_bytes: int = 0
    sparsity: Sparsity | None = None


def generate(
    engine: Engine,
    params: dict,
    request: Request,
    timing: Timing,
    on_prefill: Callable[[int], None] | None = None,
    stopper: Stopper | None = None,
    document: DocumentCache | None = None,
    on_end: Callable[[DecodeState], None] | None = None,
) -> Iterator[list[list[int]]]:
    """Answers a batch of prompts.

    Args:
      engine: engine of the model.
      params: model parameters.
      request: batch to answer.
      timing: timing to fill in during generation.
      on_prefill: called after each chunk with the number of positions run.
      stopper: finds stop strings; None if there are none.
      document: cache of the tokens that all prompts share; None if request.shared is 0.
      on_end: called with the last state, when all rows have ended.

    Yields:
      The new ids of each row: one id first, then up to a segment at a time. A row's last id is an
      end-of-sequence id, or completes a stop string, or is its max_output_length-th id.

    Raises:
      UserError: the model's logits are not finite.
    """
    start, compile_before = time.perf_counter(), CLOCK.seconds
    lengths = np.array([len(p) for p in request.prompts], np.int32)
    tables = engine.tables(request.lengths)
    spec, eos = request.cache_spec(engine.settings), request.eos_token_ids
    draw = request.sampling.arrays(request.numbers)

    cache, last = _prefill(engine, params, request, spec, tables, lengths, on_prefill, document)
    timing.sparsity = measure(cache, engine.config, lengths[: request.num_real])
    if request.num_samples > 1:
        cache, last = engine.for_samples(cache, last, request.num_samples)
        tables = engine.tables(request.for_samples(request.lengths))
    timing.cache_bytes = sum(x.nbytes for x in jax.tree.leaves(cache))
    seen = _in_prompts(request, engine.config.vocab_size) if request.sampling.penalized else None
    lengths = np.array(request.for_samples(lengths))
    ends = np.array(request.for_samples(request.ends))
    drafted = request.prompt_lookup_num_tokens
    text = token_batch(request, 0, request.cached + spec.capacity + 1) if drafted else None
    state = engine.first(params, cache, last, lengths, ends, draw, eos, seen, text)
    del cache, last
    rows = StopTracker(request, stopper)
    new = rows.consume(to_host(state.token)[:, None].tolist())
    now = time.perf_counter()
    timing.first_token = now - start
    timing.prefill = timing.first_token - (CLOCK.seconds - compile_before)
    timing.compile = CLOCK.seconds - compile_before
    yield new

    def decode(state: DecodeState) -> tuple[DecodeState, Segment]:
        return engine.decode(params, tables, state, draw, eos, drafted, document)

    start, compile_before = time.perf_counter(), CLOCK.seconds
    decoding = SegmentsAhead if engine.dispatches_ahead else Segments
    with decoding(decode, state) as segments:
        del state
        while not rows.ended:
            tokens, counts, steps = map(to_host, segments.next())
            decoded = accepted_tokens(tokens[:, :steps], counts[:, :steps])
            if not steps:
                raise RuntimeError("no step was run: rows are done on the device, but not here")
            new = rows.consume(decoded)
            compiling = CLOCK.seconds - compile_before
            timing.decoded += max(map(len, decoded))
            timing.steps += int(steps)
            timing.decode += time.perf_counter() - start - compiling
            timing.compile += compiling
            yield new
            start, compile_before = time.perf_counter(), CLOCK.seconds
        if on_end:
            on_end(segments.state)


def teacher_forced_scores(
    engine: Engine, params: dict, request: Request, on_sparsity: OnSparsity | None = None
) -> Iterator[jax.Array]:
    """Computes logits of given answers.

    Prompts are prefilled as in `generate`. The tokens that follow are then decoded one by one,
    whatever the model would have chosen.

    Args:
      engine: engine of the model.
      params: model parameters.
      request: batch whose prompts all have one length; their first `prompt_capacity` tokens are
        prefilled and the rest is decoded.
      on_sparsity: see OnSparsity.

    Yields:
      [batch, up to a segment, vocab] float32 logits, each of the token after a decoded token.
    """
    prompt_capacity, (end,) = request.prompt_capacity, {len(p) for p in request.prompts}
    begun = dataclasses.replace(
        request, prompts=tuple(p[:prompt_capacity] for p in request.prompts)
    )
    tables = engine.tables([len(p) for p in request.prompts])
    spec = request.cache_spec(engine.settings)
    lengths = np.array([prompt_capacity] * len(request.prompts), np.int32)
    cache, _ = _prefill(engine, params, begun, spec, tables, lengths, None)
    if on_sparsity and (found := measure(cache, engine.config, lengths)):
        on_sparsity(found)
    segment = engine.settings.segment
    for at in range(prompt_capacity, end, segment):
        tokens = token_batch(request, at, at + segment)
        cache, scores = engine.teacher_forced_decode(params, tables, cache, tokens, at)
        yield scores[:, : end - at]


def _prefill(engine, params, request, spec, tables, lengths, on_prefill, document=None):
    """Prefills the prompts; returns the cache and the last hidden states."""
    if engine.by_layer and document is None:
        return _prefill_by_layer(engine, params, request, spec, tables, lengths, on_prefill)
    longest, shared, chunk = int(lengths.max()), request.shared, engine.settings.prefill_chunk
    sizes = chunk, spec.zigzag.block_length
    if document is None:
        cache = engine.new_cache(spec)
    else:
        sizes = *sizes, engine.least_question_chunk
        cache = engine.cache_after(document.rest, spec, request.whole_cache_spec(engine.settings))
    last = pending = None
    for at, size in chunks(longest - shared, *sizes):
        at += shared
        tokens = token_batch(request, at, at + size)
        cache, last = engine.prefill(params, tables, cache, tokens, at, lengths, last, document)
        # Wait only for the previous chunk, so that the device always has one queued.
        if pending is not None:
            jax.block_until_ready(pending[1])
            if on_prefill:
                on_prefill(pending[0])
        pending = min(size, longest - at), last
    jax.block_until_ready(last)
    if on_prefill:
        on_prefill(pending[0])
    return cache, last


def _prefill_by_layer(engine, params, request, spec, tables, lengths, on_prefill):
    """Prefills layer by layer, each over all chunks; see `_prefill`."""
    longest, chunk = int(lengths.max()), engine.settings.prefill_chunk
    on_chunk = layer_progress(engine.config, chunk, longest, on_prefill or (lambda tokens: None))
    tokens = token_batch(request, 0, -(-longest // chunk) * chunk)
    return engine.prefill_by_layer(params, tables, tokens, lengths, spec, on_chunk)


def token_batch(request: Request, begin: int, end: int) -> np.ndarray:
    """Returns [batch, end - begin] ids of the prompts from `begin`, zero-padded at their ends."""
    tokens = np.zeros((len(request.prompts), end - begin), np.int32)
    for row, prompt in zip(tokens, request.prompts, strict=True):
        part = prompt[begin:end]
        row[: len(part)] = part
    return tokens


def accepted_tokens(tokens: np.ndarray, counts: np.ndarray) -> list[list[int]]:
    """Collects the accepted ids of each row.

    Args:
      tokens: [batch, steps, drafted + 1] ids.
      counts: [batch, steps] number of leading ids that each step accepts.
    """
    stand = np.arange(tokens.shape[-1]) < counts[..., None]
    return [row[these].tolist() for row, these in zip(tokens, stand, strict=True)]


def _in_prompts(request: Request, vocab_size: int) -> np.ndarray:
    """Returns [rows of answers, vocab_size], whether a row's prompt contains a token."""
    seen = np.zeros((len(request.prompts), vocab_size), np.bool_)
    for row, prompt in zip(seen, request.prompts, strict=True):
        row[list(prompt)] = True
    return np.repeat(seen, request.num_samples, axis=0)


class StopTracker:
    """Tracks which rows have ended, and cuts off what a segment decodes past a row's end."""

    def __init__(self, request: Request, stopper: Stopper | None):
        # Padding rows count as ended from the start.
        padding_rows = len(request.prompts) - request.num_real
        left = [request.max_output_length] * request.num_real + [0] * padding_rows
        self._left = request.for_samples(left)
        self._eos, self._stopper = request.eos_token_ids, stopper

    @property
    def ended(self) -> bool:
        return not any(self._left)

    def consume(self, tokens: list[list[int]]) -> list[list[int]]:
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


class Run:
    """A batch being answered: iterate over it for each row's new ids, then call `completions`."""

    def __init__(
        self,
        engine: Engine,
        params: dict,
        tokenizer: Tokenizer | None,
        request: Request,
        on_prefill: Callable[[int], None] | None,
        document: DocumentCache | None = None,
        on_end: Callable[[DecodeState], None] | None = None,
    ):
        self._document, self._on_end = document, on_end
        self._engine, self._params, self._tokenizer = engine, params, tokenizer
        self._request, self._on_prefill = request, on_prefill
        self._timing = Timing()
        self._compilations = CLOCK.compilations
        self._ids: list[list[int]] = [[] for _ in request.numbers]
        self._count = request.num_real * request.num_samples
        if request.stop and tokenizer is None:
            raise UserError("stop needs a tokenizer, which the model does not have; leave it out.")

    def __iter__(self) -> Iterator[list[list[int]]]:
        stopper = None
        if self._request.stop:
            stopper = Stopper(self._tokenizer, self._request.stop, len(self._ids))
        arguments = self._timing, self._on_prefill, stopper, self._document, self._on_end
        for new in generate(self._engine, self._params, self._request, *arguments):
            for row, ids in zip(self._ids, new, strict=True):
                row.extend(ids)
            yield new[: self._count]

    def completions(self) -> list[Completion]:
        """Returns a completion of what has been generated so far for each row, without padding."""
        stats = self._stats()
        prompts = self._request.for_samples(self._request.prompts)[: self._count]
        return [self._completion(p, i, stats) for p, i in zip(prompts, self._ids, strict=False)]

    def _completion(self, prompt: tuple[int, ...], ids: list[int], stats: Stats) -> Completion:
        stopped = bool(ids) and ids[-1] in self._request.eos_token_ids
        whole = "" if self._tokenizer is None else self._tokenizer.decode(ids)
        text = cut(whole, self._request.stop)
        stopped = stopped or text != whole
        return Completion(
            text=text,
            token_ids=tuple(ids),
            finish_reason="stop" if stopped else "length",
            prompt_tokens=len(prompt),
            stats=stats,
        )

    def _stats(self) -> Stats:
        t, request = self._timing, self._request
        prompt_tokens = sum(len(p) for p in request.prompts[: request.num_real])
        prefilled = prompt_tokens - request.num_real * request.shared
        return Stats(
            prompt_tokens=prompt_tokens,
            generated_tokens=sum(len(i) for i in self._ids[: self._count]),
            time_to_first_token_seconds=t.first_token,
            prefill_seconds=t.prefill,
            prefill_tokens_per_second=prefilled / t.prefill if t.prefill else 0.0,
            decode_seconds=t.decode,
            decode_tokens_per_second=t.decoded / t.decode if t.decode else 0.0,
            decode_steps=t.steps,
            compile_seconds=t.compile,
            compilations=CLOCK.compilations - self._compilations,
            cache_bytes=t.cache_bytes,
            peak_memory_bytes=peak_memory_bytes(),
            sparsity=t.sparsity,
        )
