"""Which columns the prompt of a source is made of."""

from collections.abc import Collection
from typing import Any

from preference_tuning.data.formats.messages import is_turn, role_of
from preference_tuning.data.formats.prompts import PromptReader
from preference_tuning.data.formats.sample import Sample
from preference_tuning.data.formats.texts import TextForm
from preference_tuning.data.formats.values import is_blank

TEXT_NAMES = ("prompt", "question", "instruction", "input", "query", "history")
TURN_NAMES = ("messages", "conversations", "conversation")


def find_prompt(sample: Sample, taken: Collection[str], conversations: bool, form: TextForm | None) -> PromptReader:
    """Return a reader of the prompt; without a column if none holds one.

    Args:
        sample: the rows.
        taken: columns that hold something else.
        conversations: whether the answers are whole conversations, which need no prompt of their own.
        form: how a conversation is written in a text.

    Raises:
        DataError: several columns could be the prompt, and they differ.
    """
    column = sample.mapped.get("prompt") or _only(sample, _candidates(sample, taken, conversations))
    system = sample.find("system", ("system",), taken)
    if column is None:
        return PromptReader(None, system=system)
    return PromptReader(
        column,
        context=sample.find("context", ("input",) if column == "instruction" else (), {*taken, column}),
        system=system,
        history=_history(sample, {*taken, column}),
        form=form,
    )


def without_prompt(sample: Sample) -> PromptReader:
    """Return a reader for rows whose prompt is inside of a conversation, whatever columns there are beside it."""
    return PromptReader(None, system=sample.find("system", ("system",)))


def _history(sample: Sample, taken: Collection[str]) -> str | None:
    column = sample.find("history", ("history",), taken)
    return column if column is None or "history" in sample.mapped or not _is_text(sample, column) else None


def _candidates(sample: Sample, taken: Collection[str], conversations: bool) -> list[str]:
    names = [name for name in TEXT_NAMES + TURN_NAMES if sample.free(name, "prompt") and name not in taken]
    if "instruction" in names and "input" in names:
        # `input` is the prompt where it stands alone; here it is what the instruction is about.
        names = ["instruction", *(name for name in names if name not in ("instruction", "input"))]
    tests = {"history": lambda name: _is_text(sample, name)} | dict.fromkeys(
        TURN_NAMES, lambda name: _turns(sample, name)
    )
    names = [name for name in names if name not in tests or tests[name](name)]
    asking = [name for name in names if name not in TURN_NAMES or not _ends_with_answer(sample, name)]
    # A conversation that ends with an answer is a copy of one of the two, not the prompt.
    names = asking if asking or conversations else names
    said = [name for name in names if any(_asked(value) is not None for value in sample.values(name))]
    return said or names[:1]


def _only(sample: Sample, candidates: list[str]) -> str | None:
    if not candidates:
        return None
    first, *others = candidates
    differing = [other for other in others if not _agree(sample, first, other)]
    if differing:
        listed = " and ".join(f"`{name}`" for name in [first, *differing])
        raise sample.error(f"{listed} could all be the prompt, and they differ; set data.columns.prompt to one of them")
    return first


def _agree(sample: Sample, one: str, other: str) -> bool:
    pairs = [(_asked(row.get(one)), _asked(row.get(other))) for row in sample.rows]
    return all(a == b for a, b in pairs if a is not None and b is not None)


def _asked(value: Any) -> Any:
    # A text and a list of the one turn that holds it are the same question.
    if type(value) is list and len(value) == 1 and is_turn(value[0]):
        value = next((value[0][key] for key in ("content", "value", "text") if key in value[0]), None)
    if type(value) is str:
        return None if is_blank(value) else value.strip()
    return value


def _is_text(sample: Sample, column: str) -> bool:
    return sample.mostly(column, lambda value: type(value) is str)


def _turns(sample: Sample, column: str) -> bool:
    return sample.mostly(column, lambda value: type(value) is list and bool(value) and is_turn(value[0]))


def _ends_with_answer(sample: Sample, column: str) -> bool:
    return sample.mostly(
        column, lambda value: type(value) is list and bool(value) and role_of(value[-1]) == "assistant"
    )
