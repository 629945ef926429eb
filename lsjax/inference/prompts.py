"""Conversion of the prompts and token ids that Python callers pass in."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lsjax.runtime.errors import UserError

Prompt = str | Sequence[int]


def as_prompts(prompts: Any) -> list[Prompt]:
    """Converts a text, a list of ids, or several of these to a list of prompts.

    Raises:
      UserError: a prompt is neither a text nor a list of ids.
    """
    if isinstance(prompts, str) or (_are_ids(prompts) and len(prompts)):
        prompts = [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not hasattr(prompts, "__iter__"):
        raise UserError(
            f"a prompt is a text or a list of token ids, not {type(prompts).__name__}; give one "
            "or a list of them."
        )
    prompts = list(prompts)
    for i, prompt in enumerate(prompts):
        if not (isinstance(prompt, str) or _are_ids(prompt)):
            raise UserError(
                f"prompt {i} is neither a text nor a list of token ids, which are whole numbers: "
                f"{str(prompt)[:60]!r}."
            )
    return [p if isinstance(p, str) else [int(i) for i in p] for p in prompts]


def _are_ids(value: Any) -> bool:
    """Returns whether a value is a list of whole numbers; an empty list counts as one."""
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        return False
    if hasattr(value, "dtype") and hasattr(value, "ndim"):
        return value.ndim == 1 and np.issubdtype(value.dtype, np.integer)
    return isinstance(value, Sequence) and all(
        isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in value
    )


def as_rows(token_ids: Any) -> np.ndarray:
    """Converts [batch, length] or [length] ids to a [batch, length] int64 array.

    Raises:
      UserError: rows differ in length, or an entry is not a whole number.
    """
    try:
        found = np.atleast_2d(np.asarray(token_ids))
    except ValueError:
        raise UserError(
            "token_ids has rows of several lengths; give rows of one length, or one row at a time."
        ) from None
    if found.ndim != 2 or not found.size or not np.issubdtype(found.dtype, np.integer):
        raise UserError(
            f"token_ids must be whole numbers of shape [length] or [batch, length], not "
            f"{found.dtype} of shape {list(found.shape)}."
        )
    return found.astype(np.int64)
