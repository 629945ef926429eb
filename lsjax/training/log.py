"""What a run says of itself: a line of JSON for each logged step, and curves."""

import json
import os
from typing import Any

from lsjax.evals.plots import plot_training
from lsjax.files import write_atomically
from lsjax.hosts import is_first


class Log:
    """log.jsonl and loss.png of a folder; of several processes the first one writes.

    Attributes:
      lines: what log.jsonl holds.
    """

    def __init__(self, folder: str, step: int):
        """Opens the log at a step: what will be done again, later steps or all, goes."""
        self._path, self._plot = (os.path.join(folder, n) for n in ("log.jsonl", "loss.png"))
        self.lines: list[dict[str, Any]] = []
        if os.path.exists(self._path):
            with open(self._path, encoding="utf-8") as f:
                # A process that was killed may have left half a line.
                whole = [line for line in f if line.endswith("\n")]
            self.lines = [line for line in map(json.loads, whole) if line["step"] <= step > 0]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def write(self, **line: Any) -> None:
        """Adds a line."""
        self.lines.append(line)
        if is_first():
            with open(self._path, "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")

    def plot(self) -> None:
        """Draws the curves."""
        if is_first() and self.lines:
            plot_training(self.lines, self._plot)
