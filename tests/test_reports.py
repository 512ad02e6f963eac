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
            reports.scatter(attack, {attack: [(0, 1)], "b": [(1, 2)]}, attack),
            reports.forest(attack, [reports.Interval(attack, -1, 0, 1, attack, "good")], attack),
        ),
        reports.listing([attack]),
        reports.beside(reports.quotation(attack, attack), reports.quotation("long", attack * 99)),
        reports.folded(attack, reports.muted(attack), reports.strong(attack), reports.noted(attack, attack)),
    )
    for tag in ("<script", "<img", "<iframe", "<a ", "onload=alert(1)>", "onerror=alert(1)>"):
        assert tag not in html
    assert html.count("<svg ") == 5


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


def test_a_forest_has_each_interval_where_it_belongs() -> None:
    """Left and right of the line at 0, in the order given; what is no number is told and not drawn."""
    rows = [
        ("below", -2.0, -1.5, -1.0),
        ("around", -0.5, 0.0, 0.5),
        ("above", 1.0, 2.0, 4.0),
        ("odd", math.nan, math.nan, 1),
    ]
    drawn = reports.forest("x", [reports.Interval(*row, f"told {row[0]}", "unclear") for row in rows], "nats")
    tree = ElementTree.fromstring(drawn)
    lines = [line for line in tree.iter("line") if "stroke-width" in line.attrib]
    ends = [(float(line.attrib["x1"]), float(line.attrib["x2"])) for line in lines]
    zero = next(float(line.attrib["x1"]) for line in tree.iter("line") if line.attrib["stroke"] == "#9aa5b1")
    points = [float(circle.attrib["cx"]) for circle in tree.iter("circle")]
    assert len(ends) == len(points) == 3
    assert ends[0][1] < zero < ends[2][0]
    assert points[1] == pytest.approx(zero)
    assert all(low <= point <= high for (low, high), point in zip(ends, points, strict=True))
    assert (ends[2][1] - ends[2][0]) == pytest.approx(3 * (ends[0][1] - ends[0][0]), abs=0.5)
    assert all(f"told {row[0]}" in drawn for row in rows)


def test_a_scatter_leaves_out_what_is_no_number() -> None:
    drawn = reports.scatter("x", {"a": [(0, 0), (1, math.nan), (2, 4)]}, "x")
    assert len(list(ElementTree.fromstring(drawn).iter("circle"))) == 2
    assert reports.scatter("x", {"a": [(0, math.nan)]}, "x") == ""
    assert reports.histogram("x", {"a": [math.nan]}, "x") == ""
