"""The verdict: which rules a model passed on held-out pairs, and what follows. NaN never passes."""

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel

from preference_tuning.config import EvaluationConfig
from preference_tuning.evaluation.statistics import Figure, Scores

Decision = Literal["promote", "hold", "inconclusive"]


class Rule(BaseModel):
    """One rule with what was measured."""

    name: str
    measured: str
    wanted: str
    outcome: Literal["passed", "failed", "undecided"]


class Verdict(BaseModel):
    """The decision on a candidate and the rules behind it."""

    decision: Decision
    candidate: str
    rules: list[Rule]

    @property
    def reason(self) -> str:
        """The rule that decided, in a line."""
        open_rules = [rule for rule in self.rules if rule.outcome != "passed"]
        if not open_rules:
            return f"all {len(self.rules)} rules passed"
        rule = next((rule for rule in open_rules if rule.outcome == "failed"), open_rules[0])
        return f"{rule.name}: {rule.measured}, wanted {rule.wanted}"


def judge(
    candidate: str, pairs: int, scores: Scores, figures: Mapping[str, Figure], config: EvaluationConfig
) -> Verdict:
    """Decide on a candidate from its own figures against its parent (SFT for DPO, the base model for SFT)."""
    rules = [_enough(pairs, config), _finite(scores)]
    change = figures["nll/chosen_change"]
    if candidate == "dpo":
        rules.append(above("reward accuracy on held-out pairs", figures["rewards/accuracies"], config.min_accuracy))
        rules.append(below("rise of the loss on chosen answers, against SFT", change, config.max_nll_increase))
    else:
        rules.append(below("change of the loss on chosen answers, against the base model", change, 0.0))
    return Verdict(decision=decide(rules), candidate=candidate, rules=rules)


def decide(rules: list[Rule]) -> Decision:
    """Return promote if every rule passed, hold if one failed, inconclusive otherwise."""
    outcomes = {rule.outcome for rule in rules}
    if "failed" in outcomes:
        return "hold"
    return "inconclusive" if "undecided" in outcomes else "promote"


def above(name: str, figure: Figure, limit: float) -> Rule:
    """Return the rule that the whole interval of ``figure`` lies above ``limit``."""
    passed = figure.low > limit
    possible = figure.value > limit
    return _rule(name, str(figure), f"lower end above {limit:g}", passed, possible)


def below(name: str, figure: Figure, limit: float) -> Rule:
    """Return the rule that the whole interval of ``figure`` lies at or below ``limit``."""
    passed = figure.high <= limit
    possible = figure.value <= limit
    return _rule(name, str(figure), f"upper end at most {limit:g}", passed, possible)


def _enough(pairs: int, config: EvaluationConfig) -> Rule:
    return _rule("held-out pairs", str(pairs), f"at least {config.min_pairs}", pairs >= config.min_pairs, True)


def _finite(scores: Scores) -> Rule:
    wrong = sum(int(not math.isfinite(float(value))) for column in scores.values() for value in column)
    return _rule("scores that are not finite", str(wrong), "0", wrong == 0, False)


def _rule(name: str, measured: str, wanted: str, passed: bool, possible: bool) -> Rule:
    outcome: Literal["passed", "failed", "undecided"] = "passed" if passed else "undecided" if possible else "failed"
    return Rule(name=name, measured=measured, wanted=wanted, outcome=outcome)
