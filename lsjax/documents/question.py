"""Where a question stands beside its document in a chat."""

import dataclasses
from collections.abc import Mapping, Sequence

from lsjax.runtime.errors import UserError
from lsjax.tokenizer import Tokenizer

# Stand for document and question while a chat template is rendered.
_DOCUMENT, _QUESTION = "\u241edocument\u241e", "\u241equestion\u241e"
_GAP = "\n\n"
_TAIL = 200  # characters before a border that its tokens are compared over, at most


@dataclasses.dataclass(frozen=True)
class ChatFrame:
    """One message of a chat, with a document and an empty line before the question.

    Attributes:
      document: text that is the same for all questions, with the document in it.
      lead: text between it and the question.
      after: text after the question.
    """

    document: str
    lead: str
    after: str

    def ask(self, question: str) -> str:
        """Returns what follows the document if this is the question."""
        return f"{self.lead}{question}{self.after}"


def chat_frame(tokenizer: Tokenizer, document: str, chat_template: str | None = None) -> ChatFrame:
    """Renders a chat about a document, with room for a question.

    Document and question are encoded apart. The border between them is before or after the white
    space, where the tokens are those of the whole message. Tokenizers differ in that: some have a
    token for a full stop and two line feeds, others one for two line feeds at the end of a text
    only.

    Args:
      tokenizer: tokenizer of the model.
      document: the text before the question.
      chat_template: Jinja template to use instead of the tokenizer's.

    Raises:
      UserError: there is no template, or it does not write the message once as it is.
    """
    chat = [{"role": "user", "content": f"{document}{_GAP}{_QUESTION}"}]
    before, after = _split(tokenizer.render_chat(chat, chat_template=chat_template), _QUESTION)
    borders = len(before), len(before.rstrip())
    border = next((b for b in borders if _keeps_tokens(tokenizer, before, b)), len(before))
    return ChatFrame(before[:border], before[border:], after)


def before_document(tokenizer: Tokenizer) -> str:
    """Returns what the tokenizer's template writes before a document."""
    chat = [{"role": "user", "content": f"{_DOCUMENT}{_GAP}"}]
    return _split(tokenizer.render_chat(chat), _DOCUMENT)[0]


def after_document(
    tokenizer: Tokenizer, ids: Sequence[int], messages: Sequence[Mapping[str, str]]
) -> str:
    """Returns what the tokenizer's template writes after a document.

    Args:
      tokenizer: tokenizer with a chat template.
      ids: ids of the document, with the empty line after it or without; see `chat_frame`.
      messages: questions and answers, from the first question on.

    Raises:
      UserError: the template does not write the message once as it is.
    """
    first = {"role": "user", "content": f"{_DOCUMENT}{_GAP}{messages[0]['content']}"}
    _, after = _split(tokenizer.render_chat([first, *messages[1:]]), _DOCUMENT)
    ended = tokenizer.decode(ids[-4:], skip_special_tokens=False).endswith(_GAP)
    return after.removeprefix(_GAP) if ended else after


def _split(text: str, mark: str) -> tuple[str, str]:
    before, *after = text.split(mark)
    if len(after) != 1:
        raise UserError(
            "this chat template does not write a message once as it is, so the document cannot be "
            "told from the question; give another --chat_template, or leave out --is_chat_model."
        )
    return before, after[0]


def _keeps_tokens(tokenizer: Tokenizer, before: str, border: int) -> bool:
    """Returns whether text before a border and after it has the same tokens apart as together."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    begin = max(border - _TAIL, 0)
    first, second = before[begin:border], f"{before[border:]}What"
    return encode(first) + encode(second) == encode(first + second)
