"""The data report."""

import itertools
from typing import Any

from preference_tuning import reports
from preference_tuning.data.table import SPLITS, Dataset, Manifest

SAMPLES = 6
CHARTED = 20_000


def render(manifest: Manifest, dataset: Dataset) -> str:
    """Return the report of a canonical dataset as HTML."""
    rows = list(itertools.islice((row for split in SPLITS for row in dataset.rows(split)), CHARTED))
    lengths = {name: [len(_words(row[name])) for row in rows] for name in ("chosen", "rejected")}
    figures = [reports.histogram("Length of the answers", lengths, "characters")]
    if manifest.topics:
        figures.append(reports.bars("Pairs by topic", dict(list(manifest.topics.items())[:16])))
    return reports.page(
        "Preference data",
        f"{manifest.source} · fingerprint {manifest.fingerprint[:16]}",
        reports.facts(
            {
                "rows in": manifest.rows_in,
                "training pairs": manifest.train,
                "held-out pairs": manifest.held_out,
                "different prompts": manifest.prompts,
                "rows left out": sum(manifest.dropped.values()),
                "chosen is longer": f"{manifest.chosen_longer:.0%}",
            }
        ),
        reports.section("Lengths and topics", reports.charts(*figures)),
        reports.section("Rows left out", _dropped(manifest)),
        reports.section("Held-out pairs, as read", _samples(itertools.islice(dataset.rows("held_out"), SAMPLES))),
    )


def _words(messages: list[dict[str, str]]) -> str:
    return "\n".join(message["content"] for message in messages)


def _dropped(manifest: Manifest) -> reports.Html:
    if not manifest.dropped:
        return reports.paragraph("None: every row is in the training or the held-out pairs.")
    return reports.table(["reason", "rows"], manifest.dropped.items(), numeric=True)


def _samples(rows: Any) -> reports.Html:
    return reports.table(
        ["row", "prompt", "chosen", "rejected"],
        [[row["row"], *(_words(row[name]) for name in ("prompt", "chosen", "rejected"))] for row in rows],
    )
