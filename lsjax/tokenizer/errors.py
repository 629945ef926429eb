"""Errors a user of tokenizers and chat templates can meet."""

from lsjax.errors import UserError


class TokenizerError(UserError):
    """A tokenizer's files are missing, damaged, or of a kind that isn't supported."""


class ChatTemplateError(UserError):
    """A chat can't be rendered: there is no chat template, or the template failed."""
