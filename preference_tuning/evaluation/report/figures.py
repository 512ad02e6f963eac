"""The figures of all models side by side, and the differences between them."""

from collections.abc import Mapping, Sequence

from preference_tuning import reports
from preference_tuning.evaluation import catalogue, differences
from preference_tuning.evaluation.differences import Difference, Direction, Unit
from preference_tuning.evaluation.job import Evaluation
from preference_tuning.evaluation.statistics import Figure

TONES: dict[Direction, reports.Tone] = {"better": "good", "worse": "bad", "unclear": "unclear"}
PANELS: dict[Unit, str] = {
    "share": "Shares of pairs and of answers", "nats a token": "Losses", "tokens": "Lengths",
}  # fmt: skip


def titles(evaluation: Evaluation) -> list[str]:
    """Return what each model is called."""
    return [catalogue.title(model, evaluation.champion) for model in evaluation.models]


def side_by_side(evaluation: Evaluation) -> reports.Html:
    """Return every figure of every model, under its heading."""
    shown = list(evaluation.models)
    rows: list[Sequence[object]] = []
    for title, group in catalogue.groups(evaluation.models).items():
        rows += [[reports.strong(title), *map(reports.muted, shown)], *_rows(evaluation, group)]
    words = (
        "Each figure with its 95 % interval, on the same held-out pairs; ties count as half. Rewards are those of a "
        f"model against its reference, with beta {evaluation.terms.beta:g} for DPO and 1 for other models."
    )
    return reports.section(
        "Models side by side", reports.paragraph(words), reports.table(["", *shown], rows, numeric=True)
    )


def of_judge(evaluation: Evaluation) -> reports.Html:
    """Return what the judge says, how far it is to be believed, and what it cost."""
    found = evaluation.models[evaluation.terms.candidate]
    rows = [
        [reports.noted(words, name), _cell(name, found[name])]
        for name, words in catalogue.JUDGE.items()
        if name in found
    ]
    said = [reports.paragraph(note) for note in evaluation.notes]
    return reports.section("The judge", *said, reports.table(["", evaluation.terms.candidate], rows, numeric=True))


def paired_differences(evaluation: Evaluation) -> reports.Html:
    """Return the paired differences that were measured, as forest plots; those of models before it folded in."""
    found = list(differences.between(evaluation.models, evaluation.terms.references))
    own = [difference for difference in found if difference.model == evaluation.terms.candidate]
    others = [difference for difference in found if difference.model != evaluation.terms.candidate]
    words = (
        "A model less another on the same prompts, with 95 % intervals; p is that of McNemar's test. Green is better "
        "and red is worse with the whole interval; grey may be chance, or is neither. What is the same on every prompt "
        "is left out."
    )
    folded = [reports.folded("other models", *_forests(others))] if others else []
    return reports.section("Paired differences", reports.paragraph(words), *_forests(own), *folded)


def forests(evaluation: Evaluation) -> dict[str, reports.Html]:
    """Return the forest plots of the candidate's own differences, by what they are of: shares, losses, lengths."""
    own = [
        difference
        for difference in differences.between(evaluation.models, evaluation.terms.references)
        if difference.model == evaluation.terms.candidate and not difference.nothing
    ]
    by_unit = {unit: [d for d in own if d.compared.unit == unit] for unit in PANELS}
    return {PANELS[unit].split()[0].lower(): _forest(some, unit) for unit, some in by_unit.items() if some}


def _forests(found: Sequence[Difference]) -> list[reports.Html]:
    by_unit = {unit: [d for d in found if d.compared.unit == unit and not d.nothing] for unit in PANELS}
    return [_forest(differing, unit) for unit, differing in by_unit.items() if differing]


def _forest(found: Sequence[Difference], unit: Unit) -> reports.Html:
    intervals = [
        reports.Interval(
            f"{d.model} less {d.other}: {d.compared.words}",
            d.figure.low,
            d.figure.value,
            d.figure.high,
            catalogue.in_line(d.metric, d.figure) + ("" if d.p is None else f", p {d.p:.2g}"),
            TONES[d.direction],
        )
        for d in found
    ]
    return reports.forest(PANELS[unit], intervals, unit)


def _rows(evaluation: Evaluation, group: Mapping[str, str]) -> list[Sequence[object]]:
    return [
        [reports.noted(words, name), *(_cell(name, figures.get(name)) for figures in evaluation.models.values())]
        for name, words in group.items()
    ]


def _cell(name: str, figure: Figure | None) -> reports.Html:
    return reports.noted(*catalogue.told(name, figure)) if figure else reports.muted("–")
