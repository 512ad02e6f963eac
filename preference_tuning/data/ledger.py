"""What is wrong with which rows: counted, shown with their places, kept apart, and none lost without a reason."""

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from preference_tuning.config import Problems
from preference_tuning.data.table import ProblemCount
from preference_tuning.errors import DataError

SHOWN = 20
"""Places listed for each problem; the quarantine has all dropped rows."""
GOES_ON = ("keep", "keep_end")
NOT_LOST = ("tie",)
"""Problems that are no sign of damage: a row that never held a preference is counted and kept apart, and not lost."""


class Ledger:
    """Counts the problems of one kind of rows (the pairs, or the SFT answers), and writes the rows left out."""

    def __init__(self, policies: Problems, quarantine: Path, not_lost: Container[str] = NOT_LOST) -> None:
        """Count under these policies; rows with a problem in ``not_lost`` do not count towards the limit."""
        self._policies, self._not_lost = policies.model_dump(), not_lost
        self._quarantine = quarantine.open("a", encoding="utf-8")
        self.counts: dict[str, ProblemCount] = {}

    def note(self, problem: str, place: str, detail: str, row: dict[str, Any]) -> bool:
        """Record a problem of a row and return whether the row goes on; one that does not goes to the quarantine."""
        policy = self._policies[problem]
        count = self.counts.setdefault(
            problem, ProblemCount(problem=problem, policy=policy, rows=0, places=[], details=[])
        )
        count.rows += 1
        if len(count.places) < SHOWN:
            count.places.append(place)
            count.details.append(detail)
        if policy in GOES_ON:
            return True
        line = {"problem": problem, "detail": detail, "place": place, "row": row}
        self._quarantine.write(json.dumps(line, default=repr) + "\n")
        return False

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self._quarantine.close()

    def lost(self) -> int:
        """Return how many rows are left out that held a preference, or seemed to."""
        return sum(c.rows for c in self.counts.values() if c.policy not in GOES_ON and c.problem not in self._not_lost)

    def check(self, name: str, total: int, max_dropped: float) -> None:
        """Stop the run if a problem is to be an error, or too many rows are left out.

        Raises:
            DataError: with every problem, its count, the first rows and what is wrong with the first.
        """
        errors = [count for count in self.counts.values() if count.policy == "error"]
        if errors:
            rows = sum(count.rows for count in errors)
            self._refuse(f"{name}: {rows} of {total} rows have a problem that data.problems makes an error", errors)
        if total and self.lost() / total > max_dropped:
            lost = [c for c in self.counts.values() if c.policy == "drop"]
            self._refuse(
                f"{name}: {self.lost()} of {total} rows cannot be used, more than data.max_dropped = {max_dropped:g} "
                "allows",
                lost,
            )

    def _refuse(self, headline: str, counts: list[ProblemCount]) -> None:
        lines = [headline, *map(line_of, sorted(counts, key=lambda count: -count.rows))]
        lines.append("mend these rows, raise data.max_dropped, or say under data.problems what happens to them")
        raise DataError("\n".join(lines))


def meaning(problem: str) -> str:
    """Return what a problem is, in words: the documentation of its field in the config."""
    return str(Problems.model_fields[problem].description).partition(";")[0]


def line_of(count: ProblemCount) -> str:
    """Return a problem on one line: its name, count and meaning, the first places, what is wrong in the first."""
    places = ", ".join(count.places[:5]) + (", ..." if count.rows > 5 else "")
    return f"  {count.problem:20} {count.rows:>6}  {meaning(count.problem)} ({places}: {count.details[0]})"
