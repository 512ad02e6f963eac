"""The gate: each rule, what is missing, and how often it errs on scores whose truth is known."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from preference_tuning.config import EvaluationConfig, GateConfig
from preference_tuning.evaluation import gate, metrics, statistics
from preference_tuning.evaluation.gate import Champion, Evidence, Kind, Verdict
from preference_tuning.evaluation.metrics import BASE
from preference_tuning.evaluation.statistics import Array, Figure

REFERENCES = {"sft": "base", "dpo": "sft", "champion": "base"}
LENGTH = 10.0


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here is about the last digits of an interval."""
    monkeypatch.setattr(statistics, "RESAMPLES", 300)


def config(**rules: Any) -> EvaluationConfig:
    return EvaluationConfig(gate=GateConfig(**rules))


def table(pairs: int, pairs_each: int = 1, **margins: Array) -> dict[str, Any]:
    """Return scores of models whose log-probability of the rejected answers is the base's less their margin."""
    rng = np.random.default_rng(0)
    base = {"base/chosen": rng.normal(-20, 3, pairs), "base/rejected": rng.normal(-20, 3, pairs)}
    scores = {f"{answer}_tokens": np.full(pairs, LENGTH) for answer in metrics.ANSWERS} | base
    for model, margin in margins.items():
        scores |= {f"{model}/chosen": base["base/chosen"], f"{model}/rejected": base["base/rejected"] - margin}
    return {"prompt": np.repeat(np.arange(pairs // pairs_each), pairs_each).astype(str), **scores}


def won(pairs: int, count: int) -> Array:
    """Return margins of which so many are positive."""
    return np.where(np.arange(pairs) < count, 1.0, -1.0)


def good(pairs: int = 200) -> dict[str, Any]:
    """Scores of a DPO model that wins 80 % of the pairs against an SFT model that does as the base."""
    return table(pairs, sft=np.zeros(pairs), dpo=won(pairs, pairs * 8 // 10))


def evidence_of(scores: dict[str, Any], measured: frozenset[Kind] = frozenset(), **changes: Any) -> Evidence:
    """Return evidence on a DPO model: its figures from the scores, beside those of harmless answers and a fair judge."""
    figures = metrics.figures(scores, {m: r for m, r in REFERENCES.items() if r in metrics.models(scores)}, 0.5, 0)
    for model in figures:
        for name, value in ((gate.REPETITION, 0.1), (gate.EMPTY, 0.0), (gate.LENGTH, 50.0), (gate.CALIBRATED, 1.0)):
            figures[model][name] = Figure.exact(value)
        figures[model][gate.WIN_RATE] = Figure(value=0.6, low=0.55, high=0.65)
        figures[model].setdefault("kl/chosen", Figure(value=0.1, low=0.05, high=0.15))
    for name, figure in changes.pop("dpo", {}).items():
        figures["dpo"] = {**figures["dpo"], name: figure}
    for name in changes.pop("without", ()):
        figures["dpo"].pop(name)
    return Evidence(**{"candidate": "dpo", "parent": "sft", "scores": scores, "figures": figures, "measured": measured, **changes})  # fmt: skip


ALL: frozenset[Kind] = frozenset({"kl", "generation", "judge"})


def decided(verdict: Verdict) -> tuple[str, str]:
    return verdict.decision, verdict.reason


def test_a_better_model_is_promoted_and_the_first_model_has_a_rule() -> None:
    verdict = gate.judge(evidence_of(good(), ALL), config())
    assert decided(verdict) == ("promote", f"all {len(verdict.rules)} rules passed")
    assert verdict.rules[-1].name == "first model"
    names = " ".join(rule.name for rule in verdict.rules)
    for part in (
        "held-out",
        "finite",
        "reward accuracy",
        "loss",
        "divergence",
        "repetition",
        "empty",
        "length",
        "win rate",
    ):
        assert part in names


def figure(low: float, value: float, high: float) -> Figure:
    return Figure(low=low, value=value, high=high)


@pytest.mark.parametrize(
    ("dpo", "decision", "deciding"),
    [
        ({"nll/chosen_change": figure(0.1, 0.15, 0.3)}, "inconclusive", "rise of the loss"),
        ({"nll/chosen_change": figure(0.2, 0.3, 0.4)}, "hold", "rise of the loss"),
        ({"nll/chosen_change": Figure.exact(math.nan)}, "hold", "rise of the loss"),
        ({"kl/chosen": figure(0.6, 0.7, 0.8)}, "hold", "divergence"),
        ({"kl/chosen": figure(0.3, 0.4, 0.6)}, "inconclusive", "divergence"),
        ({gate.REPETITION: Figure.exact(0.2)}, "hold", "repetition"),
        ({gate.EMPTY: Figure.exact(0.125)}, "hold", "share of empty"),
        ({gate.EMPTY: Figure.exact(math.nan)}, "hold", "share of empty"),
        ({gate.LENGTH: Figure.exact(20)}, "hold", "length of answers over that of sft: 0.40"),
        ({gate.LENGTH: Figure.exact(120)}, "hold", "length of answers over that of sft: 2.40"),
        ({gate.WIN_RATE: figure(0.2, 0.3, 0.39)}, "hold", "win rate"),
        ({gate.WIN_RATE: figure(0.38, 0.5, 0.62)}, "inconclusive", "win rate"),
        # A judge at chance disables its rule.
        ({gate.WIN_RATE: figure(0.2, 0.3, 0.39), gate.CALIBRATED: Figure.exact(0)}, "promote", "all"),
    ],
)  # fmt: skip
def test_what_got_worse_holds(dpo: dict[str, Figure], decision: str, deciding: str) -> None:
    verdict = gate.judge(evidence_of(good(), ALL, dpo=dpo), config())
    assert verdict.decision == decision
    assert verdict.reason.startswith(deciding)


@pytest.mark.parametrize(
    "name", ["nll/chosen_change", "kl/chosen", gate.REPETITION, gate.EMPTY, gate.LENGTH, gate.WIN_RATE, gate.CALIBRATED]
)
def test_a_missing_figure_refuses(name: str) -> None:
    verdict = gate.judge(evidence_of(good(), ALL, without=[name]), config())
    assert verdict.decision == "hold"
    assert "missing or not a number" in verdict.reason


def test_missing_scores_refuse() -> None:
    scores = good()
    of_parent = {name: column for name, column in scores.items() if not name.startswith("sft/")}
    verdict = gate.judge(Evidence("dpo", "sft", of_parent, {}), config())
    assert decided(verdict) == ("hold", "scores of sft: missing, wanted one of each answer")
    champion = Champion("v1", "dpo", np.ones(200, bool))
    verdict = gate.judge(evidence_of(scores, champion=champion), config())
    assert decided(verdict) == ("hold", "scores of the champion v1: missing, wanted one of each answer")


def test_scores_that_are_not_finite_hold() -> None:
    scores = good()
    scores["dpo/chosen"] = scores["dpo/chosen"].copy()
    scores["dpo/chosen"][:2] = np.nan, -np.inf
    verdict = gate.judge(evidence_of(scores), config())
    assert decided(verdict) == ("hold", "scores that are not finite: 2, wanted 0")


def test_too_few_prompts_decide_nothing() -> None:
    """Neither for a good model nor against a bad one; several pairs a prompt are no more prompts."""
    for margins in (won(60, 60), won(60, 0)):
        scores = table(60, 3, sft=np.zeros(60), dpo=margins)
        verdict = gate.judge(evidence_of(scores), config())
        assert verdict.decision == "inconclusive"
        assert verdict.reason == (
            "held-out prompts: 20, with 60 pairs, wanted at least 30 (a difference of 0.1 needs about 197)"
        )
    scores["dpo/chosen"] = np.full(60, np.nan)
    assert gate.judge(evidence_of(scores), config()).decision == "hold", "broken scores are no matter of their number"


@pytest.mark.parametrize(("pairs", "wins", "decision"), [(200, 160, "promote"), (200, 108, "inconclusive"), (200, 90, "hold")])  # fmt: skip
def test_the_primary_rule_of_dpo(pairs: int, wins: int, decision: str) -> None:
    assert (
        gate.judge(evidence_of(table(pairs, sft=np.zeros(pairs), dpo=won(pairs, wins))), config()).decision == decision
    )


def test_sft_has_to_lower_the_loss_of_the_base() -> None:
    scores = table(50, sft=np.zeros(50))
    fall = np.random.default_rng(1).normal(2, 1, 50)
    for sign, decision in ((1, "promote"), (-1, "hold")):
        tuned = {**scores, "sft/chosen": scores["base/chosen"] + sign * fall}
        verdict = gate.judge(evidence_of(tuned, candidate="sft", parent=BASE), config(max_nll_increase=9))
        assert verdict.decision == decision
        assert ("fall of the loss on chosen answers against base" in verdict.reason) == (decision == "hold")


@pytest.mark.parametrize("metric", ["likelihood/accuracy", "likelihood/accuracy_norm"])
def test_accuracies_are_compared_pair_by_pair(metric: str) -> None:
    """SFT finds 100 of 200 chosen answers likelier, DPO these and some more."""
    for more, decision in ((30, "promote"), (5, "inconclusive"), (0, "hold")):
        scores = table(200)
        for model, right in (("sft", 100), ("dpo", 100 + more)):
            scores |= {f"{model}/chosen": np.full(200, -20.0), f"{model}/rejected": -20.0 - won(200, right)}
        verdict = gate.judge(evidence_of(scores), config(primary=metric))
        assert verdict.decision == decision, more
    # Four pairs in favour and none against: the bootstrap alone would be sure, p is 0.125.
    scores["dpo/rejected"] = -20.0 - won(200, 104)
    gained = metrics.gain(scores, metric, "dpo", "sft")
    assert statistics.mean(gained, scores["prompt"], seed=42).low > 0
    assert gate.judge(evidence_of(scores), config(primary=metric)).decision == "inconclusive"


def test_the_judge_as_the_primary_metric() -> None:
    rules = config(primary="judge/win_rate")
    assert gate.judge(evidence_of(good(), ALL), rules).decision == "promote"
    at_chance = {gate.CALIBRATED: Figure.exact(0)}
    verdict = gate.judge(evidence_of(good(), ALL, dpo=at_chance), rules)
    assert (verdict.decision, "judge at chance" in verdict.reason) == ("inconclusive", True)
    for missing in (gate.WIN_RATE, gate.CALIBRATED):
        assert gate.judge(evidence_of(good(), without=[missing]), rules).decision == "hold"
    against = {"champion": Champion("v1", "dpo", np.ones(200, bool))}
    scores = {**good(), **{f"champion/{answer}": good()[f"dpo/{answer}"] for answer in metrics.ANSWERS}}
    assert gate.judge(evidence_of(scores, ALL, **against), rules).decision == "hold", "it was not asked"
    asked = {gate.WIN_RATE_VS_CHAMPION: figure(0.52, 0.6, 0.68)}
    assert gate.judge(evidence_of(scores, ALL, dpo=asked, **against), rules).decision == "promote"


# --- the champion ---------------------------------------------------------------------------------------------------


def challenged(challenger: Array, champion: Array, unseen: Array | None = None, kind: str = "dpo") -> Evidence:
    scores = table(len(champion), sft=np.zeros(len(champion)), dpo=challenger, champion=champion)
    everywhere = np.ones(len(champion), bool)
    return evidence_of(scores, champion=Champion("v1", kind, everywhere if unseen is None else unseen))


@pytest.mark.parametrize(
    ("wins", "decision"),
    [(160, "promote"), (124, "inconclusive"), (120, "hold"), (115, "hold")],
    ids=["better", "a little better", "equal", "worse"],
)
def test_a_champion_has_to_be_beaten(wins: int, decision: str) -> None:
    verdict = gate.judge(challenged(won(200, wins), won(200, 120)), config())
    assert "reward accuracy less that of the champion v1" in verdict.rules[-1].name
    assert {rule.outcome for rule in verdict.rules[:-1]} == {"passed"}, "nothing else decides"
    assert verdict.decision == decision


def test_an_equal_model_with_other_mistakes_is_not_promoted() -> None:
    rng = np.random.default_rng(5)
    champion = won(200, 140)
    verdict = gate.judge(challenged(rng.permutation(champion), rng.permutation(champion)), config())
    assert verdict.decision != "promote"


def test_only_pairs_count_that_the_champion_was_not_trained_on() -> None:
    """It knows the first 100 pairs by heart; on the others the challenger is better."""
    champion = np.concatenate([np.ones(100), won(100, 50)])
    challenger = np.concatenate([won(100, 70), won(100, 80)])
    new = np.arange(200) >= 100
    assert gate.judge(challenged(challenger, champion), config()).decision != "promote"
    verdict = gate.judge(challenged(challenger, champion, new), config())
    assert verdict.decision == "promote"
    assert "the 100 of 200 pairs that it was not trained on" in verdict.rules[-1].measured
    verdict = gate.judge(challenged(challenger, champion, new & (np.arange(200) < 110)), config())
    assert decided(verdict) == (
        "inconclusive",
        "prompts new to the champion v1: 10, wanted at least 30 (a difference of 0.1 needs about 197)",
    )


def test_models_of_one_kind_are_compared_by_what_they_were_trained_for() -> None:
    """Two SFT models by their loss; an SFT model and a DPO model by their reward accuracies against the base."""
    scores = table(100, sft=won(100, 50), champion=won(100, 90))
    scores["sft/chosen"] = scores["base/chosen"] + 3
    scores["sft/rejected"] = scores["sft/chosen"] - won(100, 50) + scores["base/rejected"] - scores["base/chosen"]
    for kind, outcome in (("sft", "passed"), ("dpo", "failed")):
        evidence = evidence_of(scores, candidate="sft", parent=BASE, champion=Champion("v1", kind, np.ones(100, bool)))
        assert gate.against_champion(evidence, config()).outcome == outcome
    assert gate.against_champion(evidence, config(primary="nll/chosen")).outcome == "passed"


# --- each setting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "passes", "fails", "instead"),
    [
        ("primary", "auto", "likelihood/accuracy", "inconclusive"),
        ("margin", 0.2, 0.25, "inconclusive"),
        ("margin", 0.2, 0.3, "hold"),
        ("champion_margin", 0.1, 0.17, "inconclusive"),
        ("champion_margin", 0.1, 0.2, "hold"),
        ("min_prompts", 200, 201, "inconclusive"),
        ("max_nll_increase", 0.3, 0.29, "inconclusive"),
        ("max_nll_increase", 0.3, 0.19, "hold"),
        ("max_kl", 0.15, 0.14, "inconclusive"),
        ("max_kl", 0.15, 0.09, "hold"),
        ("max_repetition_increase", 0.06, 0.04, "hold"),
        ("max_empty_increase", 0.13, 0.12, "hold"),
        ("length_ratio", (0.4, 2.0), (0.6, 2.0), "hold"),
        ("length_ratio", (0.4, 2.0), (0.4, 1.0), "promote"),
        ("min_win_rate", 0.54, 0.56, "inconclusive"),
        ("min_win_rate", 0.54, 0.61, "hold"),
    ],
)
def test_each_rule_follows_its_setting(setting: str, passes: Any, fails: Any, instead: str) -> None:
    """All other rules pass; the champion wins 120 of 200 pairs, the candidate 160."""
    dpo = {
        "nll/chosen_change": figure(0.1, 0.2, 0.3),
        "kl/chosen": figure(0.05, 0.1, 0.15),
        gate.REPETITION: Figure.exact(0.15),
        gate.EMPTY: Figure.exact(0.125),
        gate.LENGTH: Figure.exact(25),
    }
    scores = table(200, sft=np.zeros(200), dpo=won(200, 160), champion=won(200, 120))
    evidence = evidence_of(scores, ALL, dpo=dpo, champion=Champion("v1", "dpo", np.ones(200, bool)))
    open_ones = {
        "max_nll_increase": 9.0,
        "max_empty_increase": 1.0,
        "max_repetition_increase": 1.0,
        "length_ratio": (0.1, 2),
    }
    decisions = [gate.judge(evidence, config(**{**open_ones, setting: value})).decision for value in (passes, fails)]
    assert decisions == ["promote", instead]


def test_the_number_of_prompts_follows_the_wanted_difference() -> None:
    told = [gate.judge(evidence_of(good()), config(wanted_difference=d)).rules[0].wanted for d in (0.1, 0.05)]
    assert told == [
        "at least 30 (a difference of 0.1 needs about 197)",
        "at least 30 (a difference of 0.05 needs about 785)",
    ]


def test_the_documentation_has_every_setting_with_its_default() -> None:
    text = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = text.partition("### `evaluation.gate`\n")[2].partition("\n#")[0]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    told = {row[0]: yaml.safe_load(row[1]) for row in rows[2:]}
    assert told == GateConfig().model_dump(mode="json")


# --- error rates ----------------------------------------------------------------------------------------------------

TRIALS = 1000


def promoted(rng: np.random.Generator, pairs: int, accuracy: float, **rules: Any) -> float:
    """Return how often a DPO model of this true reward accuracy is promoted, as the first model."""
    found = 0
    scores = table(pairs, sft=np.zeros(pairs))
    kept = {"dpo": {"nll/chosen_change": Figure.exact(0)}}
    for _ in range(TRIALS):
        margin = np.where(rng.random(pairs) < accuracy, 1.0, -1.0)
        scores |= {"dpo/chosen": scores["base/chosen"], "dpo/rejected": scores["base/rejected"] - margin}
        found += gate.judge(Evidence("dpo", "sft", scores, kept), config(**rules)).decision == "promote"
    return found / TRIALS


@pytest.mark.parametrize("pairs", [30, 100, 400])
def test_no_difference_is_rarely_promoted(pairs: int) -> None:
    assert promoted(np.random.default_rng(pairs), pairs, 0.5) <= 0.05


def test_ten_points_are_found_with_400_pairs() -> None:
    assert promoted(np.random.default_rng(1), 400, 0.6) >= 0.8


def beats(rng: np.random.Generator, pairs: int, up: float, down: float, trials: int) -> float:
    """Return how often a champion is beaten that loses the share ``up`` of the pairs and wins the share ``down``."""
    found = 0
    scores = table(pairs, sft=np.zeros(pairs), dpo=np.zeros(pairs))
    champion = Champion("v1", "dpo", np.ones(pairs, bool))
    for _ in range(trials):
        where = rng.random(pairs)
        ours = np.where(where < up, 1.0, np.where(where < up + down, -1.0, 1.0))
        theirs = np.where(where < up, -1.0, 1.0)
        scores |= {
            "dpo/rejected": scores["base/rejected"] - ours,
            "champion/rejected": scores["base/rejected"] - theirs,
        }
        scores["champion/chosen"] = scores["base/chosen"]
        found += (
            gate.against_champion(Evidence("dpo", "sft", scores, {}, champion=champion), config()).outcome == "passed"
        )
    return found / trials


def test_error_rates_against_a_champion() -> None:
    """The two differ on a few pairs, where the bootstrap is too sure, or on many; ten points better with 400 pairs."""
    rng = np.random.default_rng(3)
    assert beats(rng, 100, 0.02, 0.02, 400) <= 0.05
    assert beats(rng, 100, 0.2, 0.2, 400) <= 0.05
    assert beats(rng, 400, 0.25, 0.15, 60) >= 0.8
