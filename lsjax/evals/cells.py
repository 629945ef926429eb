"""Results that are kept one by one, so that a measurement that was stopped can be gone on with."""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from lsjax.runtime.errors import UserError
from lsjax.runtime.text_files import check_writable, read_json, write_atomically


class Cells:
    """The cells of a table, by name; a file holds them as they come.

    Attributes:
      values: what has been measured, as JSON holds it.
    """

    def __init__(self, path: str | None = None, measured: Mapping[str, Any] | None = None):
        """Opens a file of cells, or begins one.

        Args:
          path: file to keep the cells in; None to keep them in memory only.
          measured: what all cells have in common: the model, a text, settings.

        Raises:
          UserError: the file holds something else, or cells of something else.
        """
        self._path, self._measured = path, dict(measured or {})
        self.values: dict[str, Any] = {}
        if path is None:
            return
        check_writable(path)
        if os.path.exists(path):
            found, self.values = _read(path)
            for name in {**found, **self._measured}:
                # "None": measured before there was such an option.
                if found.get(name, "None") != self._measured.get(name):
                    raise UserError(
                        f"{path} holds results of another {name} ({found.get(name)}, not "
                        f"{self._measured.get(name)}); name another file, or remove it."
                    )

    def missing(self, names: Iterable[str]) -> list[str]:
        """Returns the names that have no value yet, in their order."""
        return [name for name in names if name not in self.values]

    def add(self, values: Mapping[str, Any]) -> None:
        """Adds cells, and writes the file."""
        self.values |= values
        if self._path is not None:
            whole = {"measured": self._measured, "cells": self.values}
            write_atomically(self._path, json.dumps(whole, indent=1) + "\n")


def read_cells(path: str) -> dict[str, Any]:
    """Returns the cells in a file.

    Raises:
      UserError: the file cannot be read, or holds no cells.
    """
    return _read(path)[1]


def _read(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        match read_json(path):
            case {"measured": dict(measured), "cells": dict(cells)}:
                return measured, cells
    except FileNotFoundError:
        raise UserError(f"there is no file {path}.") from None
    raise UserError(f"{path} does not hold the results of a measurement; name another file.")
