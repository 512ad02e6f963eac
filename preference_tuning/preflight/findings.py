"""What a check finds, in one form for every area, and the three ways in which it is told: table, lines, JSON."""

import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from pydantic import BaseModel

from preference_tuning.config import RunConfig
from preference_tuning.errors import BY_EXIT_CODE, PreferenceTuningError

Level = Literal["ok", "warning", "error"]
WARNING = "warning:"

AREA, LEVEL, TEXT, TODO = 10, 9, 56, 44
"""Columns of the table, in characters."""


class Finding(BaseModel):
    """One thing that is right, doubtful or wrong."""

    area: str
    level: Level
    text: str
    todo: str = ""
    """What to do; empty where there is nothing to do, or where ``text`` says it."""
    exit_code: int = 0
    """Of an error: what the command ends with."""


class Area:
    """The findings of one area, made with its name once."""

    def __init__(self, name: str) -> None:
        """Take the name that stands in the table."""
        self.name = name

    def ok(self, text: str) -> Finding:
        """Return that something is right."""
        return Finding(area=self.name, level="ok", text=text)

    def warning(self, text: str, todo: str = "") -> Finding:
        """Return that something is doubtful."""
        return Finding(area=self.name, level="warning", text=text, todo=todo)

    def error(self, error: PreferenceTuningError, todo: str = "") -> Finding:
        """Return that something stops the run."""
        return Finding(area=self.name, level="error", text=str(error), todo=todo, exit_code=error.exit_code)


def of_look(name: str, look: Callable[[RunConfig], str], config: RunConfig) -> Iterator[Finding]:
    """Yield what a plain ``look(config)`` says: a text, lines in it that begin with ``warning:``, or an error."""
    area = Area(name)
    try:
        first, *others = look(config).splitlines() or [""]
    except PreferenceTuningError as error:
        yield area.error(error)
        return
    yield area.ok(first)
    for line in map(str.strip, others):
        if line.startswith(WARNING):
            yield area.warning(line.removeprefix(WARNING).strip())
        elif line:
            yield area.ok(line)


def failure(findings: Iterable[Finding]) -> PreferenceTuningError | None:
    """Return the one error that all errors among the findings make; a wrong config outranks wrong data."""
    errors = [finding for finding in findings if finding.level == "error"]
    if not errors:
        return None
    kinds = (BY_EXIT_CODE.get(error.exit_code, PreferenceTuningError) for error in errors)
    kind = min(kinds, key=lambda kind: RANK.index(kind.exit_code) if kind.exit_code in RANK else len(RANK))
    told = (f"{error.text}; {error.todo}" if error.todo else error.text for error in errors)
    return kind("\n".join(dict.fromkeys(told)))


RANK = (2, 3, 4, 75, 1)
"""Exit codes, the one that decides first."""


def lines(findings: Iterable[Finding]) -> str:
    """Return the findings as lines, as a run shows them before it starts: an area each, warnings below it."""
    told, areas = [], set()
    for finding in findings:
        first = finding.area not in areas
        areas.add(finding.area)
        level = "ok" if finding.level == "ok" else finding.level
        todo = f": {finding.todo}" if finding.todo else ""
        if first and finding.level == "ok":
            told.append(f"{finding.area:9} ok: {finding.text}")
        elif finding.level == "ok":
            told.append(f"{'':10}{finding.text}")
        else:
            told.append(f"{finding.area if first else '':10}{level}: {finding.text}{todo}")
    return "\n".join(told)


def table(findings: Sequence[Finding]) -> str:
    """Return the findings as a table, errors and warnings marked, and a line that counts them."""
    rows = [line for finding in findings for line in _rows(finding)]
    counts = {level: sum(f.level == level for f in findings) for level in ("error", "warning")}
    words = [f"{count} {level}{'s' if count != 1 else ''}" for level, count in counts.items() if count]
    end = f"{' and '.join(words)}" if words else "nothing stands in the way"
    head = f"{'':{AREA}}{'':{LEVEL}}{'what was found':{TEXT}}  what to do"
    return "\n".join([head, *rows, "", end])


def _rows(finding: Finding) -> Iterator[str]:
    found = [part for line in finding.text.splitlines() for part in textwrap.wrap(line, TEXT) or [""]]
    todo = textwrap.wrap(finding.todo, TODO)
    for i in range(max(len(found), len(todo), 1)):
        name, level = (finding.area, finding.level) if i == 0 else ("", "")
        left, right = (column[i] if i < len(column) else "" for column in (found, todo))
        yield f"{name:{AREA}}{level:{LEVEL}}{left:{TEXT}}  {right}".rstrip()


def as_json(findings: Sequence[Finding]) -> str:
    """Return the findings and the exit code as JSON."""
    error = failure(findings)
    code = error.exit_code if error else 0
    return json.dumps({"exit_code": code, "findings": [finding.model_dump() for finding in findings]}, indent=2)
