"""The interface of all tokenizers, and what they have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lsjax.files import check_characters
from lsjax.notes import note
from lsjax.tokenizer.chat import render_chat
from lsjax.tokenizer.detokenizer import Detokenizer, StreamDecoder
from lsjax.tokenizer.errors import ChatTemplateError

# Told how many more characters are done.
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Tokenizer(ABC):
    """Turns text into token ids and back.

    ``prefix`` and ``suffix`` are the ids that go around a prompt, ``named_tokens`` the texts of
    ``bos_token`` and the like that chat templates refer to.
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
        """The ids of ``text``; special tokens written in it are recognised.

        ``add_special_tokens`` puts the ids that a prompt begins and ends with around them.
        ``progress`` is called with the number of characters done since its last call.
        """
        check_characters(text, "the text")
        ids = self._encode_text(text, progress or (lambda characters: None))
        if not add_special_tokens:
            return ids
        if self.prefix and tuple(ids[: len(self.prefix)]) == self.prefix:
            twice = self.decode(self.prefix, skip_special_tokens=False)
            note(f"the prompt begins with {twice}, which is put before every prompt: it is twice.")
        return [*self.prefix, *ids, *self.suffix]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``ids``."""
        return self.detokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for ids that arrive one after another."""
        return StreamDecoder(self.detokenizer)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The text of a chat, by ``chat_template`` or else by the tokenizer's own template.

        ``arguments`` are further variables for the template, such as ``enable_thinking``.
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
        """The ids of a chat, up to where the assistant's answer begins; see ``render_chat``."""
        text = self.render_chat(messages, chat_template=chat_template, arguments=arguments)
        # A template writes bos and the like itself.
        return self.encode(text, add_special_tokens=False)

    @abstractmethod
    def _encode_text(self, text: str, progress: Progress) -> list[int]:
        """The ids of ``text`` alone."""
