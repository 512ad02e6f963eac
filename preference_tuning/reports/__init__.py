"""HTML reports with inline SVG charts: no scripts, no external files, everything from data or models escaped.

ZenML's dashboard shows HTML in a sandboxed frame without scripts, so a chart is drawn here or not at all.
"""

from preference_tuning.reports.drawing import (
    Chart,
    Interval,
    Tone,
    bars,
    forest,
    histogram,
    line_chart,
    scatter,
    upright,
)
from preference_tuning.reports.markup import (
    Html,
    badge,
    beside,
    charts,
    facts,
    folded,
    key,
    listing,
    marked_text,
    muted,
    noted,
    page,
    paragraph,
    quotation,
    section,
    strong,
    table,
    text,
)
from preference_tuning.reports.taking import drawings

__all__ = [
    "Chart",
    "Html",
    "Interval",
    "Tone",
    "badge",
    "bars",
    "beside",
    "charts",
    "drawings",
    "facts",
    "folded",
    "forest",
    "histogram",
    "key",
    "line_chart",
    "listing",
    "marked_text",
    "muted",
    "noted",
    "page",
    "paragraph",
    "quotation",
    "scatter",
    "section",
    "strong",
    "table",
    "text",
    "upright",
]
