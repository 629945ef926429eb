"""Plots of the measurements, as PNG files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lsjax.evals.needle import NeedleMap
from lsjax.evals.perplexity import Curve
from lsjax.evals.ruler.measure import Table
from lsjax.runtime.errors import UserError


def plot_curves(curves: Mapping[str, Curve], trained_length: int, path: str) -> None:
    """Plots loss against position, one line per setting."""
    figure, axes = _figure()
    for name, curve in curves.items():
        axes.plot(curve.ends, curve.losses, label=f"{name} (perplexity {curve.perplexity:.3g})")
    axes.axvline(trained_length, color="grey", linestyle=":", label="trained length")
    axes.set(xlabel="position, tokens", ylabel="loss, nats a token", xscale="log")
    axes.legend()
    figure.savefig(path)


def plot_needles(needles: NeedleMap, title: str, path: str) -> None:
    """Plots the shares of correct answers as a heat map, depth against length."""
    columns = list(zip(*needles.shares, strict=True))
    depths = [f"{d:.0%}" for d in needles.depths]
    _heat_map(columns, depths, needles.lengths, "depth of the pass key", title, path)


def plot_task_scores(table: Table, title: str, path: str) -> None:
    """Plots the scores of RULER's kinds of task as a heat map, task against length."""
    _heat_map(table.scores, table.tasks, table.lengths, "task", title, path)


def _heat_map(
    rows: Sequence[Sequence[float]],
    names: Sequence[str],
    lengths: Sequence[int],
    ylabel: str,
    title: str,
    path: str,
) -> None:
    """Plots shares from 0 to 1, [len(names)][len(lengths)]."""
    figure, axes = _figure()
    image = axes.imshow(rows, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="prompt, tokens", ylabel=ylabel, title=title)
    figure.colorbar(image, label="share read right")
    figure.savefig(path)


def plot_needle_curves(maps: Mapping[str, NeedleMap], path: str) -> None:
    """Plots the share of correct answers over all depths against length, one line per map."""
    figure, axes = _figure()
    for name, needles in maps.items():
        axes.plot(needles.lengths, needles.by_length(), marker="o", label=name)
    lengths = sorted({n for needles in maps.values() for n in needles.lengths})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.set(xlabel="prompt, tokens", ylabel="pass keys read right", ylim=(-0.03, 1.03))
    axes.legend()
    figure.savefig(path)


def plot_heads(maps: Mapping[str, np.ndarray], path: str) -> None:
    """Plots [layers, heads] arrays as heat maps, NaN as blanks; keys of `maps` are the titles."""
    figure, axes = _figure(columns=len(maps))
    for one, (title, rows) in zip(np.atleast_1d(axes), maps.items(), strict=True):
        image = one.imshow(rows, vmin=0, cmap="viridis", aspect="auto")
        one.set(xlabel="head", ylabel="layer", title=title)
        figure.colorbar(image)
    figure.savefig(path)


def plot_shares(
    lengths: Sequence[int],
    shares: Mapping[str, Sequence[float]],
    perplexities: Mapping[str, Sequence[float]],
    path: str,
) -> None:
    """Plots the share of correct answers and perplexity against length, one line per setting."""
    figure, (left, right) = _figure(columns=2)
    for axes, lines in ((left, shares), (right, perplexities)):
        for name, values in lines.items():
            axes.plot(lengths, values, marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    left.set(xlabel="text, tokens", ylabel="pass keys read right", ylim=(-0.03, 1.03))
    right.set(xlabel="text, tokens", ylabel="perplexity", yscale="log")
    left.legend()
    figure.savefig(path)


def plot_ring(rows: Sequence[Mapping[str, Any]], path: str) -> None:
    """Plots tokens per second and the busiest device's work over the mean, by device count.

    Args:
      rows: measurements with layout, devices, length, tokens_per_second and busiest_over_mean.
      path: the PNG file to write.
    """
    figure, (speed, work) = _figure(columns=2)
    lengths, counts = (sorted({r[name] for r in rows}) for name in ("length", "devices"))
    for length, layout in sorted({(r["length"], r["layout"]) for r in rows}):
        own = [r for r in rows if (r["length"], r["layout"]) == (length, layout)]
        style = "o-" if layout == "zigzag" else "x--"
        style += f"C{lengths.index(length)}"
        for axes, figures in ((speed, "tokens_per_second"), (work, "busiest_over_mean")):
            values = [r[figures] for r in own]
            axes.plot(
                [r["devices"] for r in own], values, style, label=f"{layout}, {length:,} tokens"
            )
    for axes in (speed, work):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, counts)
    speed.set(title="speed of one layer", xlabel="devices", ylabel="tokens/s", ylim=(0, None))
    work.set(title="balance", xlabel="devices", ylabel="busiest device's work over the mean")
    speed.legend()
    figure.savefig(path)


def plot_plan(plan: Mapping[str, Any], path: str) -> None:
    """Plots bytes per device against length, stacked, and the capacity as a line.

    Args:
      plan: a plan as Plan.as_json returns it.
      path: the PNG file to write.
    """
    figure, axes = _figure()
    lengths = [row["length"] for row in plan["table"]]
    programs = [row["programs"]["prefill"] for row in plan["table"]]
    parts = ("weights", "cache", "temporaries")
    axes.stackplot(
        lengths, [[p[part] / 2**30 for p in programs] for part in parts], labels=parts, alpha=0.8
    )
    axes.axhline(programs[0]["capacity"] / 2**30, color="black", label="there is")
    if plan["max_length"]:
        axes.axvline(plan["max_length"], color="grey", linestyle=":", label="longest that fits")
    title = f"{plan['model']} on {plan['target']}, {plan['settings']['kv_cache_dtype']} cache"
    axes.set(xlabel="prompt, tokens", ylabel="GiB a device, prefill", title=title)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="upper left")
    figure.savefig(path)


def plot_training(lines: Sequence[Mapping[str, Any]], path: str) -> None:
    """Plots loss against step, for training and for held-out documents cut to each length.

    Args:
      lines: lines of a run's log.
      path: the PNG file to write.
    """
    figure, axes = _figure()
    steps = [line for line in lines if "loss" in line]
    axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], linewidth=0.8, label="loss")
    held_out = [line for line in lines if "eval_losses" in line]
    for length in sorted({n for line in held_out for n in line["eval_losses"]}, key=int):
        known = [line for line in held_out if length in line["eval_losses"]]
        axes.plot(
            [line["step"] for line in known],
            [line["eval_losses"][length] for line in known],
            marker="o",
            label=f"held out, {int(length):,} tokens",
        )
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend()
    figure.savefig(path)


def plot_times(cases: Mapping[str, Mapping[str, float]], path: str) -> None:
    """Plots the time of each formulation of a case as bars; those of lsjax stand out."""
    figure, _ = _figure(columns=len(cases))
    for axes, (case, seconds) in zip(figure.axes, cases.items(), strict=True):
        colors = ["tab:orange" if "lsjax" in name else "tab:blue" for name in seconds]
        bars = axes.barh(list(seconds), [s * 1e3 for s in seconds.values()], color=colors)
        axes.bar_label(bars, fmt="{:,.3g}", padding=3)
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set(title=case, xlabel="milliseconds, fastest round")
    figure.savefig(path)


def _figure(columns: int = 1):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib; pip install 'lsjax[plot]'.") from None
    figure = Figure(figsize=(8 if columns == 1 else 6 * columns, 5), dpi=120, layout="constrained")
    return figure, figure.subplots(ncols=columns)
