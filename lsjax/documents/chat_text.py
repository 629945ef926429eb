"""A document and questions about it as a chat template writes them.

The document is the beginning of the first message, with an empty line after it. The template's text
around it is found with marks that stand for the document and the question.
"""

from collections.abc import Mapping, Sequence

from lsjax.errors import UserError
from lsjax.tokenizer import Tokenizer

_DOCUMENT, _QUESTION = "\u241edocument\u241e", "\u241equestion\u241e"
_GAP = "\n\n"


def around_question(
    tokenizer: Tokenizer, document: str, chat_template: str | None = None
) -> tuple[str, str]:
    """Returns the texts before and after the first question about a document.

    Raises:
      UserError: the template does not write a message once, as it is.
    """
    chat = [{"role": "user", "content": f"{document}{_GAP}{_QUESTION}"}]
    return _split(tokenizer.render_chat(chat, chat_template=chat_template), _QUESTION)


def before_document(tokenizer: Tokenizer) -> str:
    """Returns what the tokenizer's template writes before a document."""
    chat = [{"role": "user", "content": f"{_DOCUMENT}{_GAP}"}]
    return _split(tokenizer.render_chat(chat), _DOCUMENT)[0]


def after_document(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> str:
    """Returns what the tokenizer's template writes after a document and the empty line.

    Args:
      tokenizer: tokenizer with a chat template.
      messages: questions and answers, from the first question on.

    Raises:
      UserError: the template does not write a message once, as it is.
    """
    first = {"role": "user", "content": f"{_DOCUMENT}{_GAP}{messages[0]['content']}"}
    return _split(tokenizer.render_chat([first, *messages[1:]]), f"{_DOCUMENT}{_GAP}")[1]


def _split(text: str, mark: str) -> tuple[str, str]:
    before, *after = text.split(mark)
    if len(after) != 1:
        raise UserError(
            "this chat template does not write a message once as it is, so the document cannot be "
            "told from the question; give another chat_template, or leave the template out "
            "(is_chat_model, as_chat)."
        )
    return before, after[0]
