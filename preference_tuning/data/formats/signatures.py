"""Which formats the columns of a source fit, by their whole set of names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preference_tuning.data.formats.labels import LABELS
from preference_tuning.data.formats.sample import Sample
from preference_tuning.data.formats.values import TRUTHS

Roles = dict[str, str]

NAMED_ANSWERS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("chosen_messages", "rejected_messages"),
    ("better", "worse"),
    ("response_j", "response_k"),
)
SINGLE_ANSWERS = ("completion", "response", "output", "answer", "messages", "conversations", "conversation")
TRUTH_LABELS = ("label", "kto_tag")
TEXT_PAIRS = ("pairs", "transcripts", "chatml", "separated")
"""Formats with the same columns, told apart by what the texts look like."""

SIGNATURES: dict[str, list[Roles]] = {
    "pairs": [{"chosen": chosen, "rejected": rejected} for chosen, rejected in NAMED_ANSWERS],
    **{name: [{"first": how.first, "second": how.second, "label": how.column}] for name, how in LABELS.items()},
    "completions": [{"completions": "completions"}],
    "ranked_outputs": [{"completions": name} for name in ("output", "outputs", "completions")],
    "unpaired": [{"completion": answer, "label": label} for answer in SINGLE_ANSWERS for label in TRUTH_LABELS],
}
"""For each format its columns, in the order of preference."""

SHARED_ROLES = {"prompt", "context", "system", "history", "tools", "margin", "group", "source", "topic", "split"}
OWN_ROLES = {
    "pairs": {"chosen", "rejected", "chosen_score", "rejected_score"},
    **{name: {"first", "second", "label"} for name in LABELS},
    "completions": {"completions", "score"},
    "ranked_outputs": {"completions"},
    "unpaired": {"completion", "label"},
}


@dataclass(frozen=True, slots=True)
class Match:
    """A format and the columns that fit it."""

    format: str
    roles: Roles

    def described(self) -> str:
        """Return the format and its columns, for a message."""
        return f"{self.format} ({', '.join(f'`{column}`' for column in self.roles.values())})"


def unused_roles(sample: Sample, family: str) -> list[str]:
    """Return the roles the config gives to columns and a format has no use for."""
    return [role for role in sample.mapped if role not in SHARED_ROLES | OWN_ROLES[family]]


def matches(sample: Sample, forced: str | None = None) -> list[Match]:
    """Return the formats whose columns are all there, each once or in the ways that it cannot be told how.

    Args:
        sample: the rows.
        forced: the only format to look for; its columns count whatever their values look like.
    """
    found: list[Match] = []
    for family, variants in SIGNATURES.items():
        if forced == family or (forced is None and not unused_roles(sample, family)):
            found += _best(sample, family, variants, forced is not None)
    return found


def _best(sample: Sample, family: str, variants: Sequence[Roles], forced: bool) -> list[Match]:
    scored: list[tuple[int, Match]] = []
    for variant in variants:
        roles = {role: sample.mapped.get(role) or name for role, name in variant.items()}
        mapped = [role for role in variant if role in sample.mapped]
        there = all(role in mapped or sample.free(column, role) for role, column in roles.items())
        if there and len(set(roles.values())) == len(roles) and (forced or _fits(sample, family, roles, variant)):
            named = sum(roles[role] == name for role, name in variant.items())
            scored.append((named, Match(family, roles)))
    highest = max((named for named, _ in scored), default=0)
    best = [match for named, match in scored if named == highest]
    distinct = [match for place, match in enumerate(best) if match not in best[:place]]
    return distinct[:1] if _all_the_same(sample, distinct) or family == "unpaired" else distinct


def _fits(sample: Sample, family: str, roles: Roles, variant: Roles) -> bool:
    if family in LABELS:
        # Which answer a label means depends on the format, so other names for the answers do not do.
        return roles["first"] == variant["first"] and roles["second"] == variant["second"]
    if family == "completions":
        return sample.mostly(roles["completions"], _is_list_of_objects)
    if family == "ranked_outputs":
        # An order is a ranking in this format alone; a list of answers elsewhere need not be in any order.
        named = roles["completions"] in ("output", "outputs")
        return named and sample.mostly(roles["completions"], _is_list_of_texts)
    return family != "unpaired" or sample.mostly(roles["label"], _is_truth)


def _all_the_same(sample: Sample, found: list[Match]) -> bool:
    return all(
        row.get(match.roles[role]) == row.get(found[0].roles[role])
        for match in found[1:]
        for role in match.roles
        for row in sample.rows
    )


def _is_list_of_objects(value: Any) -> bool:
    return type(value) is list and bool(value) and all(type(item) is dict for item in value)


def _is_list_of_texts(value: Any) -> bool:
    return type(value) is list and bool(value) and all(type(item) is str for item in value)


def _is_truth(value: Any) -> bool:
    if type(value) is str:
        return value.strip().lower() in TRUTHS
    return type(value) in (bool, int, float) and value in (0, 1)
