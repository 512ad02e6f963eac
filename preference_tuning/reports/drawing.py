"""Charts as inline SVG: where no script runs, a chart is drawn here or not at all."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from preference_tuning.reports.markup import Html, text

Series = Sequence[tuple[float, float]]
Tone = Literal["good", "bad", "unclear"]
TONES: dict[Tone, str] = {"good": "#2e8b57", "bad": "#b0413e", "unclear": "#9aa5b1"}


class Chart(Html):
    """A chart in a page, and the same as a file of its own."""

    alone: str
    """An SVG document."""


class Interval(NamedTuple):
    """A line of a forest plot."""

    name: str
    low: float
    value: float
    high: float
    shown: str
    """The same in figures."""
    tone: Tone


COLOURS = ("#2f6fde", "#e07b39", "#3a9d5d", "#9b59b6", "#b0413e", "#5f6b7a")

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420.0, 220.0, 50.0, 12.0, 10.0, 34.0


def line_chart(title: str, lines: Mapping[str, Series], x_label: str = "step", level: float | None = None) -> Html:
    """Return a chart of one or more lines; ``level`` draws a dashed reference."""
    shown = {name: points for name, line in lines.items() if (points := [p for p in line if math.isfinite(p[1])])}
    if not shown:
        return Html(f"<figure><figcaption>{text(title)}</figcaption><p class='lead'>nothing was logged</p></figure>")
    xs = [x for line in shown.values() for x, _ in line]
    ys = [y for line in shown.values() for _, y in line] + ([level] if level is not None else [])
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    plot = _Plot((min(xs), max(xs)), (min(y_ticks[0], *ys), max(y_ticks[-1], *ys)))
    parts = [plot.grid(x_ticks, y_ticks, x_label)]
    if level is not None:
        y = plot.y(level)
        parts.append(
            f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y}' y2='{y}' stroke='#9aa5b1' stroke-dasharray='4 3'/>"
        )
    for colour, line in zip(_colours(), shown.values(), strict=False):
        path = " ".join(f"{plot.x(x)},{plot.y(y)}" for x, y in line)
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.8'/>")
        if len(line) <= 12:
            parts += [f"<circle cx='{plot.x(x)}' cy='{plot.y(y)}' r='2.6' fill='{colour}'/>" for x, y in line]
    return _figure(title, "".join(parts), list(shown))


def histogram(
    title: str,
    groups: Mapping[str, Sequence[float]],
    x_label: str,
    bins: int = 20,
    marks: Mapping[str, float] | None = None,
) -> Html:
    """Return overlaid histograms of one or more groups of values; ``marks`` are named limits, drawn as dashed lines."""
    groups = {name: [v for v in group if math.isfinite(v)] for name, group in groups.items()}
    values = [v for group in groups.values() for v in group]
    if not values:
        return Html("")
    limits = marks or {}
    low, high = min(values), max(*values, *limits.values()) if limits else max(values)
    width = (high - low) / bins or 1.0
    counts = {name: _counted(group, low, width, bins) for name, group in groups.items()}
    top = max(max(c) for c in counts.values())
    x_ticks, y_ticks = _ticks(low, high), _ticks(0, top)
    plot = _Plot((low, low + width * bins), (0, max(y_ticks[-1], top)))
    parts = [plot.grid(x_ticks, y_ticks, x_label)]
    for colour, column in zip(_colours(), counts.values(), strict=False):
        for i, count in enumerate(column):
            x, y = plot.x(low + i * width), plot.y(count)
            w, h = round(plot.x(low + (i + 1) * width) - x - 0.5, 1), round(plot.y(0) - y, 1)
            parts.append(f"<rect x='{x}' y='{y}' width='{max(w, 0.5)}' height='{h}' fill='{colour}' opacity='.55'/>")
    for name, limit in limits.items():
        x = plot.x(limit)
        parts.append(
            f"<line x1='{x}' x2='{x}' y1='{TOP}' y2='{HEIGHT - BOTTOM}' stroke='#b0413e' stroke-dasharray='4 3'/>"
            f"<text x='{x - 4}' y='{TOP + 10}' text-anchor='end'>{text(name)}</text>"
        )
    return _figure(title, "".join(parts), list(groups))


def _counted(values: Sequence[float], low: float, width: float, bins: int) -> list[int]:
    """Return how many values lie in each bin; the last one holds its upper end too."""
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / width), bins - 1)] += 1
    return counts


def bars(title: str, values: Mapping[str, float], form: str = "{:g}", top: float | None = None) -> Html:
    """Return horizontal bars with their values."""
    if not values:
        return Html("")
    largest = top or max(values.values()) or 1.0
    row, name_width = 22.0, 175.0
    room = WIDTH - name_width - 50
    parts = []
    for i, (colour, (name, value)) in enumerate(zip(_colours(len(values) <= 4), values.items(), strict=False)):
        y, w = i * row + 4, max(0.0, room * value / largest)
        parts.append(
            f"<text x='{name_width - 6}' y='{y + 13}' text-anchor='end'>{text(name if len(name) <= 28 else name[:27] + '…')}</text>"
            f"<rect x='{name_width}' y='{y}' width='{w:.1f}' height='{row - 6}' rx='2' fill='{colour}' opacity='.8'/>"
            f"<text x='{name_width + w + 5:.1f}' y='{y + 13}'>{text(form.format(value))}</text>"
        )
    return _figure(title, "".join(parts), [], height=row * len(values) + 6)


def scatter(title: str, groups: Mapping[str, Series], x_label: str) -> Html:
    """Return a chart of points; those that are not finite are left out."""
    shown = {name: [p for p in group if all(map(math.isfinite, p))] for name, group in groups.items()}
    points = [point for group in shown.values() for point in group]
    if not points:
        return Html("")
    xs, ys = ([point[axis] for point in points] for axis in (0, 1))
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    plot = _Plot(
        *((min(ticks[0], *values), max(ticks[-1], *values)) for ticks, values in ((x_ticks, xs), (y_ticks, ys)))
    )
    parts = [plot.grid(x_ticks, y_ticks, x_label)]
    for colour, group in zip(_colours(), shown.values(), strict=False):
        parts += [f"<circle cx='{plot.x(x)}' cy='{plot.y(y)}' r='2.4' fill='{colour}' opacity='.5'/>" for x, y in group]
    return _figure(title, "".join(parts), list(shown))


def forest(title: str, intervals: Sequence[Interval], x_label: str) -> Html:
    """Return intervals under each other around a line at 0; those that are not finite are told, not drawn."""
    drawn = [i for i in intervals if all(map(math.isfinite, (i.low, i.value, i.high)))]
    ends = [0.0, *(end for i in drawn for end in (i.low, i.high))]
    ticks = _ticks(min(ends), max(ends))
    low, high = min(ticks[0], *ends), max(ticks[-1], *ends)
    row, left, right, width = 24.0, 345.0, 660.0, 880.0
    bottom = row * len(intervals) + 4

    def x(value: float) -> float:
        return round(left + (value - low) / ((high - low) or 1.0) * (right - left), 1)

    parts = [
        f"<line x1='{x(t)}' x2='{x(t)}' y1='0' y2='{bottom}' stroke='{'#9aa5b1' if t == 0 else '#e9edf2'}'/>"
        f"<text x='{x(t)}' y='{bottom + 13}' text-anchor='middle'>{_label(t)}</text>"
        for t in sorted({0.0, *ticks})
    ]
    for number, interval in enumerate(intervals):
        y, colour = number * row + row / 2, TONES[interval.tone]
        parts.append(
            f"<text x='{left - 14}' y='{y + 4}' text-anchor='end'>{text(interval.name)}</text>"
            f"<text x='{right + 14}' y='{y + 4}'>{text(interval.shown)}</text>"
        )
        if interval in drawn:
            parts.append(
                f"<line x1='{x(interval.low)}' x2='{x(interval.high)}' y1='{y}' y2='{y}' stroke='{colour}' "
                f"stroke-width='2.4'/><circle cx='{x(interval.value)}' cy='{y}' r='4.2' fill='{colour}'/>"
            )
    parts.append(f"<text x='{(left + right) / 2}' y='{bottom + 28}' text-anchor='middle'>{text(x_label)}</text>")
    return _figure(title, "".join(parts), [], height=bottom + 34, width=width)


def upright(title: str, intervals: Sequence[Interval], x_label: str) -> Html:
    """Return values with their intervals beside each other, in their order; those that are not finite are left out."""
    drawn = [(place, i) for place, i in enumerate(intervals, 1) if all(map(math.isfinite, (i.low, i.value, i.high)))]
    if not drawn:
        return Html("")
    ends = [end for _, i in drawn for end in (i.low, i.high)]
    ticks = _ticks(min(ends), max(ends))
    plot = _Plot((0.5, len(intervals) + 0.5), (min(ticks[0], *ends), max(ticks[-1], *ends)))
    every = math.ceil(len(intervals) / 12)
    parts = [plot.grid([float(place) for place in range(1, len(intervals) + 1, every)], ticks, x_label)]
    for place, i in drawn:
        x, colour = plot.x(place), TONES[i.tone]
        parts.append(
            f"<g><title>{text(i.name)}: {text(i.shown)}</title>"
            f"<line x1='{x}' x2='{x}' y1='{plot.y(i.low)}' y2='{plot.y(i.high)}' stroke='{colour}' stroke-width='2.4'/>"
            f"<circle cx='{x}' cy='{plot.y(i.value)}' r='4.2' fill='{colour}'/></g>"
        )
    return _figure(title, "".join(parts), [])


class _Plot:
    def __init__(self, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        self._x0, self._xr = xs[0], (xs[1] - xs[0]) or 1.0
        self._y0, self._yr = ys[0], (ys[1] - ys[0]) or 1.0

    def x(self, value: float) -> float:
        return round(LEFT + (value - self._x0) / self._xr * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - self._y0) / self._yr * (HEIGHT - TOP - BOTTOM), 1)

    def grid(self, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str) -> str:
        parts = [
            f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{self.y(t)}' y2='{self.y(t)}' stroke='#e9edf2'/>"
            f"<text x='{LEFT - 6}' y='{self.y(t) + 4}' text-anchor='end'>{_label(t)}</text>"
            for t in y_ticks
        ]
        parts += [
            f"<text x='{self.x(t)}' y='{HEIGHT - BOTTOM + 15}' text-anchor='middle'>{_label(t)}</text>" for t in x_ticks
        ]
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f"<text x='{middle}' y='{HEIGHT - 4}' text-anchor='middle'>{text(x_label)}</text>")
        return "".join(parts)


def _figure(title: str, drawing: str, names: Sequence[str], height: float = HEIGHT, width: float = WIDTH) -> Chart:
    key = "".join(f"<i style='background:{c}'></i>{text(n)}" for c, n in zip(_colours(), names, strict=False))
    chart = Chart(
        f"<figure><figcaption>{text(title)}</figcaption><div class='key'>{key if len(names) > 1 else ''}</div>"
        f"<svg viewBox='0 0 {width:g} {height:g}' role='img' aria-label='{text(title)}'>{drawing}</svg></figure>"
    )
    chart.alone = _alone(title, drawing, names if len(names) > 1 else (), height, width)
    return chart


def _alone(title: str, drawing: str, names: Sequence[str], height: float, width: float) -> str:
    """Return a chart as a document of its own, with the title and the key that a page shows above it."""
    key, x = [], 0.0
    for colour, name in zip(_colours(), names, strict=False):
        key.append(
            f"<rect x='{x:g}' y='24' width='10' height='10' rx='2' fill='{colour}'/>"
            f"<text x='{x + 15:g}' y='33'>{text(name)}</text>"
        )
        x += 30 + 6.2 * len(name)
    margin, head = 12.0, 40.0 if names else 24.0
    around = f"{-margin:g} {-margin:g} {width + 2 * margin:g} {height + head + 2 * margin:g}"
    document = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='{around}' width='{width + 2 * margin:g}' "
        f"height='{height + head + 2 * margin:g}' role='img' aria-label='{text(title)}'>"
        "<style>text{font:11px system-ui,'DejaVu Sans',sans-serif;fill:#5f6b7a}"
        ".title{font-size:14px;font-weight:600;fill:#1d2733}</style>"
        f"<rect x='{-margin:g}' y='{-margin:g}' width='100%' height='100%' fill='#fff'/>"
        f"<text class='title' y='12'>{text(title)}</text>{''.join(key)}"
        f"<g transform='translate(0 {head:g})'>{drawing}</g></svg>\n"
    )
    # XML knows no control characters, not even escaped.
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", " ", document)


def _colours(varied: bool = True) -> Sequence[str]:
    return COLOURS * 8 if varied else COLOURS[:1] * 48


def _ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return round values that span ``low`` to ``high``."""
    if high - low < 1e-12:
        return [low - abs(low) * 0.1 - 0.1, low, low + abs(low) * 0.1 + 0.1]
    raw = (high - low) / wanted
    power: float = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def _label(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e5 and (abs(value) >= 1e-4 or value == 0) else f"{value:.1e}"
