"""The speed of a training run, and how much of its devices it uses."""

import contextlib
import time
from collections.abc import Iterator

import jax
import numpy as np

from lsjax.config import ModelConfig
from lsjax.runtime.devices import peak_rates
from lsjax.runtime.flops import prefill_cost
from lsjax.runtime.memory import peak_memory_bytes
from lsjax.training.batch import Batch


class Meter:
    """Counts tokens and floating-point operations between readings.

    The first step of a process is not counted, because it compiles.
    """

    def __init__(self, config: ModelConfig, devices: int):
        self._config = config
        rates = peak_rates(jax.devices()[0].device_kind)
        self._peak = rates and rates.flops * devices
        self._began = self._since = time.perf_counter()
        self._tokens, self._flops, self._counts = 0, 0.0, False

    def step(self, batch: Batch) -> None:
        """Counts a finished step."""
        if self._counts:
            self._tokens += batch.tokens.size
            self._flops += step_flops(self._config, batch)
        else:
            self._counts, self._since = True, time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside this context, which is not spent on steps."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def read(self) -> dict[str, float | int | None]:
        """Returns the figures since the last reading; None marks one that is not known.

        Peak memory is that of the process so far; seconds count from the start of the meter.
        """
        now = time.perf_counter()
        seconds = now - self._since
        figures = {
            "tokens_per_second": self._tokens / seconds if self._tokens else None,
            "mfu": self._flops / seconds / self._peak if self._peak and self._tokens else None,
            "peak_memory_bytes": peak_memory_bytes(),
            "seconds": now - self._began,
        }
        self._tokens, self._flops, self._since = 0, 0.0, now
        return figures


def step_flops(config: ModelConfig, batch: Batch) -> float:
    """Returns the floating-point operations of a step: three times those of its forward pass.

    Recomputation for the gradients, which saves memory, is not counted.
    """
    rows = batch.begin.reshape(-1, batch.begin.shape[-1])
    pieces = np.concatenate([np.unique(row, return_counts=True)[1] for row in rows])
    lengths, counts = np.unique(pieces, return_counts=True)
    forward = sum(
        count * prefill_cost(config, 0, int(length))
        for length, count in zip(lengths, counts, strict=True)
    )
    head = 2.0 * config.hidden_size * config.vocab_size * batch.tokens.size
    return 3.0 * (forward + head)
