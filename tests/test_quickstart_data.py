"""The preference set under data/ keeps what its card promises."""

import json
from collections import Counter
from pathlib import Path

ROWS = [
    json.loads(line) for line in (Path(__file__).parent.parent / "data" / "direct_answers.jsonl").open(encoding="utf-8")
]
FLAWS = {"evasive", "padded", "malformed", "ungrounded"}


def longer(rows: list[dict[str, str]]) -> float:
    return sum(len(row["chosen"]) > len(row["rejected"]) for row in rows) / len(rows)


def test_size_and_topics() -> None:
    topics = Counter(row["topic"] for row in ROWS)
    assert len(ROWS) == 360
    assert set(topics.values()) == {30}
    assert len(topics) == 12
    assert {row["flaw"] for row in ROWS} == FLAWS


def test_prompts_and_answers_all_differ() -> None:
    assert len({" ".join(row["prompt"].casefold().split()) for row in ROWS}) == len(ROWS)
    texts = [row[side] for row in ROWS for side in ("chosen", "rejected")]
    assert all(text.strip() == text and text for text in texts)
    assert max(Counter(row["rejected"] for row in ROWS).values()) == 1
    assert not [row for row in ROWS if row["chosen"] == row["rejected"]]


def test_length_is_no_shortcut() -> None:
    assert 0.4 <= longer(ROWS) <= 0.6
    for topic in {row["topic"] for row in ROWS}:
        assert 0.4 <= longer([row for row in ROWS if row["topic"] == topic]) <= 0.6
    for flaw in FLAWS:
        assert 0.3 <= longer([row for row in ROWS if row["flaw"] == flaw]) <= 0.7
