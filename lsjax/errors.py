"""The one exception that means: the input is wrong, and here is what to do about it."""


class UserError(ValueError):
    """One clear sentence: what was wrong, what is allowed, and what to do.

    Programs print it without a traceback and exit with a status other than 0.
    """
