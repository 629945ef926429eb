"""The log of a training run: one line of JSON per logged step, and loss curves."""

import json
import os
from typing import Any

from lsjax.evals.plots import plot_training
from lsjax.runtime.primary import is_primary
from lsjax.runtime.text_files import write_atomically


class Log:
    """The files log.jsonl and loss.png of a folder; only the primary process adds to them.

    Attributes:
      lines: the parsed lines of log.jsonl.
    """

    def __init__(self, folder: str, step: int):
        """Opens the log and drops the lines of later steps, or all lines if `step` is 0."""
        self._path, self._plot = (os.path.join(folder, n) for n in ("log.jsonl", "loss.png"))
        self.lines: list[dict[str, Any]] = []
        if os.path.exists(self._path):
            with open(self._path, encoding="utf-8") as f:
                # A process that was killed may have left half a line.
                whole = [line for line in f if line.endswith("\n")]
            self.lines = [line for line in map(json.loads, whole) if line["step"] <= step > 0]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def write(self, **line: Any) -> None:
        """Appends a line."""
        self.lines.append(line)
        if is_primary():
            with open(self._path, "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")

    def plot(self) -> None:
        """Draws the curves."""
        if is_primary() and self.lines:
            plot_training(self.lines, self._plot)
