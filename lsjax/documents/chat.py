"""A chat about a document, whose turns run only what is new."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lsjax.cache import KVCache
from lsjax.distributed.multihost import to_host
from lsjax.documents.document import Document, sharing_borders
from lsjax.documents.question import after_document, before_document
from lsjax.inference.completion import Completion
from lsjax.inference.generate import Run
from lsjax.inference.prompts import Prompt
from lsjax.inference.request import Request
from lsjax.inference.steps import DecodeState
from lsjax.inference.stop_strings import TextStream
from lsjax.runtime.errors import UserError
from lsjax.runtime.notes import note

if TYPE_CHECKING:
    from lsjax.language_model import LanguageModel

_LEAST_ROOM = 1024  # tokens of questions and answers that the first cache has room for


@dataclasses.dataclass(frozen=True)
class _Held:
    """What stands after a turn.

    Attributes:
      cache: cache of the tokens after the document.
      ids: tokens that the document and `cache` hold.
      position: next position of the cache, whose block is there in floats.
    """

    cache: KVCache
    ids: tuple[int, ...]
    position: int


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A turn that has begun.

    Attributes:
      messages: messages of the chat up to its question.
      request: the turn's request.
      run: its run.
      states: the state of decoding, once the run has ended.
    """

    messages: tuple[dict[str, str], ...]
    request: Request
    run: Run
    states: list[DecodeState]


class Chat:
    """A chat about a document; see LanguageModel.chat.

    A turn that is refused or broken off leaves the chat as it was.

    Attributes:
      messages: questions and answers so far, if the turns follow a chat template.
    """

    def __init__(self, model: "LanguageModel", document: Document):
        self.messages: tuple[dict[str, str], ...] = ()
        self._model, self._document = model, document
        self._by_template = _follows_template(model, document)
        self._ids, self._held, self._noted = document.token_ids, None, False

    def ask(
        self,
        question: Prompt,
        max_output_length: int = 256,
        *,
        on_prefill: Callable[[int], None] | None = None,
        **options: Any,
    ) -> Completion:
        """Answers the next question.

        Args:
          question: a text, or a list of ids if the turns do not follow a chat template.
          max_output_length: maximum number of tokens of the answer.
          on_prefill: called after each chunk with the number of tokens run.
          **options: further arguments of LanguageModel.generate, except num_samples.

        Raises:
          UserError: see LanguageModel.generate.
        """
        turn = self._begin(question, max_output_length, on_prefill, options)
        for _ in turn.run:
            pass
        return self._end(turn)

    def stream(
        self,
        question: Prompt,
        max_output_length: int = 256,
        *,
        on_prefill: Callable[[int], None] | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Answers the next question as `ask` does, and yields its text as it is generated."""
        turn = self._begin(question, max_output_length, on_prefill, options)
        text = TextStream(self._model.tokenizer, turn.request.stop)
        for new in turn.run:
            if piece := text.push(new[0]):
                yield piece
        self._end(turn)
        if piece := text.flush():
            yield piece

    def _begin(self, question, max_output_length, on_prefill, options) -> _Turn:
        if options.get("num_samples", 1) != 1:
            raise UserError("a chat goes on with one answer; leave out num_samples.")
        messages = (*self.messages, {"role": "user", "content": question})
        ids = self._prompt(question, messages)
        document, cache = self._document, self._document.cache
        (request,) = self._model.requests([ids], max_output_length, document, **options)
        room = max(request.prompt_capacity - document.shared, _LEAST_ROOM)
        request = dataclasses.replace(  # capacities are few, so that few programs are compiled
            request,
            prompt_capacity=document.shared + (1 << (room - 1).bit_length()),
            starts_anywhere=True,
        )
        start = self._standing(ids)
        if start > document.shared:
            cache = cache.replace(rest=self._held.cache)
            request = dataclasses.replace(request, shared=start)
        states: list[DecodeState] = []
        held = dataclasses.replace(document, cache=cache)
        run = self._model.start(request, on_prefill, held, states.append)
        return _Turn(messages, request, run, states)

    def _prompt(self, question: Prompt, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Returns the ids of the whole chat up to the next answer."""
        new = self._model.encode_after(self._document, question)[len(self._document) :]
        if not self._by_template:
            return (*self._ids, *new)
        if not isinstance(question, str):
            raise UserError("a chat template takes texts, not token ids; ask with a text.")
        document = self._document
        text = after_document(self._model.tokenizer, document.token_ids, messages)
        return self._model.encode_after(document, text)

    def _standing(self, ids: tuple[int, ...]) -> int:
        """Returns how many leading tokens of a prompt are not run again.

        A quantized cache stands up to any token of the block that is there in floats, and else up
        to the beginning of a block. A cache that rolls stands for no more than a chunk. The states
        of recurrent layers stand for all tokens that were run, or none.
        """
        held, document = self._held, self._document
        if held is None:
            return document.shared
        same = _common(held.ids, ids[:-1])
        config, settings = document.engine.config, document.engine.settings
        shared, cached = sharing_borders(config, settings)
        start, block = same // shared * shared, settings.cache_block
        if start // block != held.position // block:
            start = same // cached * cached
        if any(config.windows) and held.position - start > settings.prefill_chunk:
            start = 0
        if config.recurrences and not start == held.position == len(held.ids):
            start = 0
        if same < len(held.ids) and not self._noted:
            self._noted = True
            note(
                "the chat template writes or splits earlier turns in another way than they were "
                f"run: {len(held.ids) - max(start, document.shared):,} tokens of this chat are run "
                "again, and so it may be with each turn."
            )
        return max(start, document.shared)

    def _end(self, turn: _Turn) -> Completion:
        """Keeps a turn that has ended."""
        (answer,), (state,) = turn.run.completions(), turn.states
        prompt, ids = turn.request.prompts[0], answer.token_ids
        position = int(to_host(state.position)[0])
        self._held = _Held(state.cache, (*prompt, *ids)[:position], position)
        if ids[-1] in turn.request.eos_token_ids:
            ids = ids[:-1]
        self._ids = (*prompt, *ids)
        if self._by_template:
            self.messages = (*turn.messages, {"role": "assistant", "content": answer.text})
        return answer


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the longest common prefix."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:length]) != np.asarray(b[:length]))
    return int(differ[0]) if len(differ) else length


def _follows_template(model: "LanguageModel", document: Document) -> bool:
    """Returns whether a document begins as the model's chat template begins a chat about it."""
    tokenizer = model.options.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        return False
    before = tokenizer.encode(before_document(tokenizer), add_special_tokens=False)
    before = tuple(before[:-1])  # the last may be one with the document's first characters
    if document.token_ids[: len(before)] == before:
        return True
    note("the document was not read with as_chat, so the chat does not follow a chat template.")
    return False
