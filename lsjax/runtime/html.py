"""Small HTML tables, in which notebooks show results."""

import html
from collections.abc import Iterable, Mapping, Sequence


def table(rows: Mapping[str, object]) -> str:
    """Returns a table with two columns, names and values."""
    return grid((), rows.items())


def grid(header: Sequence[object], rows: Iterable[Iterable[object]]) -> str:
    """Returns a table whose first column names the rows.

    Args:
      header: names of the columns; empty for no header.
      rows: cells of each row; the first cell names the row.
    """
    lines = ["<tr>" + "".join(f"<th>{_escape(cell)}</th>" for cell in header) + "</tr>"]
    for name, *cells in rows:
        values = "".join(f"<td>{_escape(cell)}</td>" for cell in cells)
        lines.append(f"<tr><th>{_escape(name)}</th>{values}</tr>")
    return "<table>" + "".join(lines if header else lines[1:]) + "</table>"


def _escape(cell: object) -> str:
    return html.escape(str(cell))
