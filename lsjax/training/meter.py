"""How fast a run is, and how much of its devices it uses."""

import contextlib
import time
from collections.abc import Iterator

import numpy as np

from lsjax.config import ModelConfig
from lsjax.memory import peak_memory_bytes
from lsjax.planning.targets import find_target
from lsjax.progress import prefill_cost
from lsjax.training.batch import Batch


class Meter:
    """Tokens and operations since it was last read.

    A process' first step is not counted: it compiles.
    """

    def __init__(self, config: ModelConfig, devices: int):
        self._config = config
        rates = find_target("here").rates
        self._peak = rates and rates.flops * devices
        self._began = self._since = time.perf_counter()
        self._tokens, self._flops, self._counts = 0, 0.0, False

    def step(self, batch: Batch) -> None:
        """Counts a step that is done."""
        if self._counts:
            self._tokens += batch.tokens.size
            self._flops += step_flops(self._config, batch)
        else:
            self._counts, self._since = True, time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile is no step, and takes no time."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def read(self) -> dict[str, float | int | None]:
        """Figures since the last reading, and the seconds of this process; None: not known."""
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
    """Floating-point operations of a step: three times those of running it forward once.

    What is run again for gradients, to spare memory, is not counted.
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
