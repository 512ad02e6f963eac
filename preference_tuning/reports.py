"""HTML reports with inline SVG charts: no scripts, no external files, everything from data or models escaped.

ZenML's dashboard shows HTML in a sandboxed frame without scripts, so a chart is drawn here or not at all.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

SHORT = 20
"""Characters that a table never breaks."""

Series = Sequence[tuple[float, float]]

COLOURS = ("#2f6fde", "#e07b39", "#3a9d5d", "#9b59b6", "#b0413e", "#5f6b7a")

STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;color:#1d2733;background:#fff;
margin:0 auto;padding:24px;max-width:1080px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:17px;margin:32px 0 10px;border-bottom:1px solid #e3e8ee;padding-bottom:4px}
.lead{color:#5f6b7a;margin:0 0 16px}
table{border-collapse:collapse;width:100%;font-size:14px;margin:8px 0}
th,td{text-align:left;padding:6px 10px;border-bottom:1px solid #e9edf2;vertical-align:top;overflow-wrap:anywhere}
th{color:#5f6b7a;font-weight:600}td.s,th.s{white-space:nowrap}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:12px 0}
.fact{background:#f5f7fa;border-radius:8px;padding:10px 12px}.fact b{display:block;font-size:19px;overflow-wrap:anywhere}
.fact span{color:#5f6b7a;font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:18px}
figure{margin:0}figcaption{font-weight:600;font-size:14px;margin-bottom:2px}svg{width:100%;height:auto;display:block}
svg text{font:11px system-ui,'DejaVu Sans',sans-serif;fill:#5f6b7a}
.key{font-size:12px;color:#5f6b7a}.key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin:0 4px 0 10px}
.row{margin:10px 0;padding:8px 12px;background:#f5f7fa;border-radius:8px}.row b{font-size:13px;color:#5f6b7a}
mark{background:none;color:inherit}mark.prompt{color:#5f6b7a}mark.chosen{background:#d7efdf}mark.rejected{background:#fbe3d3}
mark.cut{color:#9aa5b1;text-decoration:line-through}mark.special{font-weight:700;outline:1px solid #c7d0da;border-radius:3px}
.badge{display:inline-block;white-space:nowrap;border-radius:999px;padding:2px 12px;font-weight:600;color:#fff;background:#5f6b7a}
.promote{background:#2e8b57}.hold{background:#b0413e}.inconclusive,.warning{background:#b7791f}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font:13px/1.45 ui-monospace,'DejaVu Sans Mono',monospace}
"""


class Html(str):
    """Markup made here; any other string is text and gets escaped."""

    __slots__ = ()


def text(value: object) -> str:
    """Return a value as escaped text, or markup as it is."""
    return value if isinstance(value, Html) else escape(str(value))


def page(title: str, lead: str, *parts: Html) -> str:
    """Return a whole document."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{text(title)}</h1><p class='lead'>{text(lead)}</p>{''.join(parts)}</body></html>\n"
    )


def section(title: str, *parts: Html | str) -> Html:
    """Return a heading with what belongs to it."""
    return Html(f"<h2>{text(title)}</h2>{''.join(text(part) for part in parts)}")


def paragraph(words: str) -> Html:
    """Return a paragraph of text."""
    return Html(f"<p>{text(words)}</p>")


def badge(word: str) -> Html:
    """Return a coloured verdict."""
    return Html(f"<span class='badge {text(word)}'>{text(word)}</span>")


def facts(values: Mapping[str, object]) -> Html:
    """Return a grid of figures with their names."""
    cells = (f"<div class='fact'><b>{text(value)}</b><span>{text(name)}</span></div>" for name, value in values.items())
    return Html(f"<div class='facts'>{''.join(cells)}</div>")


def table(header: Sequence[str], rows: Iterable[Sequence[object]], numeric: bool = False) -> Html:
    """Return a table; with ``numeric``, all columns but the first are aligned as numbers."""

    def cell(tag: str, place: int, value: object) -> str:
        shown = text(value)
        kind = " class=n" if numeric and place else " class=s" if len(shown) <= SHORT else ""
        return f"<{tag}{kind}>{shown}</{tag}>"

    def cells(tag: str, row: Sequence[object]) -> str:
        return "".join(cell(tag, place, value) for place, value in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return Html(f"<table><thead><tr>{cells('th', header)}</tr></thead><tbody>{body}</tbody></table>")


def charts(*figures: Html) -> Html:
    """Return figures side by side."""
    return Html(f"<div class='charts'>{''.join(figures)}</div>")


def marked_text(title: str, pieces: Iterable[tuple[str, str]]) -> Html:
    """Return text in pieces, each ``(text, classes of its style)``, under a title."""
    marks = "".join(f"<mark class='{text(classes)}'>{text(piece)}</mark>" for piece, classes in pieces)
    return Html(f"<div class='row'><b>{text(title)}</b><pre>{marks}</pre></div>")


def key(meanings: Mapping[str, str]) -> Html:
    """Return what the styles of marked text stand for."""
    marks = " ".join(f"<mark class='{text(style)}'>{text(words)}</mark>" for style, words in meanings.items())
    return Html(f"<p>{marks}</p>")


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


def _figure(title: str, drawing: str, names: Sequence[str], height: float = HEIGHT) -> Html:
    key = "".join(f"<i style='background:{c}'></i>{text(n)}" for c, n in zip(_colours(), names, strict=False))
    return Html(
        f"<figure><figcaption>{text(title)}</figcaption><div class='key'>{key if len(names) > 1 else ''}</div>"
        f"<svg viewBox='0 0 {WIDTH:g} {height:g}' role='img' aria-label='{text(title)}'>{drawing}</svg></figure>"
    )


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
