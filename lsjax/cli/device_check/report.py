"""Formats a check's rows as a table: first what failed, then rates as shares of the ceilings."""

from collections.abc import Mapping, Sequence
from typing import Any

from lsjax.cli.device_check.phases import Ended
from lsjax.runtime.memory import human_bytes

Row = Mapping[str, Any]


def report(rows: Sequence[Row], ended: Mapping[str, Ended], seconds: float) -> str:
    """Returns the whole table as text.

    Args:
      rows: rows of all phases.
      ended: how each phase ended, by name.
      seconds: total time of all phases.
    """
    checks = [row for row in rows if "check" in row]
    wrong = [row for row in rows if _is_wrong(row)]
    lines = [f"{len(checks)} checks, {sum('check' in row for row in wrong)} FAILED"]
    lines += [f"  FAILED  {_told(row, 'ok', 'phase')}" for row in wrong]
    lines += [f"  WARNING {row['warning']}" for row in rows if "warning" in row]
    for name, end in ended.items():
        lines.append(f"{name:12} {end.state}{': ' if end.why else ''}{end.why}")
    lines += ["", *(_told(row, "phase", "seconds") for row in rows if row["phase"] == "versions")]
    lines += ["", f"{'':34}{'case':34}{'':>12}  rate"]
    ceilings = {row["what"]: row for row in rows if row["phase"] == "ceilings"}
    lines += [_timed(row, ceilings) for row in rows if _rate(row)]
    lines += [f"{row['what']}: {_told(row, 'what', 'phase', 'seconds')}" for row in rows
              if "what" in row and not _rate(row) and not _is_wrong(row)]  # fmt: skip
    lines.append(f"{seconds:.0f} s in all")
    return "\n".join(lines)


def failed(rows: Sequence[Row], ended: Mapping[str, Ended]) -> bool:
    """Returns whether a check or measurement went wrong, or a phase failed or was stopped."""
    broken = any(end.state in ("failed", "stopped") for end in ended.values())
    return broken or any(map(_is_wrong, rows))


def _is_wrong(row: Row) -> bool:
    """Returns whether a check failed, or a measurement did not run."""
    return not row.get("ok", True) or "why" in row


def _rate(row: Row) -> tuple[str, float] | None:
    """Returns the ceiling that a row's rate is a share of, and the rate; None without a rate."""
    for ceiling, unit in (("copy", "bytes_per_second"), ("product", "flops_per_second")):
        if unit in row:
            return ceiling, row[unit]
    return None


def _timed(row: Row, ceilings: Mapping[str, Row]) -> str:
    ceiling, rate = _rate(row)
    unit, scale = ("GB/s", 1e9) if ceiling == "copy" else ("TFLOP/s", 1e12)
    names = ("heads", "cache", "queries", "keys")
    case = " ".join(f"{row[n]:,}" if isinstance(row[n], int) else row[n] for n in names if n in row)
    time = f"{row['microseconds']:,.1f} us" if "microseconds" in row else ""
    share = ""
    if ceiling in ceilings:
        share = f"{rate / _rate(ceilings[ceiling])[1]:7.0%} of {ceiling}"
    compiled = f"  compiled in {row['compile_seconds']} s" if "compile_seconds" in row else ""
    line = f"{row['what']:34}{case:34}{time:>16}{rate / scale:10,.3f} {unit:8}{share}{compiled}"
    return line.rstrip()


def _told(row: Row, *without: str) -> str:
    def text(name: str, value: Any) -> str:
        if name.startswith(("peak_bytes", "bytes_limit")) and value:
            return human_bytes(value)
        if isinstance(value, float):
            return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
        return str(value)

    return ", ".join(f"{k} {text(k, v)}" for k, v in row.items() if k not in without)
