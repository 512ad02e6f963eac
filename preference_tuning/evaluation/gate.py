"""The verdict: which rules a model passed on held-out pairs, and what follows.

A rule passes on evidence alone: what is missing, or not a number, fails it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel

from preference_tuning.config import EvaluationConfig, GateConfig
from preference_tuning.evaluation import metrics, statistics
from preference_tuning.evaluation.metrics import BASE, CHAMPION, Scores
from preference_tuning.evaluation.statistics import MISSING, Array, Figure

Decision = Literal["promote", "hold", "inconclusive"]
Outcome = Literal["passed", "failed", "undecided", "skipped"]
Kind = Literal["kl", "generation", "judge"]

REPETITION, EMPTY, LENGTH = "generation/rep_4", "generation/empty", "generation/length"
WIN_RATE, CALIBRATED, WIN_RATE_VS_CHAMPION = "judge/win_rate", "judge/calibrated", "judge/win_rate_vs_champion"
NOTHING = "missing or not a number"
SIGNIFICANT = 1 - statistics.CONFIDENCE
TITLES = {
    "rewards/accuracies": "reward accuracy",
    "likelihood/accuracy": "accuracy of the likelihood",
    "likelihood/accuracy_norm": "accuracy of the likelihood a token",
    "nll/chosen": "fall of the loss on chosen answers",
}


class Rule(BaseModel):
    """One rule with what was measured."""

    name: str
    measured: str
    wanted: str
    outcome: Outcome


class Verdict(BaseModel):
    """The decision on a candidate and the rules behind it."""

    decision: Decision
    candidate: str
    rules: list[Rule]

    @property
    def reason(self) -> str:
        """The rule that decided, in a line."""
        by_outcome = {outcome: [r for r in self.rules if r.outcome == outcome] for outcome in ("failed", "undecided")}
        deciding = by_outcome["failed"] or by_outcome["undecided"]
        if not deciding:
            return f"all {sum(rule.outcome == 'passed' for rule in self.rules)} rules passed"
        return f"{deciding[0].name}: {deciding[0].measured}, wanted {deciding[0].wanted}"


@dataclass(frozen=True)
class Champion:
    """The model in use, whose scores on today's pairs are the columns ``champion/...``."""

    version: str
    finetuning_type: str
    unseen: Array
    """Which of the pairs [pairs] it was not trained on; only these count."""


@dataclass(frozen=True)
class Evidence:
    """What is known of a candidate."""

    candidate: str
    parent: str
    """The model it was trained from, on which it has to be better."""
    scores: Scores
    figures: Mapping[str, Mapping[str, Figure]]
    """Of every model; those of answers are ``generation/...``, the judge's are the candidate's ``judge/...``."""
    measured: frozenset[Kind] = frozenset()
    """What the evaluation was to measure beside log-probabilities; the rules about the rest do not apply."""
    champion: Champion | None = None

    def figure(self, model: str, name: str) -> Figure:
        """Return a figure of a model, nan if it is missing."""
        return self.figures.get(model, {}).get(name, MISSING)


def judge(evidence: Evidence, config: EvaluationConfig) -> Verdict:
    """Decide on a candidate from its own figures, against its parent and against the champion."""
    champion = against_champion(evidence, config) if evidence.champion else first_model()
    return verdict(evidence.candidate, [*own_rules(evidence, config), champion])


def verdict(candidate: str, rules: list[Rule]) -> Verdict:
    """Return hold if one rule failed, inconclusive if one is undecided, promote otherwise."""
    outcomes = {rule.outcome for rule in rules}
    decision: Decision = "promote"
    if "failed" in outcomes:
        decision = "hold"
    elif "undecided" in outcomes:
        decision = "inconclusive"
    return Verdict(decision=decision, candidate=candidate, rules=rules)


def own_rules(evidence: Evidence, config: EvaluationConfig) -> list[Rule]:
    """Return the rules on a candidate and its parent."""
    absent = [model for model in (evidence.candidate, evidence.parent) if not _scored(evidence.scores, model)]
    if absent:
        return [_scores_missing(f"scores of {model}") for model in absent]
    gate, metric = config.gate, primary(evidence, config.gate)
    everything = np.ones(len(evidence.scores["prompt"]), bool)
    enough = _enough(evidence, metric, everything, "held-out prompts", gate)
    estimates = [_better_than_parent(evidence, metric, config), *_bounds(evidence, gate)]
    if metric != WIN_RATE and "judge" in evidence.measured:
        estimates.append(_by_judge(evidence, gate.min_win_rate, "skipped"))
    if enough.outcome != "passed":
        estimates = [_too_early(rule) for rule in estimates]
    answers = _bounds_on_answers(evidence, gate) if "generation" in evidence.measured else []
    return [enough, _finite(evidence.scores), *estimates, *answers]


def against_champion(evidence: Evidence, config: EvaluationConfig) -> Rule:
    """Return the rule that a candidate is better than the champion on the pairs that are new to both.

    An equal model does not pass. The metric is the primary one; where the primary is ``auto`` and the two are of
    different kinds, it is the reward accuracy of both against the base model.
    """
    champion = evidence.champion
    assert champion is not None
    if not _scored(evidence.scores, CHAMPION):
        return _scores_missing(f"scores of the champion {champion.version}")
    metric = primary(evidence, config.gate)
    if config.gate.primary == "auto" and champion.finetuning_type != "sft":
        metric = "rewards/accuracies"
    name = f"{TITLES.get(metric, metric)} less that of the champion {champion.version}"
    if metric == WIN_RATE:
        figure = evidence.figure(evidence.candidate, WIN_RATE_VS_CHAMPION)
        return above(f"win rate against the champion {champion.version}", figure, 0.5 + config.gate.champion_margin)
    enough = _enough(evidence, metric, champion.unseen, f"prompts new to the champion {champion.version}", config.gate)
    if enough.outcome != "passed":
        return enough
    scores = metrics.part(evidence.scores, champion.unseen)
    rule = _gained(name, scores, metric, evidence.candidate, CHAMPION, config.gate.champion_margin, config.seed)
    pairs = f"the {int(champion.unseen.sum())} of {len(champion.unseen)} pairs that it was not trained on"
    return rule.model_copy(update={"measured": f"{rule.measured}, on {pairs}"})


def first_model() -> Rule:
    """Return the rule for a model that no champion stands against."""
    return Rule(name="first model", measured="no champion", wanted="the other rules alone decide", outcome="passed")


def primary(evidence: Evidence, gate: GateConfig) -> str:
    """Return the metric that must be better than the parent's."""
    if gate.primary != "auto":
        return gate.primary
    return "nll/chosen" if evidence.parent == BASE else "rewards/accuracies"


def above(name: str, figure: Figure, limit: float) -> Rule:
    """Return the rule that the whole interval of ``figure`` lies above ``limit``."""
    return _rule(name, _told(figure), f"lower end above {limit:g}", figure.low > limit, figure.value > limit)


def below(name: str, figure: Figure, limit: float) -> Rule:
    """Return the rule that the whole interval of ``figure`` lies at or below ``limit``."""
    return _rule(name, _told(figure), f"upper end at most {limit:g}", figure.high <= limit, figure.value <= limit)


def _better_than_parent(evidence: Evidence, metric: str, config: EvaluationConfig) -> Rule:
    candidate, parent, margin = evidence.candidate, evidence.parent, config.gate.margin
    if metric == WIN_RATE:
        return _by_judge(evidence, 0.5 + margin, "undecided")
    if metric == "rewards/accuracies":
        outcomes = metrics.wins(metrics.reward_margins(evidence.scores, candidate, parent))
        figure = statistics.proportion(outcomes, evidence.scores["prompt"])
        return above(f"reward accuracy against {parent}", figure, 0.5 + margin)
    name = f"{TITLES[metric]} against {parent}"
    return _gained(name, evidence.scores, metric, candidate, parent, margin, config.seed)


def _gained(name: str, scores: Scores, metric: str, model: str, other: str, margin: float, seed: int) -> Rule:
    """Return the rule that a model is better than another on the same pairs.

    Of accuracies McNemar's test must agree: where few pairs are judged differently, the bootstrap's interval is too
    narrow.
    """
    gain = metrics.gain(scores, metric, model, other)
    figure = statistics.mean(gain, scores["prompt"], seed)
    rule = above(name, figure, margin)
    if metric == "nll/chosen" or math.isnan(figure.value):
        return rule
    p = statistics.mcnemar(gain, scores["prompt"])
    told = f"{rule.measured}, McNemar's p {p:.3g}"
    passed = rule.outcome == "passed" and p < SIGNIFICANT
    return _rule(name, told, f"{rule.wanted}, p below {SIGNIFICANT:.2g}", passed, figure.value > margin)


def _bounds(evidence: Evidence, gate: GateConfig) -> list[Rule]:
    """Return the rules on how far the log-probabilities may have gone."""
    candidate, parent = evidence.candidate, evidence.parent
    rise = evidence.figure(candidate, "nll/chosen_change")
    rules = [below(f"rise of the loss on chosen answers, against {parent}", rise, gate.max_nll_increase)]
    if "kl" in evidence.measured and parent != BASE:
        divergence = evidence.figure(candidate, "kl/chosen")
        rules.append(below(f"divergence from {parent}, nats a token", divergence, gate.max_kl))
    return rules


def _bounds_on_answers(evidence: Evidence, gate: GateConfig) -> list[Rule]:
    """Return the rules on generated answers: bounds on point values, for there are few answers."""
    rules = []
    for name, what, limit in (
        (REPETITION, "repetition in answers", gate.max_repetition_increase),
        (EMPTY, "share of empty answers", gate.max_empty_increase),
    ):
        ours, theirs = (evidence.figure(model, name).value for model in (evidence.candidate, evidence.parent))
        told = f"{ours:.3f} after {theirs:.3f}" if math.isfinite(ours - theirs) else NOTHING
        rules.append(_rule(what, told, f"a rise of at most {limit:g}", ours - theirs <= limit, False))
    ours, theirs = (evidence.figure(model, LENGTH).value for model in (evidence.candidate, evidence.parent))
    ratio = ours / theirs if theirs else math.nan
    low, high = gate.length_ratio
    told = f"{ratio:.2f}" if math.isfinite(ratio) else NOTHING
    passed = low <= ratio <= high
    return [
        *rules,
        _rule(f"length of answers over that of {evidence.parent}", told, f"{low:g} to {high:g}", passed, False),
    ]


def _by_judge(evidence: Evidence, limit: float, at_chance: Outcome) -> Rule:
    """Return the rule on the win rate; of a judge that does no better than chance on labelled pairs, ``at_chance``."""
    name, calibrated = f"win rate against {evidence.parent}", evidence.figure(evidence.candidate, CALIBRATED).value
    if calibrated == 0:
        wanted = "a judge better than chance"
        return Rule(name=name, measured="by a judge at chance on labelled pairs", wanted=wanted, outcome=at_chance)
    return above(name, evidence.figure(evidence.candidate, WIN_RATE) if calibrated == 1 else MISSING, limit)


def _too_early(rule: Rule) -> Rule:
    """Return an estimate's rule as it stands on too few prompts: not failed, unless nothing was measured."""
    early = rule.outcome == "failed" and rule.measured != NOTHING
    return rule.model_copy(update={"outcome": "undecided"}) if early else rule


def _enough(evidence: Evidence, metric: str, where: Array, name: str, gate: GateConfig) -> Rule:
    """Return the rule that there are prompts enough, which says how many the wanted difference would need."""
    count = statistics.count(evidence.scores["prompt"][where])
    pairs = int(where.sum())
    told = f"{count}, with {pairs} pairs" if count != pairs else str(count)
    wanted = f"at least {gate.min_prompts}"
    if needed := _needed(evidence, metric, gate):
        wanted += f" (a difference of {gate.wanted_difference:g} needs about {needed})"
    return _rule(name, told, wanted, count >= gate.min_prompts, True)


def _needed(evidence: Evidence, metric: str, gate: GateConfig) -> int | None:
    """Return how many prompts the wanted difference needs, or None where the variance is not known."""
    variance = 0.25  # of a share, at most
    if metric not in ("rewards/accuracies", WIN_RATE):
        gain = metrics.gain(evidence.scores, metric, evidence.candidate, evidence.parent)
        variance = float(np.var(gain, ddof=1)) if len(gain) > 1 else math.nan
    return statistics.needed(variance, gate.wanted_difference) if variance > 0 else None


def _finite(scores: Scores) -> Rule:
    wrong = sum(
        int((~np.isfinite(column)).sum()) for name, column in scores.items() if name not in ("prompt", "content")
    )
    return _rule("scores that are not finite", str(wrong), "0", wrong == 0, False)


def _scored(scores: Scores, model: str) -> bool:
    return all(f"{model}/{answer}" in scores for answer in metrics.ANSWERS)


def _scores_missing(name: str) -> Rule:
    return _rule(name, "missing", "one of each answer", False, False)


def _told(figure: Figure) -> str:
    return NOTHING if math.isnan(figure.value) else str(figure)


def _rule(name: str, measured: str, wanted: str, passed: bool, possible: bool) -> Rule:
    outcome: Outcome = "passed" if passed else "undecided" if possible else "failed"
    return Rule(name=name, measured=measured, wanted=wanted, outcome=outcome)
