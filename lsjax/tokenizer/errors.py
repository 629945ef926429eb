"""Errors a user of tokenizers and chat templates can meet."""


class TokenizerError(ValueError):
    """A tokenizer's files are missing, damaged, or of a kind that isn't supported."""


class ChatTemplateError(ValueError):
    """A chat can't be rendered: there is no chat template, or the template failed."""
