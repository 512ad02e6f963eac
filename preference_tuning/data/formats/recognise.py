"""Recognition: from the config and the first rows of a source to what converts all of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from preference_tuning.config import SourceConfig
from preference_tuning.data.formats import extras as extra_columns
from preference_tuning.data.formats.build import BUILDERS, Rows
from preference_tuning.data.formats.labels import LABELS
from preference_tuning.data.formats.prompt_columns import TEXT_NAMES, TURN_NAMES
from preference_tuning.data.formats.sample import Sample, decoded_row
from preference_tuning.data.formats.signatures import (
    SIGNATURES,
    SINGLE_ANSWERS,
    TEXT_PAIRS,
    Match,
    matches,
    unused_roles,
)
from preference_tuning.data.pair import FlawError, Pair, Unpaired
from preference_tuning.errors import DataError

BESIDE = ("system", "tools", "status", "type", *(name for names in extra_columns.NAMES.values() for name in names))
"""Columns that add to a pair."""
KNOWN_NAMES = {
    *TEXT_NAMES,
    *TURN_NAMES,
    *(name for variants in SIGNATURES.values() for variant in variants for name in variant.values()),
}


def matters(columns: Iterable[str]) -> bool:
    """Say whether one of these columns could decide how rows are read."""
    return any(column in KNOWN_NAMES or column in BESIDE for column in columns)


@dataclass(frozen=True, slots=True)
class Recognised:
    """A format that was recognised, and how its rows are converted."""

    format: str
    description: str
    """One sentence for the report."""
    rows: Rows
    encoded: tuple[str, ...] = ()
    """Columns that hold conversations as JSON in a text."""

    def convert(self, values: dict[str, Any]) -> list[Pair] | list[Unpaired]:
        """Return the pairs of a row, or its labelled answer.

        Raises:
            FlawError: the row cannot be used.
        """
        try:
            return self.rows(decoded_row(values, self.encoded) if self.encoded else values)
        except RecursionError:
            raise FlawError("not_text", "the row is nested too deeply") from None


def recognise(
    config: SourceConfig, pairing: Literal["best_worst", "all"], name: str, sample: Sequence[dict[str, Any]]
) -> Recognised:
    """Recognise the format of a source.

    Args:
        config: the source; what it says about format and columns always wins.
        pairing: which pairs several ranked answers make.
        name: how messages call the source.
        sample: the values of its first rows, at least one.

    Raises:
        DataError: nothing is recognised, or more than one thing.
    """
    try:
        table = Sample(name, sample, config.columns)
        match = _match(table, config.format)
        rows, found, sentence = BUILDERS[match.format](table, match, config, pairing)
    except RecursionError:
        raise DataError(f"{name}: the first rows are nested too deeply to be preference data") from None
    if config.separator is not None and found != "separated":
        raise table.error(
            f"data.separator has no effect on the format {found}; remove it, or set data.format: separated"
        )
    columns = ", ".join(_extras_used(rows))
    return Recognised(found, f"{found}: {sentence}{f'; also {columns}' if columns else ''}", rows, table.encoded)


def _match(table: Sample, forced: str | None) -> Match:
    family = "pairs" if forced in TEXT_PAIRS else forced
    unused = [] if family is None else unused_roles(table, family)
    if unused:
        fields_ = ", ".join(f"data.columns.{role}" for role in unused)
        raise table.error(f"the format {forced} has no use for {fields_}; remove it, or change data.format")
    found = matches(table, family)
    if len(found) > 1 and found[0].format == "pairs":
        # A label beside two named answers and the turns before them does not make those turns an answer.
        found = [match for match in found if match.roles.get("completion") not in TURN_NAMES]
    if len(found) == 1:
        return found[0]
    if found:
        candidates = " or ".join(match.described() for match in found)
        decides = "data.format, or data.columns" if len({match.format for match in found}) > 1 else "data.columns"
        raise table.error(f"the columns can be read as {candidates}; {decides} with the right ones, decides")
    raise _nothing_found(table, forced, family)


def _nothing_found(table: Sample, forced: str | None, family: str | None) -> DataError:
    if family is not None:
        needed = " or ".join(" + ".join(f"`{c}`" for c in variant.values()) for variant in SIGNATURES[family])
        roles = ", ".join(f"data.columns.{role}" for role in SIGNATURES[family][0])
        return table.error(f"the format {forced} needs the columns {needed}, or {roles}; {table.listed()}")
    for test, message in _EXPLANATIONS:
        if test(table):
            return table.error(f"{message}; {table.listed()}")
    return table.error(
        f"not recognised as preference data; {table.listed()}; known are `chosen` and `rejected` (also as "
        "better/worse, response_j/response_k, chosen_response/rejected_response), two answers with a label, a list of "
        "scored `completions`, and `completion` with `label`; say which columns they are with data.columns"
        + table.did_you_mean(KNOWN_NAMES)
    )


def _maps_two_answers(table: Sample) -> bool:
    return bool({"first", "second", "label"} & set(table.mapped))


def _maps_completions(table: Sample) -> bool:
    return "completions" in table.mapped


def _maps_one_side(table: Sample) -> bool:
    return len({"chosen", "rejected"} & set(table.mapped)) == 1


def _looks_like_sft(table: Sample) -> bool:
    names = set(table.columns)
    asked, answered = names & {*TEXT_NAMES}, names & set(SINGLE_ANSWERS[:4])
    answers_alone = any(table.mostly(column, lambda value: type(value) in (str, list, dict)) for column in answered)
    return bool((asked and answers_alone) or names & set(TURN_NAMES))


_EXPLANATIONS: list[tuple[Callable[[Sample], bool], str]] = [
    (
        _maps_two_answers,
        "data.columns.first, second and label do not say how the label is read; set data.format to "
        + "; ".join(f"{name} ({how.meaning})" for name, how in LABELS.items()),
    ),
    (
        _maps_completions,
        "data.columns.completions is no list of objects with a score; if it is a list of answers with the best one "
        "first, set data.format: ranked_outputs",
    ),
    (_maps_one_side, "data.columns.chosen and rejected go together, and only one of them is set"),
    (_looks_like_sft, "this is SFT data: there is no rejected answer; it can be data.sft_source"),
]


def _extras_used(rows: Any) -> list[str]:
    extras: extra_columns.Extras = rows.extras
    pairs = [(field.name, getattr(extras, field.name)) for field in fields(extras)]
    return [f"{name.replace('_', ' ')} `{column}`" for name, column in pairs if column is not None]
