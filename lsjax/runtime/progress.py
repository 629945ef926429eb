"""Progress bars whose time estimates account for the cost of the work."""

import functools
import math
import sys
from typing import Any

from tqdm.auto import tqdm  # shows notebook widgets in a notebook

from lsjax.config import ModelConfig
from lsjax.runtime.flops import prefill_cost
from lsjax.runtime.primary import is_primary


class PrefillBar:
    """A bar over the cost of a prefill, labeled with tokens.

    Call it with the number of tokens of each chunk. No query sees more than `most_keys` keys.
    """

    def __init__(self, config: ModelConfig, tokens: int, most_keys: float = math.inf):
        self._cost = functools.partial(prefill_cost, config, most_keys=most_keys)
        self._tokens, self._done = tokens, 0
        self._bar = _bar(
            f"prefill 0/{tokens:,} tokens",
            self._cost(0, tokens),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        )

    def __call__(self, tokens: int) -> None:
        cost = self._cost(self._done, tokens)
        self._done += tokens
        label = f"prefill {self._done:,}/{self._tokens:,} tokens"
        self._bar.set_description_str(label, refresh=False)
        self._bar.update(cost)
        if self._done >= self._tokens:
            self._bar.close()


def byte_bar(description: str, total: int) -> tqdm:
    """Creates a bar over bytes; `bar.update` is the callback."""
    return _bar(description, total, unit="B", unit_scale=True)


def character_bar(description: str, total: int) -> tqdm:
    """Creates a bar over characters, which is shown only if the work takes over a second."""
    return _bar(description, total, unit="char", unit_scale=True, delay=1.0, leave=False)


def step_bar(steps: int, done: int) -> tqdm:
    """Creates a bar over training steps, `done` of which were done before."""
    return _bar("train", steps, unit="step", initial=done)


def _bar(description: str, total: float, **options: Any) -> tqdm:
    """Creates a bar on stderr, in the primary process only."""
    return tqdm(total=total, desc=description, file=sys.stderr, disable=not is_primary(), **options)
