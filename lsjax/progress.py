"""Progress bars whose estimates know what the work costs."""

import sys
from typing import Any

from tqdm import tqdm

from lsjax.config import ModelConfig
from lsjax.hosts import is_first


def prefill_cost(config: ModelConfig, start: int, length: int) -> float:
    """Floating-point operations of running `length` tokens at position `start`.

    Attention's share grows with the position, so that a prompt's second half costs more than
    its first.
    """
    c = config
    heads = c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    weights = c.num_layers * c.hidden_size * (heads + 3 * c.intermediate_size)
    channels = c.num_heads * c.head_dim
    keys = 0.0
    for window in c.windows:
        seen = start + length / 2
        keys += seen if window is None else min(seen, window)
    return length * (2.0 * weights + 4.0 * channels * keys)


class PrefillBar:
    """A bar over the cost of a prefill, labelled with tokens; call it with each chunk's tokens."""

    def __init__(self, config: ModelConfig, tokens: int):
        self._config, self._tokens, self._done = config, tokens, 0
        self._bar = _bar(
            f"prefill 0/{tokens:,} tokens",
            prefill_cost(config, 0, tokens),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        )

    def __call__(self, tokens: int) -> None:
        cost = prefill_cost(self._config, self._done, tokens)
        self._done += tokens
        label = f"prefill {self._done:,}/{self._tokens:,} tokens"
        self._bar.set_description_str(label, refresh=False)
        self._bar.update(cost)
        if self._done >= self._tokens:
            self._bar.close()


def byte_bar(description: str, total: int) -> tqdm:
    """A bar over bytes; `bar.update` is the callback."""
    return _bar(description, total, unit="B", unit_scale=True)


def character_bar(description: str, total: int) -> tqdm:
    """A bar over characters, shown once the work is long enough to wait for."""
    return _bar(description, total, unit="char", unit_scale=True, delay=1.0, leave=False)


def step_bar(steps: int, done: int) -> tqdm:
    """A bar over steps of training, of which some were done before."""
    return _bar("train", steps, unit="step", initial=done)


def _bar(description: str, total: float, **options: Any) -> tqdm:
    """On stderr, of the process that does the talking."""
    return tqdm(total=total, desc=description, file=sys.stderr, disable=not is_first(), **options)
