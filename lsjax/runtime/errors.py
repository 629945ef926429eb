"""Exceptions for wrong input, whose messages say what to do about it."""


class UserError(ValueError):
    """Wrong input; one clear sentence says what is wrong, what is allowed, and what to do.

    Programs print the sentence without a traceback and exit with a status other than 0.
    """


class TokenizerError(UserError):
    """A tokenizer's files are missing, damaged, or of a kind that isn't supported."""


class ChatTemplateError(UserError):
    """A chat can't be rendered: there is no chat template, or the template failed."""
