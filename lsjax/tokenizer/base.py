"""Defines the interface and the shared code of all tokenizers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lsjax.runtime.errors import ChatTemplateError
from lsjax.runtime.notes import note
from lsjax.runtime.text_files import check_characters
from lsjax.tokenizer.chat import render_chat
from lsjax.tokenizer.detokenizer import Detokenizer, StreamDecoder

# Called with the number of characters encoded since the last call.
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Tokenizer(ABC):
    """Converts text to token ids and back.

    ``prefix`` and ``suffix`` are the ids put before and after a prompt. ``named_tokens`` holds the
    texts of ``bos_token`` and similar tokens, which chat templates refer to by name.
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    chat_template: str | None
    named_tokens: Mapping[str, str]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    detokenizer: Detokenizer

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        progress: Progress | None = None,
    ) -> list[int]:
        """Returns the ids of ``text``; special tokens written in it are recognized.

        ``add_special_tokens`` adds ``prefix`` and ``suffix`` around the ids. ``progress`` is called
        with the number of characters encoded since its last call.
        """
        check_characters(text, "the text")
        ids = self._encode_text(text, progress or (lambda characters: None))
        if not add_special_tokens:
            return ids
        if self.prefix and tuple(ids[: len(self.prefix)]) == self.prefix:
            twice = self.decode(self.prefix, skip_special_tokens=False)
            note(f"the prompt begins with {twice}, which is added to every prompt: it comes twice.")
        return [*self.prefix, *ids, *self.suffix]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of ``ids``."""
        return self.detokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def stream_decoder(self) -> StreamDecoder:
        """Returns a decoder for ids that arrive one after another."""
        return StreamDecoder(self.detokenizer)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Returns the text of a chat, rendered with ``chat_template`` or the tokenizer's template.

        ``arguments`` are extra template variables, such as ``enable_thinking``.
        """
        template = chat_template or self.chat_template
        if template is None:
            raise ChatTemplateError(
                "this tokenizer has no chat template; give one with --chat_template, or give the "
                "text as a plain prompt."
            )
        return render_chat(
            template,
            messages,
            special_tokens=self.named_tokens,
            add_generation_prompt=add_generation_prompt,
            arguments=arguments,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """Returns a chat's ids up to the start of the assistant's answer; see ``render_chat``."""
        text = self.render_chat(messages, chat_template=chat_template, arguments=arguments)
        # The template itself writes bos and similar tokens.
        return self.encode(text, add_special_tokens=False)

    @abstractmethod
    def _encode_text(self, text: str, progress: Progress) -> list[int]:
        """Returns the ids of ``text`` alone, without prefix and suffix."""
