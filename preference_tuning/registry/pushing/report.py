"""Receipts for people: lines on the screen, a page in the dashboard, and the message of a push that failed."""

import re
from collections.abc import Sequence
from typing import Any

from preference_tuning.errors import PreferenceTuningError
from preference_tuning.registry.pushing import Receipt
from preference_tuning.reports import markup

WORDS = {"done": "pushed", "pending": "waiting", "failed": "not pushed"}
COMMIT = re.compile(r"[0-9a-f]{40,}")


def render(receipts: Sequence[Receipt]) -> str:
    """Return a line for each receipt, as the end of a run has them."""
    return "\n".join(f"{WORDS[receipt.state]:10} {receipt.target}: {_told(receipt)}" for receipt in receipts)


def page(version: str, receipts: Sequence[Receipt]) -> str:
    """Return the receipts of a version as HTML."""
    rows = [
        (
            receipt.target,
            markup.badge(receipt.state),
            _told(receipt),
            receipt.attempts,
            f"{receipt.updated:%Y-%m-%d %H:%M:%S} UTC",
        )
        for receipt in receipts
    ]
    table = markup.table(("target", "state", "what", "attempts", "when"), rows)
    details = [markup.section(receipt.target, markup.facts(receipt.facts)) for receipt in receipts if receipt.facts]
    return markup.page(f"Pushes of version {version}", "A push that did not go through is continued.", table, *details)


def metadata(receipts: Sequence[Receipt]) -> dict[str, Any]:
    """Return what the dashboard shows beside the step, by target; ZenML takes no colons in names."""
    return {receipt.target.replace(":", " "): f"{receipt.state}: {_told(receipt)}" for receipt in receipts}


def raise_failed(version: str, receipts: Sequence[Receipt]) -> None:
    """Say which pushes failed, if some did.

    Raises:
        PreferenceTuningError: with their reasons, and what finishes them.
    """
    failed = [receipt for receipt in receipts if receipt.state == "failed"]
    if failed:
        reasons = "\n".join(f"  {receipt.target}: {receipt.reason}" for receipt in failed)
        raise PreferenceTuningError(
            f"version {version} is registered, but {len(failed)} of {len(receipts)} pushes failed:\n{reasons}\n"
            f"`python run.py registry push {version} --config CONFIG`, or the same run again, continues them"
        )


def _told(receipt: Receipt) -> str:
    """Return where it is, or why it is not there."""
    if receipt.state != "done":
        return receipt.reason or ""
    return ", ".join(f"{name} {_short(value)}" for name, value in receipt.facts.items())


def _short(value: str) -> str:
    return value[:10] if COMMIT.fullmatch(value) else value
