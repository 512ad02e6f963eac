"""An evaluation on one screen of a terminal."""

import textwrap

from preference_tuning.evaluation import catalogue
from preference_tuning.evaluation.job import Evaluation

WIDTH = 120
INDENT = 11
WORSE = 5
"""Sentences about what got worse; the report has the others."""
ROWS = {
    "likelihood/accuracy": "chosen answer is likelier",
    "likelihood/accuracy_norm": "the same, per token",
    "nll/chosen": "loss on chosen answers",
    "rewards/accuracies": "reward accuracy",
    "kl/chosen": "divergence from reference",
    "general/nll": "loss on general text",
    "generation/length": "length of answers",
    "generation/rep_4": "repetition in answers",
    "judge/win_rate": "judge's win rate",
}


def render(evaluation: Evaluation) -> list[str]:
    """Return the lines: the models side by side, what got worse, answers to one prompt, and the verdict."""
    worse = evaluation.worse[:WORSE]
    if more := len(evaluation.worse) - len(worse):
        worse.append(f"and {more} more, see the report")
    verdict = evaluation.verdict
    return [
        *table(evaluation),
        "",
        *entry("got worse", *(worse or ["nothing"])),
        "",
        *_sample(evaluation),
        *entry("verdict", f"{verdict.decision}: {verdict.reason}"),
    ]


def table(evaluation: Evaluation) -> list[str]:
    """Return the main figures of every model, as wide as they need."""
    rows = [["held-out pairs", *evaluation.models]]
    rows += [
        [words, *(catalogue.in_line(name, figures.get(name)) for figures in evaluation.models.values())]
        for name, words in ROWS.items()
        if any(name in figures for figures in evaluation.models.values())
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]


def entry(name: str, *paragraphs: str) -> list[str]:
    """Return a name and what belongs to it, wrapped beside it."""
    wrapper = textwrap.TextWrapper(WIDTH - INDENT, break_on_hyphens=False)
    lines = [line for words in paragraphs for line in wrapper.wrap(_plain(words)) or [""]]
    return [f"{title:{INDENT}}{line}" for title, line in zip([name] + [""] * len(lines), lines, strict=False)]


def _sample(evaluation: Evaluation) -> list[str]:
    if not evaluation.samples:
        return []
    sample = evaluation.samples[0]
    said = {"asked": sample.prompt, **sample.answers}
    return [*(f"{name:{INDENT}}{_cut(text) or '(nothing)'}" for name, text in said.items()), ""]


def _cut(text: str) -> str:
    flat, room = _plain(text), WIDTH - INDENT
    return flat if len(flat) <= room else flat[: room - 1] + "…"


def _plain(text: str) -> str:
    """Return text in one line; a terminal would obey the control characters of an answer."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))
