"""One batch on its way from request to completions."""

from collections.abc import Callable, Iterator, Sequence

from lsjax.compilation import CLOCK
from lsjax.engine import Engine
from lsjax.generation import Timing, generate
from lsjax.memory import peak_memory_bytes
from lsjax.requests import Request
from lsjax.results import Completion, Stats


class Run:
    """A batch being answered: iterate for the new ids of each row, then ask for completions."""

    def __init__(
        self,
        engine: Engine,
        params: dict,
        decode: Callable[[Sequence[int]], str],
        request: Request,
        on_prefill: Callable[[int], None] | None,
    ):
        self._engine, self._params, self._decode = engine, params, decode
        self._request, self._on_prefill = request, on_prefill
        self._timing = Timing()
        self._compilations = CLOCK.compilations
        self._ids: list[list[int]] = [[] for _ in request.prompts]

    def __iter__(self) -> Iterator[list[list[int]]]:
        for new in generate(
            self._engine, self._params, self._request, self._timing, self._on_prefill
        ):
            for row, ids in zip(self._ids, new, strict=True):
                row.extend(ids)
            yield new[: self._request.count]

    def completions(self) -> list[Completion]:
        """What has been answered so far, a completion for each real row."""
        stats = self._stats()
        prompts = self._request.prompts[: self._request.count]
        return [self._completion(p, i, stats) for p, i in zip(prompts, self._ids, strict=False)]

    def _completion(self, prompt: tuple[int, ...], ids: list[int], stats: Stats) -> Completion:
        stopped = bool(ids) and ids[-1] in self._request.eos_token_ids
        return Completion(
            text=self._decode(ids),
            token_ids=tuple(ids),
            finish_reason="stop" if stopped else "length",
            prompt_tokens=len(prompt),
            stats=stats,
        )

    def _stats(self) -> Stats:
        t, request = self._timing, self._request
        prompt_tokens = sum(len(p) for p in request.prompts[: request.count])
        return Stats(
            prompt_tokens=prompt_tokens,
            generated_tokens=sum(len(i) for i in self._ids[: self._request.count]),
            time_to_first_token_seconds=t.first_token,
            prefill_seconds=t.prefill,
            prefill_tokens_per_second=prompt_tokens / t.prefill if t.prefill else 0.0,
            decode_seconds=t.decode,
            decode_tokens_per_second=t.decoded / t.decode if t.decode else 0.0,
            decode_steps=t.steps,
            compile_seconds=t.compile,
            compilations=CLOCK.compilations - self._compilations,
            cache_bytes=t.cache_bytes,
            peak_memory_bytes=peak_memory_bytes(),
        )
