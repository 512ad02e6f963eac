"""Reports: charts without scripts, and nothing from outside unescaped."""

import math
import xml.etree.ElementTree as ElementTree

import pytest

from preference_tuning import reports

ATTACKS = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>",
    "'><svg onload=alert(1)>",
    "</title><script>",
    "</style><script>",
    "javascript:alert(1)",
    "<a href='javascript:alert(1)'>x</a>",
    "<iframe srcdoc='x'>",
    "&lt;script&gt;",
    "{{7*7}}",
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_text_from_outside_stays_text(attack: str) -> None:
    html = reports.page(
        attack,
        attack,
        reports.facts({attack: attack}),
        reports.section(attack, reports.paragraph(attack), reports.badge(attack)),
        reports.table([attack], [[attack]]),
        reports.charts(
            reports.line_chart(attack, {attack: [(0, 1), (1, 2)], "b": [(0, 1)]}, attack),
            reports.histogram(attack, {attack: [1.0, 2.0], "b": [3.0]}, attack),
            reports.bars(attack, {attack: 1.0}),
        ),
    )
    for tag in ("<script", "<img", "<iframe", "<a ", "onload=alert(1)>", "onerror=alert(1)>"):
        assert tag not in html
    assert html.count("<svg ") == 3


def test_charts_are_well_formed_and_draw_what_they_are_given() -> None:
    figure = reports.line_chart("Loss", {"training": [(1, 0.7), (2, 0.5), (3, math.nan), (4, 0.2)]}, level=0.69)
    tree = ElementTree.fromstring(figure)
    (line,) = tree.iter("polyline")
    points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert len(points) == 3, "a value that is no number is left out"
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted(y for _, y in points), "a falling loss falls on the page"


def test_charts_of_little_or_odd_data() -> None:
    assert "nothing was logged" in reports.line_chart("Loss", {"training": []})
    for values in ([(1, 0.5)], [(1, 0.0), (2, 0.0)], [(1, 1e-9), (2, 1e9)], [(1, -3.0), (2, -3.0)]):
        ElementTree.fromstring(reports.line_chart("Loss", {"training": values}))
    assert reports.histogram("x", {"a": []}, "x") == ""
    ElementTree.fromstring(reports.histogram("x", {"a": [5.0, 5.0]}, "x"))


def test_a_histogram_counts_every_value_once() -> None:
    """Twenty bins over 0 to 20, the last one with its upper end; a limit beyond the values widens them."""
    drawn = reports.histogram("x", {"a": [0.0, 0.5, 1.0, 19.5, 20.0]}, "x", marks={})
    bars = [float(bar.get("height", "0")) for bar in ElementTree.fromstring(drawn).iter("rect")]
    assert [round(height / max(bars), 2) for height in bars] == [1.0, 0.5, *[0.0] * 17, 1.0]
    assert ">limit</text>" in reports.histogram("x", {"a": [1.0]}, "x", marks={"limit": 9.0})
