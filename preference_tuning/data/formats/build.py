"""What converts the rows of each format, once its columns are known."""

from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

from preference_tuning.config import SourceConfig
from preference_tuning.data.formats.extras import HELD_OUT, NAMES, Extras
from preference_tuning.data.formats.labels import LABELS, Preferred
from preference_tuning.data.formats.messages import is_conversation
from preference_tuning.data.formats.prompt_columns import TEXT_NAMES, find_prompt, without_prompt
from preference_tuning.data.formats.prompts import PromptReader
from preference_tuning.data.formats.rows import LabelledRows, NamedRows, RankedRows, SingleRows
from preference_tuning.data.formats.sample import Sample
from preference_tuning.data.formats.signatures import Match
from preference_tuning.data.formats.split import Pairer
from preference_tuning.data.formats.texts import TEXT_FORMS, TextForm

Rows = NamedRows | LabelledRows | RankedRows | SingleRows


class Built(NamedTuple):
    """What converts rows, the format it is for, and how that was recognised."""

    rows: Rows
    format: str
    sentence: str


Builder = Callable[[Sample, Match, SourceConfig, str], Built]

SCORES = ("overall_score", "score", "rating", "preference_score", "reward")
ANSWERS = ("response", "text", "content", "output", "completion", "answer", "messages")
STATUSES = {"unchanged", "swapped", "tie"}
"""Distilabel's: `swapped` says that chosen and rejected were exchanged already."""


def _pairs(sample: Sample, match: Match, config: SourceConfig, _: str) -> Built:
    chosen, rejected = match.roles["chosen"], match.roles["rejected"]
    form = _text_form(sample, chosen, config.format)
    separated = config.format == "separated"
    prompt = without_prompt(sample) if separated else _prompt(sample, match, (chosen, rejected), form)
    within = prompt.column is None and not is_whole(sample, chosen, rejected) and form is None
    separated = separated or (within and config.format is None and config.separator is not None)
    if separated and config.separator is None:
        raise sample.error("the format separated needs data.separator, the text that ends the prompt")
    if within and not separated:
        raise _no_prompt(sample, chosen, rejected)
    name = "separated" if separated else "pairs" if form is None else form.name
    pairer = Pairer(prompt, _tools(sample), form, config.separator if separated else None)
    extras = _extras(sample, match, scores=True)
    rows = NamedRows(pairer, chosen, rejected, extras, _preferred(sample, "status", STATUSES, {"unchanged", "swapped"}))
    return Built(rows, name, _sentence(sample, pairer, chosen, rejected))


def _labelled(sample: Sample, match: Match, config: SourceConfig, _: str) -> Built:
    first, second, label = match.roles["first"], match.roles["second"], match.roles["label"]
    how = LABELS[match.format]
    pairer = Pairer(_prompt(sample, match, (first, second), None), _tools(sample))
    if pairer.prompt.column is None and not is_whole(sample, first, second):
        raise _no_prompt(sample, first, second)
    preferred = None
    if match.format == "halos" and "type" in sample.columns:
        preferred = Preferred("type", frozenset({"pairwise_feedback"}))
    rows = LabelledRows(pairer, first, second, label, how, _extras(sample, match), preferred)
    sentence = f"{_sentence(sample, pairer, first, second)}; `{label}` says which is better ({how.meaning})"
    return Built(rows, match.format, sentence)


def _completions(sample: Sample, match: Match, config: SourceConfig, pairing: str) -> Built:
    column = match.roles["completions"]
    items = [item for value in sample.values(column) if type(value) is list for item in value if type(item) is dict]
    keys = {key for item in items for key, value in item.items() if value is not None}
    score = config.columns.score or next((name for name in SCORES if name in keys), None)
    answer = next((name for name in ANSWERS if name in keys), None)
    if score not in keys or answer is None:
        field = "score" if answer is not None else "answer"
        wanted = config.columns.score or ", ".join(SCORES if answer is not None else ANSWERS)
        hint = "; set data.columns.score to the field that ranks them" if answer is not None else ""
        listed = ", ".join(map(repr, sorted(keys)[:30])) or "none"
        raise sample.error(
            f"the answers in `{column}` have no {field} field ({wanted}); their fields are {listed}{hint}"
        )
    return _ranked(sample, match, pairing, answer, score)


def _ranked_outputs(sample: Sample, match: Match, config: SourceConfig, pairing: str) -> Built:
    return _ranked(sample, match, pairing, None, None)


def _ranked(sample: Sample, match: Match, pairing: str, answer: str | None, score: str | None) -> Built:
    column = match.roles["completions"]
    prompt = find_prompt(sample, {column}, False, None)
    if prompt.column is None:
        raise _no_prompt(sample, column)
    rows = RankedRows(prompt, column, answer, score, pairing == "all", _tools(sample), _extras(sample, match))
    how = "by their order, the best first" if score is None else f"by `{score}`"
    which = "every better one against every worse one" if rows.every else "the best against the worst"
    return Built(rows, match.format, f"{prompt.described()}; the answers in `{column}` are ranked {how}, {which}")


def _unpaired(sample: Sample, match: Match, config: SourceConfig, _: str) -> Built:
    answer, label = match.roles["completion"], match.roles["label"]
    whole = is_whole(sample, answer)
    prompt = without_prompt(sample) if whole else find_prompt(sample, set(match.roles.values()), False, None)
    if prompt.column is None and not whole:
        raise _no_prompt(sample, answer)
    rows = SingleRows(prompt, answer, _tools(sample), label, _extras(sample, match))
    where = f"the last turn of `{answer}`" if whole else f"`{answer}`"
    return Built(rows, "unpaired", f"{prompt.described()}; {where} is a good or a bad answer, as `{label}` says")


BUILDERS: dict[str, Builder] = {
    "pairs": _pairs,
    **dict.fromkeys(LABELS, _labelled),
    "completions": _completions,
    "ranked_outputs": _ranked_outputs,
    "unpaired": _unpaired,
}


def is_whole(sample: Sample, *columns: str) -> bool:
    """Say whether columns hold whole conversations, not answers alone."""
    return all(sample.mostly(column, is_conversation) for column in columns)


def _prompt(sample: Sample, match: Match, answers: tuple[str, str], form: TextForm | None) -> PromptReader:
    whole = is_whole(sample, *answers)
    prompt = find_prompt(sample, set(match.roles.values()), whole or form is not None, form)
    if whole and "history" in sample.mapped:
        raise sample.error(f"data.columns.history has no effect: `{answers[0]}` holds the turns before the answer")
    return prompt


def _text_form(sample: Sample, chosen: str, forced: str | None) -> TextForm | None:
    if forced is not None:
        return TEXT_FORMS.get(forced)
    prompts = (sample.mapped["prompt"],) if "prompt" in sample.mapped else TEXT_NAMES
    columns = (chosen, *prompts)
    for form in TEXT_FORMS.values():
        if any(sample.mostly(column, form.holds) for column in columns):
            return form
    return None


def _tools(sample: Sample) -> str | None:
    return sample.find("tools", ("tools",))


def _preferred(sample: Sample, column: str, known: set[str], good: set[str]) -> Preferred | None:
    values = sample.values(column)
    applies = bool(values) and all(type(value) is str and value in known for value in values)
    return Preferred(column, frozenset(good)) if applies else None


def _extras(sample: Sample, match: Match, scores: bool = False) -> Extras:
    taken = {*match.roles.values(), *(c for role, c in sample.mapped.items() if role not in NAMES)}
    names = NAMES if scores else {role: found for role, found in NAMES.items() if not role.endswith("_score")}
    found = {role: sample.find(role, candidates, taken) for role, candidates in names.items()}
    split = found["split"]
    sides = [value.strip().lower() if type(value) is str else None for value in sample.values(split)]
    if set(sides) - set(HELD_OUT) and "split" in sample.mapped:
        raise sample.error(f"`{split}` (data.columns.split) holds other values than {', '.join(HELD_OUT)}")
    if len(sides) < len(sample.rows) or set(sides) - set(HELD_OUT):
        found["split"] = found["split"] if "split" in sample.mapped else None
    return Extras(**{field.name: found.get(field.name) for field in fields(Extras)})


def _no_prompt(sample: Sample, *answers: str) -> Exception:
    names = " and ".join(f"`{name}`" for name in answers)
    if len(answers) == 2 and all(sample.mostly(name, lambda value: type(value) is str) for name in answers):
        return sample.error(
            f"{names} are texts and there is no prompt beside them; set data.columns.prompt to the column that "
            "holds it or, if both texts begin with the prompt, data.format: separated with data.separator, the text "
            f"that ends the prompt; {sample.listed()}"
        )
    return sample.error(f"there is no prompt beside {names}; set data.columns.prompt; {sample.listed()}")


def _sentence(sample: Sample, pairer: Pairer, first: str, second: str) -> str:
    answers, prompt = f"`{first}` and `{second}`", pairer.prompt
    if pairer.separator is not None:
        return f"{answers} both begin with the prompt, which ends with {pairer.separator!r}"
    form = f" written as {pairer.form.name}" if pairer.form is not None else ""
    if prompt.column is None or is_whole(sample, first, second):
        checked = f" (checked against `{prompt.column}`)" if prompt.column is not None else ""
        return f"{answers} are conversations{form}; the prompt is what they share{checked}"
    return f"{prompt.described()}{form}; {answers} are the answers"
