"""Recognition of SFT data: one answer to a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preference_tuning.config import Columns, SFTSourceConfig
from preference_tuning.data.formats.prompt_columns import TEXT_NAMES, TURN_NAMES, find_prompt, without_prompt
from preference_tuning.data.formats.rows import SingleRows
from preference_tuning.data.formats.sample import Sample, decoded_row
from preference_tuning.data.formats.signatures import matches
from preference_tuning.data.pair import FlawError, Messages
from preference_tuning.errors import DataError

ANSWERS = {
    "messages": TURN_NAMES,
    "instruction": ("output", "response"),
    "completion": ("completion", "response", "answer"),
}
PROMPTS: dict[str, tuple[str, ...]] = {
    "messages": (),
    "instruction": ("instruction",),
    "completion": ("prompt", "question"),
}
"""A column that has to be there as well."""


@dataclass(frozen=True, slots=True)
class RecognisedSFT:
    """A format of SFT data that was recognised, and how its rows are converted."""

    format: str
    description: str
    """One sentence for the report."""
    rows: SingleRows
    encoded: tuple[str, ...] = ()
    """Columns that hold conversations as JSON in a text."""

    def convert(self, values: dict[str, Any]) -> tuple[Messages, Messages, list[Any] | None]:
        """Return the prompt, the answer and the tools of a row.

        Raises:
            FlawError: the row cannot be used.
        """
        try:
            return self.rows.single(decoded_row(values, self.encoded) if self.encoded else values)
        except RecursionError:
            raise FlawError("not_text", "the row is nested too deeply") from None


def recognise_sft(config: SFTSourceConfig, name: str, sample: Sequence[dict[str, Any]]) -> RecognisedSFT:
    """Recognise the format of SFT data.

    Args:
        config: the source; a format that it names is not looked for any more.
        name: how messages call the source.
        sample: the values of its first rows, at least one.

    Raises:
        DataError: nothing is recognised, more than one thing, or preference data.
    """
    try:
        return _recognise(config, Sample(name, sample, Columns()))
    except RecursionError:
        raise DataError(f"{name}: the first rows are nested too deeply to be SFT data") from None


def _recognise(config: SFTSourceConfig, table: Sample) -> RecognisedSFT:
    preferences = matches(table)
    if preferences:
        raise table.error(
            f"this is preference data, {preferences[0].described()}, not SFT data; it can be data.source, on whose "
            "chosen answers SFT trains when there is no data.sft_source"
        )
    found = _formats(table) if config.format is None else [config.format]
    if not found:
        raise table.error(
            f"not recognised as SFT data; {table.listed()}; known are `messages` or `conversations`, `instruction` "
            "with `output` or `response`, and `prompt` or `question` with `completion`, `response` or `answer`"
            + table.did_you_mean({name for names in [*ANSWERS.values(), *PROMPTS.values()] for name in names})
        )
    if len(found) > 1:
        raise table.error(f"this can be read as {' or '.join(found)}; set data.sft_source.format to the right one")
    return _built(table, found[0])


def _formats(table: Sample) -> list[str]:
    return [form for form in ANSWERS if _answers(table, form) and (not PROMPTS[form] or _present(table, PROMPTS[form]))]


def _present(table: Sample, names: Sequence[str]) -> list[str]:
    return [name for name in names if name in table.columns]


def _answers(table: Sample, form: str) -> list[str]:
    names = _present(table, ANSWERS[form])
    return [name for name in names if form != "messages" or table.mostly(name, lambda value: type(value) is list)]


def _built(table: Sample, form: str) -> RecognisedSFT:
    answers, prompts = _present(table, ANSWERS[form]), _present(table, PROMPTS[form])
    if not answers or (PROMPTS[form] and not prompts):
        parts = (PROMPTS[form], ANSWERS[form])
        needed = " and ".join(" or ".join(f"`{name}`" for name in names) for names in parts if names)
        raise table.error(f"the format {form} needs {needed}; {table.listed()}")
    _check_equal(table, answers, "answer")
    _check_equal(table, prompts, "prompt")
    prompt, sentence = without_prompt(table), f"the last turn of `{answers[0]}` is the answer to the turns before it"
    if form != "messages":
        beside = {"history", "input"} if form == "instruction" else {"history"}
        taken = {*answers, *TEXT_NAMES, *TURN_NAMES} - {*PROMPTS[form], *beside}
        prompt = find_prompt(table, taken, False, None)
        sentence = f"{prompt.described()}; the answer is `{answers[0]}`"
    rows = SingleRows(prompt, answers[0], tools=table.find("tools", ("tools",)))
    return RecognisedSFT(form, f"{form}: {sentence}", rows, table.encoded)


def _check_equal(table: Sample, names: list[str], what: str) -> None:
    if any(row.get(names[0]) != row.get(other) for row in table.rows for other in names[1:]):
        listed = " and ".join(f"`{name}`" for name in names)
        raise table.error(f"{listed} could all be the {what}, and they differ; leave only one of them in the data")
