"""Pages of HTML: no scripts, no external files, everything from data or models escaped."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

SHORT = 20
"""Characters that a table never breaks."""
QUOTED = 700
"""Characters of a quotation that are shown at once."""

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
.fact{background:#f5f7fa;border-radius:8px;padding:10px 12px}.fact b{display:block;font-size:17px;overflow-wrap:anywhere}
.fact span{color:#5f6b7a;font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:18px}
figure{margin:0}figcaption{font-weight:600;font-size:14px;margin-bottom:2px}svg{width:100%;height:auto;display:block}
svg text{font:11px system-ui,'DejaVu Sans',sans-serif;fill:#5f6b7a}
.key{font-size:12px;color:#5f6b7a}.key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin:0 4px 0 10px}
.row{margin:10px 0;padding:8px 12px;background:#f5f7fa;border-radius:8px}.row b{font-size:13px;color:#5f6b7a}
mark{background:none;color:inherit}mark.prompt{color:#5f6b7a}mark.chosen{background:#d7efdf}mark.rejected{background:#fbe3d3}
mark.cut{color:#9aa5b1;text-decoration:line-through}mark.special{font-weight:700;outline:1px solid #c7d0da;border-radius:3px}
.badge{display:inline-block;white-space:nowrap;border-radius:999px;padding:2px 12px;font-weight:600;color:#fff;background:#5f6b7a}
.promote,.passed,.done,.champion{background:#2e8b57}.hold,.failed{background:#b0413e}
.inconclusive,.undecided,.warning,.pending{background:#b7791f}.skipped{background:#9aa5b1}
.muted{color:#9aa5b1}small{color:#5f6b7a;font-size:12px;font-weight:400}
li{margin:3px 0}details{margin:6px 0}summary{cursor:pointer;color:#2f6fde;font-size:13px}
.beside{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:10px}
article{margin:0 0 18px;padding:8px 0 0;border-top:1px solid #e3e8ee}
.words{white-space:pre-wrap;overflow-wrap:anywhere;font-size:14px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font:13px/1.45 ui-monospace,'DejaVu Sans Mono',monospace}
@media (max-height:400px){html{zoom:.68}body{max-width:none;padding:14px 20px}h2{margin:14px 0 6px}.lead{margin:0 0 8px}
.facts{grid-template-columns:repeat(auto-fit,minmax(110px,1fr));margin:6px 0}.fact{padding:6px 10px}
.charts{grid-template-columns:repeat(auto-fit,minmax(280px,1fr))}th,td{padding:3px 10px}}
"""
"""Of every page; the last rule is for ZenML's dashboard, which shows a report in a window of 384 px."""


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


def listing(items: Iterable[object]) -> Html:
    """Return a list with a point for each item."""
    return Html(f"<ul>{''.join(f'<li>{text(item)}</li>' for item in items)}</ul>")


def muted(value: object) -> Html:
    """Return a value in grey."""
    return Html(f"<span class='muted'>{text(value)}</span>")


def strong(value: object) -> Html:
    """Return a value in bold."""
    return Html(f"<b>{text(value)}</b>")


def noted(value: object, note: object) -> Html:
    """Return a value with something about it in small letters after it."""
    return Html(f"{text(value)} <small>{text(note)}</small>")


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


def quotation(title: str, words: str) -> Html:
    """Return text that someone wrote, under a title; what goes beyond some lines is folded in."""
    shown, rest = words[:QUOTED], words[QUOTED:]
    more = folded(f"{len(rest):,} more characters", Html(text(rest))) if rest else ""
    said = Html(f"{text(shown)}{more}") if words.strip() else muted("nothing")
    return Html(f"<div class='row'><b>{text(title)}</b><div class='words'>{said}</div></div>")


def folded(title: str, *parts: Html) -> Html:
    """Return what a reader opens if it is wanted."""
    return Html(f"<details><summary>{text(title)}</summary>{''.join(parts)}</details>")


def beside(*parts: Html) -> Html:
    """Return parts side by side, as many as have room."""
    return Html(f"<div class='beside'>{''.join(parts)}</div>")


def key(meanings: Mapping[str, str]) -> Html:
    """Return what the styles of marked text stand for."""
    marks = " ".join(f"<mark class='{text(style)}'>{text(words)}</mark>" for style, words in meanings.items())
    return Html(f"<p>{marks}</p>")
