"""Runs as people and machines read them."""

import json
import textwrap
from typing import Any

from preference_tuning.retraining.decision import at, words
from preference_tuning.retraining.history import QUIET, Run

LONGEST = 100
"""Characters of an outcome in the table; JSON has all of it."""

Folded = tuple[Run, int]
"""A run, or the last of so many starts in a row that did not train."""


def line(run: Run) -> str:
    """Return the outcome in one line."""
    version = f" Version {run.result.version} of {run.name}." if run.result else ""
    why = f" Trained because: {run.reason}." if run.reason and run.outcome not in QUIET else ""
    return f"retrain    {_told(run)}.{version}{why}"


def as_json(run: Run) -> str:
    """Return a run as one line of JSON."""
    return json.dumps(_values(run), ensure_ascii=False)


def history(runs: list[Run], last: int | None, machine: bool) -> str:
    """Return runs, the newest last, as a table or as a line of JSON each.

    Args:
        runs: the oldest first.
        last: so many rows at the end; None: all.
        machine: whether JSON is wanted.
    """
    folded = _fold(runs)
    folded = folded if last is None else folded[max(0, len(folded) - last) :]
    if machine:
        return "\n".join(json.dumps({**_values(run), "times": times}, ensure_ascii=False) for run, times in folded)
    return "\n".join(_table(folded)) if folded else "no run yet"


def _fold(runs: list[Run]) -> list[Folded]:
    """Return the runs; of starts in a row that did not train, for one kind of reason, the last stands for all."""
    folded: list[Folded] = []
    for run in runs:
        before, times = folded[-1] if folded else (None, 0)
        if before and run.outcome in QUIET and (before.name, before.outcome) == (run.name, run.outcome):
            folded[-1] = (run, times + 1)
        else:
            folded.append((run, 1))
    return folded


def _values(run: Run) -> dict[str, Any]:
    seconds = {"seconds": round((run.ended - run.started).total_seconds(), 1)} if run.ended else {}
    return {**run.model_dump(mode="json", exclude={"process", "locked"}, exclude_none=True), **seconds}


def _table(folded: list[Folded]) -> list[str]:
    several = len({run.name for run, _ in folded}) > 1
    titles = ["started", *(["name"] if several else []), "trigger", "took", "data", "version", "outcome"]
    rows = [titles, *(_row(run, times, several) for run, times in folded)]
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows), strict=True)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]


def _row(run: Run, times: int, several: bool) -> list[str]:
    quiet = run.outcome in QUIET
    return [
        at(run.started),
        *([run.name] if several else []),
        run.trigger,
        words(run.ended - run.started) if run.ended and not quiet else "",
        run.fingerprints.data[:8] if run.fingerprints else "",
        run.result.version if run.result else "",
        textwrap.shorten(_told(run), LONGEST, placeholder=" …") + (f" ({times} times in a row)" if times > 1 else ""),
    ]


def _told(run: Run) -> str:
    if run.result:
        # The champion may come out again, and an inconclusive verdict holds.
        usual = (run.outcome, run.result.decision) in (("promoted", "promote"), ("held", "hold"))
        return f"{run.outcome}{'' if usual else f', {run.result.decision}'}: {run.result.reason}"
    if run.outcome in QUIET:
        return f"{run.outcome}: {run.reason}"
    if run.error:
        return f"{run.outcome}, exit code {run.exit_code}: {run.error.splitlines()[0]}"
    return run.outcome
