"""What a notification says of a run: facts for machines, and a text for people."""

from contextlib import suppress
from typing import Any

from pydantic import BaseModel

from preference_tuning.config import RegistryConfig
from preference_tuning.config.notify import Event
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.evaluation import catalogue
from preference_tuning.evaluation.job import REPORT, SUMMARY, Evaluation
from preference_tuning.registry import operations
from preference_tuning.registry.folder import FolderRegistry
from preference_tuning.retraining.history import Run

EVENTS: tuple[Event, ...] = ("promoted", "held", "failed")
WORSE = 5
"""Sentences about what got worse; the report has the others."""
LONGEST = 1500
"""Characters of an error; Discord takes 2000 of a text."""


class Message(BaseModel):
    """What became of a run."""

    outcome: Event
    model: str
    """The name in the registry."""
    run: str | None = None
    """The name in ZenML."""
    trigger: str
    started: str
    seconds: float | None = None
    version: str | None = None
    decision: str | None = None
    reason: str | None = None
    champion: str | None = None
    figures: dict[str, dict[str, str]] = {}
    """The main figures with their intervals, by their words, of every model that was measured."""
    worse: list[str] = []
    exit_code: int | None = None
    error: str | None = None
    then: str | None = None
    """How a run that failed is continued."""
    links: dict[str, str] = {}

    @property
    def title(self) -> str:
        """Return the outcome in a line."""
        if self.outcome == "failed":
            return f"{self.model}: failed (exit code {self.exit_code})"
        of = "is the champion now" if self.outcome == "promoted" else f"held; the champion is {self.champion or 'none'}"
        return f"{self.model}: {self.version} {of}"

    def text(self) -> str:
        """Return it for people."""
        candidate = {words: next(iter(reversed(row.values()))) for words, row in self.figures.items()}
        lines = [
            self.title,
            *([f"verdict: {self.decision}: {self.reason}"] if self.decision else []),
            *(f"{words}: {shown}" for words, shown in candidate.items()),
            *(f"worse: {sentence}" for sentence in self.worse[:WORSE]),
            *([f"and {more} more" for more in [len(self.worse) - WORSE] if more > 0]),
            *([f"{self.error[:LONGEST]}"] if self.error else []),
            *([self.then] if self.then else []),
            *(f"{name}: {link}" for name, link in self.links.items()),
        ]
        return "\n".join(lines)


def of(run: Run, config: RegistryConfig) -> Message | None:
    """Return what is told of a run, or None if its end is nothing to tell.

    Args:
        run: as its history has it at its end.
        config: of the registry that it went to.
    """
    outcome = next((event for event in EVENTS if event == run.outcome), None)
    if outcome is None:
        return None
    told = Message(
        outcome=outcome,
        model=run.name,
        trigger=run.trigger,
        started=run.started.isoformat(),
        seconds=round((run.ended - run.started).total_seconds(), 1) if run.ended else None,
        exit_code=run.exit_code,
        error=run.error,
        then=run.then,
    )
    if run.result is None:
        return told
    facts: dict[str, Any] = {
        "version": run.result.version,
        "decision": run.result.decision,
        "reason": run.result.reason,
        "champion": run.result.champion,
        "run": run.result.run or None,
    }
    found: dict[str, Any] = {"links": run.result.links}
    with suppress(PreferenceTuningError, ValueError, LookupError, OSError):  # without figures is better than not at all
        found = _measured(FolderRegistry(config), run.result.version, run.result.links)
    return told.model_copy(update={**facts, **found})


def _measured(registry: FolderRegistry, version: str, links: dict[str, str]) -> dict[str, Any]:
    """Return the figures of the newest verdict on a version, what got worse, and where its report lies."""
    folder = f"{operations.verdicts(registry, version)[-1].folder}/evidence/evaluation"
    report = f"{registry.place}/{registry.name}/{folder}/{REPORT}"
    found: dict[str, Any] = {"links": {**links, "report": report}}
    text = registry.read(f"{folder}/{SUMMARY}")
    if text is None:
        return found
    evaluation = Evaluation.model_validate_json(text)
    last = evaluation.verdict.candidate
    ordered = {name: evaluation.models[name] for name in sorted(evaluation.models, key=lambda name: name == last)}
    figures = {
        words: {model: catalogue.in_line(name, values.get(name)) for model, values in ordered.items() if name in values}
        for name, words in catalogue.main(ordered).items()
    }
    return {**found, "figures": figures, "worse": evaluation.worse}
