"""Draw the pictures of a run: training curves, loss curves, scoreboard. Only the functions import matplotlib."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.reports.jsonl import is_finite, is_number, read_jsonl
from common.runs.files import naming, temporary_beside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Palette of Okabe and Ito (https://jfly.uni-koeln.de/color/): distinguishable with every common colour blindness.
_BLUE, _ORANGE, _GREEN, _VERMILION, _PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
_INK, _MUTED, _GRID = "#222222", "#6B6B6B", "#E3E3E3"

_SMOOTH_ABOVE = 30  # with more steps than this, curves are moving averages


@dataclass(frozen=True)
class _Curve:
    key: str  # name in metrics.jsonl
    label: str  # name in the legend
    colour: str
    marker: str = "o"  # distinguishes curves without colour
    band: str | None = None  # key of a standard deviation to draw around the curve


@dataclass(frozen=True)
class _Panel:
    title: str
    y_label: str
    curves: tuple[_Curve, ...]
    is_rate: bool = False  # fixed 0..1 axis
    from_zero: bool = False
    number: str = ".2f"  # how the legend writes the last value


_PANELS = (
    _Panel(
        "Reward",
        "reward per completion",
        (_Curve("reward", "mean ± std of the batch", _BLUE, band="reward_std"),),
    ),
    _Panel(
        "Reward components",
        "component value (0 to 1)",
        (
            _Curve("correctness", "correctness", _GREEN),
            _Curve("token_efficiency", "token efficiency", _ORANGE, "s"),
            _Curve("independence", "independence", _PURPLE, "^"),
        ),
        is_rate=True,
    ),
    _Panel(
        "What the planner does",
        "share of completions (0 to 1)",
        (
            _Curve("correctness", "correct", _GREEN),
            _Curve("decomposition_rate", "decomposed", _BLUE, "s"),
            _Curve("distinct_plans", "distinct plans", _PURPLE, "^"),
            _Curve("invalid_plan_rate", "invalid", _VERMILION, "D"),
        ),
        is_rate=True,
    ),
    _Panel(
        "Tokens",
        "tokens per completion",
        (
            _Curve("planner_tokens", "planner", _BLUE),
            _Curve("worker_tokens", "worker", _ORANGE, "s"),
        ),
        from_zero=True,
        number=",.0f",
    ),
)


def plot_training_curves(
    metrics_path: str | os.PathLike[str],
    png_path: str | os.PathLike[str],
    title: str = "Planner training",
) -> None:
    """Draw metrics.jsonl as one PNG with four panels: reward, its components, the planner's behaviour, tokens.

    With more than 30 steps the lines are moving averages and single steps are dots. The numbers in the legends are
    the last values of the lines. A panel without any of its metrics says so. The file is replaced in one move, so a
    viewer never sees an incomplete picture.

    Args:
        metrics_path: the JSON Lines file.
        png_path: the picture.
        title: shown above the panels.

    Raises:
        JsonLinesError: if the metrics cannot be read.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    png_path = Path(png_path)
    by_step = {record["step"]: record for record in read_jsonl(metrics_path) if is_number(record.get("step"))}
    records = [by_step[step] for step in sorted(by_step)]
    window = max(5, len(records) // 20) if len(records) > _SMOOTH_ABOVE else 1

    figure = Figure(figsize=(13, 8.8), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)  # the Agg canvas without pyplot needs no global state and no display
    axes = figure.subplots(2, 2)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.815, bottom=0.07, wspace=0.16, hspace=0.5)
    figure.text(0.0125, 0.966, title, fontsize=17, weight="bold", color=_INK, va="center", parse_math=False)
    figure.text(0.0125, 0.93, _subtitle(records, window), fontsize=10.5, color=_MUTED, va="center")
    for panel, ax in zip(_PANELS, axes.flat, strict=True):
        _draw_panel(ax, panel, records, window)

    png_path.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, png_path)


def plot_loss_curves(metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draw training and validation loss over the steps of a supervised run as a PNG, replaced in one move.

    Raises:
        JsonLinesError: if the metrics cannot be read.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_jsonl(metrics_path)
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o--")):
        points = [(record["step"], record[key]) for record in records if is_finite(record.get(key))]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, style, label=f"{label} (last {values[-1]:.3f})")
    axes.set_title("Supervised planner: loss on the plan's tokens")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, Path(png_path))


def _subtitle(records: list[dict[str, Any]], window: int) -> str:
    if not records:
        return "no steps yet"
    first, last = records[0]["step"], records[-1]["step"]
    span = f"step {last:g}" if first == last else f"steps {first:g} to {last:g}"
    if window == 1:
        return f"{span}  ·  each point is one logged step"
    return f"{span}  ·  dots: single steps  ·  lines: moving average over {window} logged steps"


def _draw_panel(ax: Axes, panel: _Panel, records: list[dict[str, Any]], window: int) -> None:
    from matplotlib.ticker import MaxNLocator

    drawn, highest = 0, 0.0
    for curve in panel.curves:
        points = [(r["step"], r[curve.key]) for r in records if is_finite(r.get(curve.key))]
        if not points:
            continue
        drawn += 1
        steps, values = [p[0] for p in points], [p[1] for p in points]
        line = _moving_average(values, window)
        highest = max(highest, *values)
        if curve.band:
            banded = [
                (step, mean, record[curve.band])
                for (step, _), mean, record in zip(
                    points, line, (r for r in records if is_finite(r.get(curve.key))), strict=True
                )
                if is_finite(record.get(curve.band))
            ]
            spread = _moving_average([std for _, _, std in banded], window)
            lower = [mean - std for (_, mean, _), std in zip(banded, spread, strict=True)]
            upper = [mean + std for (_, mean, _), std in zip(banded, spread, strict=True)]
            band_steps = [step for step, _, _ in banded]
            if len(banded) == 1:  # a band through one point would be invisible, so draw a bar
                ax.vlines(band_steps, lower, upper, color=curve.colour, alpha=0.25, linewidth=9)
            elif banded:
                ax.fill_between(band_steps, lower, upper, color=curve.colour, alpha=0.16, linewidth=0)
        if window > 1:
            ax.plot(steps, values, ".", color=curve.colour, alpha=0.22, markersize=4, markeredgewidth=0)
        ax.plot(
            steps,
            line,
            color=curve.colour,
            linewidth=2.2,
            marker=curve.marker,
            markevery=max(1, len(steps) // 10) if window > 1 else 1,
            markersize=8 if len(steps) == 1 else 5.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            clip_on=False,
            zorder=3,
            label=f"{curve.label}  {format(line[-1], panel.number)}",
        )

    ax.set_title(panel.title, loc="left", fontsize=13, weight="bold", color=_INK, pad=31)
    ax.set_xlabel("training step", fontsize=10, color=_MUTED)
    ax.set_ylabel(panel.y_label, fontsize=10, color=_MUTED)
    ax.tick_params(colors=_MUTED, labelsize=9.5, length=3)
    ax.grid(True, axis="y", color=_GRID, linewidth=0.9)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#B5B5B5")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    if records:
        first, last = records[0]["step"], records[-1]["step"]
        margin = max((last - first) * 0.015, 0.5 if first == last else 0.0)
        ax.set_xlim(first - margin, last + margin)
    if panel.is_rate:
        ax.set_ylim(-0.02, 1.02)  # a margin, so that a line at 0 or 1 stays visible
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    elif panel.from_zero:
        ax.set_ylim(0, highest * 1.08 if highest > 0 else 1)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if drawn:
        ax.legend(
            loc="lower left",
            bbox_to_anchor=(-0.012, 1.0),
            ncols=len(panel.curves),
            frameon=False,
            fontsize=10,
            labelcolor=_INK,
            handlelength=1.8,
            handletextpad=0.5,
            columnspacing=1.1,
            borderaxespad=0.25,
        )
    note: dict[str, Any] = {"fontsize": 10, "color": _MUTED, "style": "italic"}
    missing = [curve.label if drawn else curve.key for curve in panel.curves if not _recorded(records, curve)]
    if not drawn:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.text(
            0.5, 0.5, "not recorded: " + ", ".join(missing), transform=ax.transAxes, ha="center", va="center", **note
        )
    elif missing:
        ax.set_title("not recorded: " + ", ".join(missing), loc="right", pad=31, **note)


def _recorded(records: list[dict[str, Any]], curve: _Curve) -> bool:
    return any(is_finite(record.get(curve.key)) for record in records)


def _moving_average(values: list[float], window: int) -> list[float]:
    """Mean over `window` points centred at each point, over fewer points at the ends."""
    if window <= 1:
        return list(values)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    before, after = (window - 1) // 2, window // 2
    averages = []
    for i in range(len(values)):
        start, stop = max(0, i - before), min(len(values), i + after + 1)
        averages.append((sums[stop] - sums[start]) / (stop - start))
    return averages


def plot_scoreboard(summary: dict[str, Any], path: Path, highlight: str) -> None:
    """Draw one bar per row of an evaluation with its 95 % interval, as a PNG, replaced in one move.

    Args:
        summary: from `common.evaluation.scoreboard`.
        path: the picture.
        highlight: name of the row drawn in colour.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(summary["rows"])
    values = [100 * summary["rows"][name]["accuracy"] for name in names]
    bounds = [summary["rows"][name]["interval_95"] for name in names]
    errors = [
        [value - 100 * low for value, (low, _) in zip(values, bounds, strict=True)],
        [100 * high - value for value, (_, high) in zip(values, bounds, strict=True)],
    ]
    figure = Figure(figsize=(1.9 + 1.5 * len(names), 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = [_BLUE if name == highlight else "#9A9A9A" for name in names]
    axes.bar(range(len(names)), values, width=0.62, color=colours)
    axes.errorbar(range(len(names)), values, yerr=errors, fmt="none", ecolor="black", capsize=5, linewidth=1.2)
    for place, (value, name) in enumerate(zip(values, names, strict=True)):
        tokens = summary["rows"][name]["total_tokens"]
        axes.text(place + 0.06, value + 0.8, f"{value:.0f}%", ha="left", va="bottom", fontweight="bold")
        shown = "" if tokens is None else f"{tokens:.0f} tokens"  # None if every question failed
        axes.text(place, 1.5, shown, ha="center", va="bottom", color="white", fontsize=8)
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names])
    axes.set_ylim(0, min(100.0, max(100 * high for _, high in bounds) * 1.12 + 4))
    axes.set_ylabel("correct answers (%)")
    axes.set_title(f"held-out questions: {summary['questions']}; bars: 95 % Wilson interval", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """Write a complete picture, or leave the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with naming(path):
            figure.savefig(temporary, format="png")
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
