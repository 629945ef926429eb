"""Records rows of figures as JSON lines; each is on disk before the next is measured."""

import json
import os
import time
from typing import Any

RESULTS = "results.jsonl"


class Recorder:
    """Appends the rows of one phase to the results of a run."""

    def __init__(self, folder: str, phase: str):
        self._path, self._phase = os.path.join(folder, RESULTS), phase
        self._start = time.monotonic()

    def __call__(self, **row: Any) -> None:
        """Writes a row, and adds the phase's name and its seconds so far."""
        row = {"phase": self._phase, **row, "seconds": round(time.monotonic() - self._start, 1)}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(folder: str) -> list[dict[str, Any]]:
    """Returns all complete rows; a process that was killed may have left half of one."""
    rows = []
    try:
        with open(os.path.join(folder, RESULTS), encoding="utf-8") as file:
            for line in file:
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    continue
    except FileNotFoundError:
        pass
    return rows
