"""One batch on its way from request to completions."""

from collections.abc import Callable, Iterator

from lsjax.compilation import CLOCK
from lsjax.engine import Engine
from lsjax.errors import UserError
from lsjax.generation import Timing, generate
from lsjax.memory import peak_memory_bytes
from lsjax.requests import Request
from lsjax.results import Completion, Stats
from lsjax.stop_strings import Stopper, cut
from lsjax.tokenizer import Tokenizer


class Run:
    """A batch being answered: iterate for the new ids of each row, then ask for completions."""

    def __init__(
        self,
        engine: Engine,
        params: dict,
        tokenizer: Tokenizer | None,
        request: Request,
        on_prefill: Callable[[int], None] | None,
    ):
        self._engine, self._params, self._tokenizer = engine, params, tokenizer
        self._request, self._on_prefill = request, on_prefill
        self._timing = Timing()
        self._compilations = CLOCK.compilations
        self._ids: list[list[int]] = [[] for _ in request.numbers]
        self._count = request.count * request.num_samples
        if request.stop and tokenizer is None:
            raise UserError("stop needs a tokenizer, which the model does not have; leave it out.")

    def __iter__(self) -> Iterator[list[list[int]]]:
        stopper = None
        if self._request.stop:
            stopper = Stopper(self._tokenizer, self._request.stop, len(self._ids))
        for new in generate(
            self._engine, self._params, self._request, self._timing, self._on_prefill, stopper
        ):
            for row, ids in zip(self._ids, new, strict=True):
                row.extend(ids)
            yield new[: self._count]

    def completions(self) -> list[Completion]:
        """What has been answered so far, a completion for each real row."""
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
        prompt_tokens = sum(len(p) for p in request.prompts[: request.count])
        return Stats(
            prompt_tokens=prompt_tokens,
            generated_tokens=sum(len(i) for i in self._ids[: self._count]),
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
