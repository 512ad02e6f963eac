"""Paired differences between models on the same prompts, and which of them say that a model got worse."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from preference_tuning.evaluation import catalogue
from preference_tuning.evaluation.deciding import Terms
from preference_tuning.evaluation.metrics import CHAMPION, Figures
from preference_tuning.evaluation.statistics import Figure

Better = Literal["higher", "lower", "neither"]
Direction = Literal["better", "worse", "unclear"]
Unit = Literal["share", "nats a token", "tokens"]

ANSWERS = "generation/"


class Compared(NamedTuple):
    """A figure whose difference between two models is measured pair by pair, or prompt by prompt."""

    words: str
    unit: Unit
    better: Better


COMPARED = {
    "rewards/accuracies": Compared("reward accuracy against the base", "share", "higher"),
    "likelihood/accuracy": Compared("accuracy of the likelihood", "share", "higher"),
    "likelihood/accuracy_norm": Compared("accuracy of the likelihood, per token", "share", "higher"),
    "nll/chosen": Compared("loss on chosen answers", "nats a token", "lower"),
    "general/nll": Compared("loss on general text", "nats a token", "lower"),
    "generation/rep_4": Compared("repetition in answers", "share", "lower"),
    "generation/empty": Compared("empty answers", "share", "lower"),
    "generation/unfinished": Compared("unfinished answers", "share", "lower"),
    "generation/template_leak": Compared("answers with marks of the template", "share", "lower"),
    "generation/longest_loop": Compared("longest loop in answers", "tokens", "lower"),
    "generation/length": Compared("length of answers", "tokens", "neither"),
}


@dataclass(frozen=True)
class Difference:
    """A figure of a model less that of another, on the same prompts."""

    model: str
    other: str
    metric: str
    figure: Figure
    p: float | None
    """Of McNemar's test, for accuracies."""

    @property
    def compared(self) -> Compared:
        """What is compared."""
        return COMPARED[self.metric]

    @property
    def direction(self) -> Direction:
        """Better or worse if the whole interval says so."""
        higher, lower = self.figure.low > 0, self.figure.high < 0
        if self.compared.better == "neither" or not (higher or lower):
            return "unclear"
        return "better" if higher == (self.compared.better == "higher") else "worse"

    @property
    def nothing(self) -> bool:
        """Whether the two are equal on every prompt."""
        return self.figure.low == self.figure.value == self.figure.high == 0

    @property
    def rose_in_answers(self) -> bool:
        """Whether more went wrong in the answers, be it by chance."""
        return self.metric.startswith(ANSWERS) and self.compared.better == "lower" and self.figure.value > 0


def between(models: Mapping[str, Figures], references: Mapping[str, str]) -> Iterator[Difference]:
    """Yield the differences that were measured: of each model and its reference, of each and the champion."""
    for model, figures in models.items():
        for other, suffix in ((references.get(model), "change"), (CHAMPION, "vs_champion")):
            for metric in COMPARED:
                if other and (figure := figures.get(f"{metric}_{suffix}")):
                    p = figures.get(f"{metric}_{suffix}_p")
                    yield Difference(model, other, metric, figure, p.value if p else None)


def worse(models: Mapping[str, Figures], terms: Terms) -> list[str]:
    """Return what got worse in the candidate, against its reference and against the champion, a sentence each.

    A figure did if the whole interval of its difference says so. Of answers, which are few, every rise of what can go
    wrong in them is told. What is not a number is told as well.
    """
    own = [difference for difference in between(models, terms.references) if difference.model == terms.candidate]
    told = [
        _sentence(difference, models, catalogue.title(difference.other, terms.reigning))
        for difference in own
        if difference.direction == "worse" or difference.rose_in_answers or math.isnan(difference.figure.value)
    ]
    return [*_below_half(models, terms), *told]


def _sentence(difference: Difference, models: Mapping[str, Figures], other: str) -> str:
    words, unit, _ = difference.compared
    figure, metric = difference.figure, difference.metric
    if math.isnan(figure.value):
        return f"{words}: the difference from {other} is not a number"
    before, after = (models.get(name, {}).get(metric) for name in (difference.other, difference.model))
    went = "rose" if figure.value > 0 else "fell"
    # The reward accuracies of a model are those against its own reference, not the ones that are compared here.
    if before and after and metric != "rewards/accuracies":
        was, became = (catalogue.told(metric, value)[0] for value in (before, after))
        said = f"{words} {went} from {was} ({other}) to {became}: by "
    else:
        said = f"{words} is {'higher' if figure.value > 0 else 'lower'} than that of {other}: by "
    said += catalogue.in_line(metric, figure) + ("" if unit == "share" else f" {unit}")
    if difference.p is not None:
        said += f", McNemar's p {difference.p:.2g}"
    return said + ("" if difference.direction == "worse" else ", which may be chance")


def _below_half(models: Mapping[str, Figures], terms: Terms) -> Iterator[str]:
    """Yield the rates of the candidate whose whole interval lies below 0.5, where another model is as good."""
    figures, parent = models[terms.candidate], terms.references[terms.candidate]
    rates = {"rewards/accuracies": f"reward accuracy against {parent}"}
    if (calibrated := figures.get("judge/calibrated")) and calibrated.value == 1:
        rates["judge/win_rate"] = f"the judge's win rate against {parent}"
        rates["judge/win_rate_vs_champion"] = (
            f"the judge's win rate against {catalogue.title(CHAMPION, terms.reigning)}"
        )
    for name, words in rates.items():
        if (figure := figures.get(name)) and figure.high < 0.5:
            yield f"{words} is {catalogue.in_line(name, figure)}, below the 0.5 of an equal model"
