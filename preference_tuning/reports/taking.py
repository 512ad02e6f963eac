"""Taking the charts of a report out of it again, each as an SVG file that stands alone."""

import re
from html import unescape

_FIGURE = re.compile(
    r"<figure><figcaption>(?P<title>.*?)</figcaption><div class='key'>(?P<key>.*?)</div>"
    r"<svg viewBox='0 0 (?P<width>[\d.]+) (?P<height>[\d.]+)'[^>]*>(?P<drawing>.*?)</svg></figure>",
    re.DOTALL,
)
_NAMES = re.compile(r"<i style='background:(#[0-9a-f]{6})'></i>([^<]*)")
_UNFIT = re.compile(r"[^A-Za-z0-9 ,.()+-]+")
KEY_HEIGHT, LETTER = 20.0, 6.5
FONT = "font:11px system-ui,'DejaVu Sans',sans-serif;fill:#5f6b7a"


def drawings(page: str) -> dict[str, str]:
    """Return ``{title: SVG}`` for every chart of a report that was made here; the title is fit for a file's name."""
    found: dict[str, str] = {}
    for figure in _FIGURE.finditer(page):
        title = " ".join(_UNFIT.sub(" ", unescape(figure["title"])).split())[:80]
        number = sum(name == title or name.startswith(f"{title} (") for name in found)
        found[f"{title} ({number + 1})" if number else title] = _alone(figure)
    return found


def _alone(figure: "re.Match[str]") -> str:
    """Return a chart with the key of its colours above it."""
    key, x = "", 8.0
    for colour, name in _NAMES.findall(figure["key"]):
        key += f"<rect x='{x:g}' y='6' width='9' height='9' fill='{colour}'/><text x='{x + 13:g}' y='14'>{name}</text>"
        x += 30 + LETTER * len(unescape(name))
    above = KEY_HEIGHT if key else 0.0
    width, height = float(figure["width"]), float(figure["height"]) + above
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}' width='{width:g}' "
        f"height='{height:g}'><style>text{{{FONT}}}</style><rect width='100%' height='100%' fill='#fff'/>{key}"
        f"<g transform='translate(0 {above:g})'>{figure['drawing']}</g></svg>\n"
    )
