"""Reports that need no server: JSON lines, training curves, tables for the terminal.

Only the standard library is imported here; matplotlib is loaded by the one function that draws.

    append_jsonl(path, record)            one line per training step, safe to be killed in the middle
    read_jsonl(path)                      back again; a torn last line is dropped
    truncate_jsonl_after(path, step)      before a resumed run writes steps that the file already has
    plot_training_curves(metrics, png)    the picture of a run
    format_table(rows, headers)           aligned text for the terminal
"""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "JsonLinesError",
    "append_jsonl",
    "format_table",
    "plot_training_curves",
    "read_jsonl",
    "truncate_jsonl_after",
]


# --------------------------------------------------------------------------------------------- JSON lines


class JsonLinesError(UserError, ValueError):
    """A JSON-lines file that cannot be read; the message names the file and the line."""


def append_jsonl(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Add one record as one line and flush it, so that a killed run keeps every finished line.

    NaN and infinities become null (they are not JSON), non-ASCII text stays readable, and half a
    surrogate pair (models do emit them) is written as its \\uXXXX escape and reads back unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_json_ready(record), ensure_ascii=False, allow_nan=False)
    # A lone surrogate can only sit inside a JSON string, where "\ud800" is exactly its JSON escape.
    line = text.encode("utf-8", "backslashreplace") + b"\n"
    with path.open("a+b") as file:
        _mend_tail(file)
        file.write(line)
        file.flush()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every record of a JSON-lines file, without the last line if a kill tore it.

    A broken line anywhere else raises JsonLinesError with its number: it means that the file is
    not what it should be, and skipping it would hide that.
    """
    return [record for _, record in _parsed_lines(Path(path))]


def truncate_jsonl_after(path: str | os.PathLike[str], step: int) -> int:
    """Keep only records with `record["step"] <= step`; return how many lines went.

    Call it when a run resumes from a checkpoint: the steps after that checkpoint will be written
    again. Atomic, so a kill leaves the old file or the new one. A missing file is no error.
    """
    path = Path(path)
    if not path.exists():
        return 0
    parsed = _parsed_lines(path)
    lines_before = sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
    kept = [raw for raw, record in parsed if _is_number(record.get("step")) and record["step"] <= step]
    temporary = _temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            file.writelines(raw + b"\n" for raw in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return lines_before - len(kept)


def _parsed_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise JsonLinesError(f"{path}: cannot be read: {error.strerror or error}") from error
    # Split bytes on "\n" only: str.splitlines would also cut at U+2028, which may stand in a string.
    numbered = [(number, raw) for number, raw in enumerate(content.split(b"\n"), start=1) if raw.strip()]
    records = []
    for number, raw in numbered:
        try:
            record = json.loads(raw.decode("utf-8"))
            if not isinstance(record, dict):
                raise ValueError(f"expected an object, found {type(record).__name__}")
        except (ValueError, RecursionError) as error:
            if number == numbered[-1][0]:
                break  # torn: the run was killed while it wrote this line
            raise JsonLinesError(f"{path}, line {number}: not a JSON object ({error})") from error
        records.append((raw, record))
    return records


def _mend_tail(file: Any) -> None:
    """Give a complete last line its missing newline; cut off a torn one, or the next would join it."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    tail, position = b"", size
    while position > 0 and b"\n" not in tail:
        start = max(0, position - 65536)
        file.seek(start)
        tail, position = file.read(position - start) + tail, start
    fragment = tail.rpartition(b"\n")[2]
    try:
        json.loads(fragment.decode("utf-8"))
        file.write(b"\n")  # append mode: always written at the end
    except (ValueError, RecursionError):
        file.truncate(size - len(fragment))


def _json_ready(value: Any) -> Any:
    """`value` in types JSON has; what it cannot hold becomes null (NaN, inf) or text."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_json_ready(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        return _json_ready(value.tolist())
    return str(value)


def _temporary_beside(path: Path) -> Path:
    # In the same directory, because os.replace is atomic only within one file system.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# -------------------------------------------------------------------------------------------- the picture

# Okabe and Ito's palette: told apart with every common form of colour blindness.
_BLUE, _ORANGE, _GREEN, _VERMILION, _PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
_INK, _MUTED, _GRID = "#222222", "#6B6B6B", "#E3E3E3"

_SMOOTH_ABOVE = 30  # up to this many steps every point is drawn as it is


@dataclass(frozen=True)
class _Curve:
    key: str  # name in metrics.jsonl
    label: str  # name in the legend
    colour: str
    marker: str = "o"  # a second sign beside colour
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
    """Draw metrics.jsonl as one PNG of four panels: reward, components, planner behaviour, tokens.

    Above 30 steps the lines are moving averages over dots of single steps; the numbers in the
    legends are where each line ends. Metrics that a run lacks leave a note in their panel.
    The file is replaced in one move: a viewer never meets half a picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    png_path = Path(png_path)
    by_step = {record["step"]: record for record in read_jsonl(metrics_path) if _is_number(record.get("step"))}
    records = [by_step[step] for step in sorted(by_step)]
    window = max(5, len(records) // 20) if len(records) > _SMOOTH_ABOVE else 1

    figure = Figure(figsize=(13, 8.8), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)  # Agg without pyplot: no global state, no display needed
    axes = figure.subplots(2, 2)
    figure.subplots_adjust(left=0.06, right=0.985, top=0.815, bottom=0.07, wspace=0.16, hspace=0.5)
    figure.text(0.0125, 0.966, title, fontsize=17, weight="bold", color=_INK, va="center", parse_math=False)
    figure.text(0.0125, 0.93, _subtitle(records, window), fontsize=10.5, color=_MUTED, va="center")
    for panel, ax in zip(_PANELS, axes.flat, strict=True):
        _draw_panel(ax, panel, records, window)

    png_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(png_path)
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(png_path)
    finally:
        temporary.unlink(missing_ok=True)


def plot_loss_curves(metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draw training and validation loss over the steps of a supervised run, written atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_jsonl(metrics_path)
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o--")):
        points = [(record["step"], record[key]) for record in records if _is_finite(record.get(key))]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, style, label=f"{label} (last {values[-1]:.3f})")
    axes.set_title("Supervised planner: loss on the plan's tokens")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    target = Path(png_path)
    temporary = _temporary_beside(target)
    figure.savefig(temporary, format="png")
    temporary.replace(target)


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
        points = [(r["step"], r[curve.key]) for r in records if _is_finite(r.get(curve.key))]
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
                    points, line, (r for r in records if _is_finite(r.get(curve.key))), strict=True
                )
                if _is_finite(record.get(curve.band))
            ]
            spread = _moving_average([std for _, _, std in banded], window)
            lower = [mean - std for (_, mean, _), std in zip(banded, spread, strict=True)]
            upper = [mean + std for (_, mean, _), std in zip(banded, spread, strict=True)]
            band_steps = [step for step, _, _ in banded]
            if len(banded) == 1:  # a band of one point has no width: draw a bar instead
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
        ax.set_ylim(-0.02, 1.02)  # room to see a line that lies on 0 or 1
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
    return any(_is_finite(record.get(curve.key)) for record in records)


def _is_finite(value: object) -> bool:
    return _is_number(value) and math.isfinite(value)  # type: ignore[arg-type]


def _moving_average(values: list[float], window: int) -> list[float]:
    """Centred mean over `window` points, over fewer at the ends; the mean never leans on the past."""
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


# ------------------------------------------------------------------------------------ tables for terminals

# "41.2%", "0.41 ± 0.05", "+3", "12/48", "[0.10, 0.32]", "1e-05", "-": cells that read as numbers.
_LOOKS_NUMERIC = re.compile(r"[-+−±~<>=≤≥]?\s*[\[(]?[-+−±]?\d[\d.,eE\s%±+\-−–/\[\]()x×]*")
_MISSING = "-"


def format_table(
    rows: Sequence[Mapping[str, object]] | Sequence[Sequence[object]],
    headers: Sequence[str] | None = None,
    *,
    max_width: int = 60,
) -> str:
    """An aligned plain-text table: a header, a rule, a line per row; columns of numbers to the right.

    Rows are dicts (columns in order of first appearance, or those named by `headers`) or sequences
    (`headers` then names the columns). Floats of one column share their decimals; None and NaN
    show as "-"; long text is cut to `max_width` characters and kept to one line.
    """
    names: list[str]
    cells: list[list[object]]
    mappings = [row for row in rows if isinstance(row, Mapping)]
    if mappings:
        names = list(headers) if headers else list(dict.fromkeys(str(key) for row in mappings for key in row))
        cells = [[row.get(name) for name in names] for row in mappings]
    else:
        names = list(headers or [])
        cells = [list(row) for row in rows]
        if any(len(row) != len(names) for row in cells):
            raise ValueError(f"every row needs {len(names)} cells, one per header")
    if not names:
        return ""

    columns = []
    for index, name in enumerate(names):
        values = [row[index] for row in cells]
        texts = [_clip(text, max_width) for text in _column_texts(values)]
        to_the_right = bool(values) and all(
            _is_number(value) or text == _MISSING or _LOOKS_NUMERIC.fullmatch(text)
            for value, text in zip(values, texts, strict=True)
        )
        head = _clip(_one_line(name), max_width)
        width = max(map(_display_width, [head, *texts]))
        columns.append([_pad(text, width, to_the_right) for text in [head, "─" * width, *texts]])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _column_texts(values: list[object]) -> list[str]:
    floats = [abs(v) for v in values if isinstance(v, float) and math.isfinite(v)]
    largest = max(floats, default=0.0)
    style = ",.1f" if largest >= 100 else ".3f"
    if 0 < largest < 0.001:  # learning rates
        style = ".1e"
    texts = []
    for value in values:
        if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
            texts.append(_MISSING)
        elif isinstance(value, bool):
            texts.append("yes" if value else "no")
        elif isinstance(value, int):
            texts.append(f"{value:,}" if abs(value) >= 10_000 else str(value))
        elif isinstance(value, float):
            texts.append(format(value, style))
        else:
            texts.append(_one_line(str(value)))
    return texts


def _one_line(text: str) -> str:
    """Spaces for line breaks, nothing for control characters: model text may hold escape sequences."""
    text = " ".join(text.split())
    return "".join(char for char in text if unicodedata.category(char) not in {"Cc", "Cf", "Cs"})


def _display_width(text: str) -> int:
    width = 0
    for char in text:
        if not unicodedata.combining(char):
            width += 2 if unicodedata.east_asian_width(char) in "WF" else 1
    return width


def _clip(text: str, width: int) -> str:
    if _display_width(text) <= width:
        return text
    while text and _display_width(text) > width - 1:
        text = text[:-1]
    return text.rstrip() + "…"


def _pad(text: str, width: int, to_the_right: bool) -> str:
    space = " " * (width - _display_width(text))
    return space + text if to_the_right else text + space
