"""Figures against hand-computed values, and the gate's decisions."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from preference_tuning.config import EvaluationConfig
from preference_tuning.evaluation import gate, statistics
from preference_tuning.evaluation.statistics import Figure

CONFIG = EvaluationConfig(min_pairs=4)
SCORES = {
    "chosen_tokens": np.array([2.0, 4.0, 5.0, 10.0]),
    "rejected_tokens": np.array([4.0, 2.0, 5.0, 5.0]),
    "base/chosen": np.array([-4.0, -8.0, -5.0, -20.0]),
    "base/rejected": np.array([-6.0, -6.0, -5.0, -10.0]),
    "sft/chosen": np.array([-3.0, -7.0, -5.0, -20.0]),
    "sft/rejected": np.array([-6.0, -6.0, -6.0, -9.0]),
}


def test_model_figures_by_hand() -> None:
    figures = statistics.model_figures(SCORES, "base", seed=0)
    # margins 2, -2, 0, -10: one win, one tie, two losses
    assert figures["likelihood/accuracy"].value == pytest.approx(1.5 / 4)
    # per token -2 / -1.5, -2 / -3, -1 / -1, -2 / -2: one loss, one win, two ties
    assert figures["likelihood/accuracy_norm"].value == pytest.approx(2 / 4)
    assert figures["nll/chosen"].value == pytest.approx((2 + 2 + 1 + 2) / 4)
    assert figures["logps/chosen"].value == pytest.approx(-37 / 4)


def test_reward_figures_by_hand() -> None:
    figures = statistics.reward_figures(SCORES, "sft", "base", beta=0.5, seed=0)
    # log-ratios: chosen 1, 1, 0, 0; rejected 0, 0, -1, 1; margins 1, 1, 1, -1
    assert figures["rewards/accuracies"].value == pytest.approx(3 / 4)
    assert figures["rewards/margins"].value == pytest.approx(0.5 * 2 / 4)
    assert figures["rewards/chosen"].value == pytest.approx(0.5 * 2 / 4)
    assert figures["rewards/rejected"].value == pytest.approx(0.0)
    assert figures["nll/chosen_change"].value == pytest.approx((-1 / 2 - 1 / 4) / 4)


def test_a_policy_equal_to_its_reference_has_accuracy_one_half() -> None:
    """TRL counts ties as losses and reports 0."""
    figures = statistics.reward_figures(SCORES, "base", "base", beta=0.5, seed=0)
    assert figures["rewards/accuracies"].value == 0.5
    assert figures["rewards/margins"] == Figure(value=0, low=0, high=0)


def test_intervals() -> None:
    from scipy.stats import binomtest

    wins = np.array([1.0] * 18 + [-1.0] * 3)
    expected = binomtest(18, 21).proportion_ci(0.95, "wilson")
    figure = statistics.preference_accuracy(wins)
    assert (figure.low, figure.high) == pytest.approx((expected.low, expected.high))
    all_won = statistics.preference_accuracy(np.ones(20))
    assert all_won.value == 1
    assert 0.8 < all_won.low < 0.9, "twenty of twenty is no certainty"
    values = np.random.default_rng(1).normal(3.0, 1.0, 400)
    figure = statistics.mean(values, seed=0)
    assert figure.low < values.mean() < figure.high
    assert figure.high - figure.low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert statistics.mean(values, seed=0) == figure, "the same seed gives the same interval"


def figures(accuracy: tuple[float, float, float], change: tuple[float, float, float]) -> dict[str, Figure]:
    def figure(values: tuple[float, float, float]) -> Figure:
        return Figure(low=values[0], value=values[1], high=values[2])

    return {"rewards/accuracies": figure(accuracy), "nll/chosen_change": figure(change)}


@pytest.mark.parametrize(
    ("accuracy", "change", "pairs", "decision"),
    [
        ((0.6, 0.7, 0.8), (-0.1, 0.0, 0.1), 50, "promote"),
        ((0.45, 0.6, 0.7), (-0.1, 0.0, 0.1), 50, "inconclusive"),
        ((0.3, 0.4, 0.5), (-0.1, 0.0, 0.1), 50, "hold"),
        ((0.6, 0.7, 0.8), (0.3, 0.4, 0.5), 50, "hold"),
        ((0.6, 0.7, 0.8), (0.1, 0.15, 0.3), 50, "inconclusive"),
        ((0.6, 0.7, 0.8), (-0.1, 0.0, 0.1), 3, "inconclusive"),
        ((math.nan, math.nan, math.nan), (-0.1, 0.0, 0.1), 50, "hold"),
        ((0.6, 0.7, 0.8), (math.nan, math.nan, math.nan), 50, "hold"),
    ],
)
def test_the_gate_on_dpo(
    accuracy: tuple[float, float, float], change: tuple[float, float, float], pairs: int, decision: str
) -> None:
    verdict = gate.judge("dpo", pairs, SCORES, figures(accuracy, change), CONFIG)
    assert verdict.decision == decision
    if decision == "hold":
        failed = [rule for rule in verdict.rules if rule.outcome == "failed"]
        assert failed[0].name in verdict.reason


def test_the_gate_on_sft_asks_for_a_lower_loss_than_the_base() -> None:
    better = gate.judge("sft", 50, SCORES, figures((0, 0, 0), (-0.3, -0.2, -0.1)), CONFIG)
    worse = gate.judge("sft", 50, SCORES, figures((1, 1, 1), (0.1, 0.2, 0.3)), CONFIG)
    assert (better.decision, worse.decision) == ("promote", "hold")


def test_scores_that_are_not_finite_hold() -> None:
    broken = {**SCORES, "sft/chosen": np.array([-3.0, np.nan, -5.0, -np.inf])}
    good = figures((0.6, 0.7, 0.8), (-0.1, 0.0, 0.1))
    verdict = gate.judge("dpo", 50, broken, good, CONFIG)
    assert verdict.decision == "hold"
    assert "not finite: 2" in verdict.reason


def test_champion_and_challenger_are_compared_pair_by_pair() -> None:
    rng = np.random.default_rng(0)
    n = 200
    base = rng.normal(-20, 3, (2, n))
    scores = {"base/chosen": base[0], "base/rejected": base[1]}
    for name, wins in (("challenger", 160), ("champion", 120)):
        gain = np.where(np.arange(n) < wins, 1.0, -1.0)
        scores |= {f"{name}/chosen": base[0] + gain, f"{name}/rejected": base[1]}
    difference = statistics.accuracy_difference(scores, "challenger", "champion", "base", seed=0)
    assert difference.value == pytest.approx(0.2)
    assert 0.13 < difference.low < difference.high < 0.27


def test_the_dpo_reference_is_not_computed_again(tmp_path: Path) -> None:
    """The same rows, weights and batches: read. Other batches, which may move the last bits: computed."""
    import datasets
    import torch
    from test_scoring import PAIRS, tiny

    from preference_tuning.evaluation.__main__ import _Evaluating
    from preference_tuning.models import stored

    evaluating = _Evaluating.__new__(_Evaluating)
    evaluating.row_key = "rows"
    evaluating.base = SimpleNamespace(
        dtype=torch.float32, device=torch.device("cpu"), tokenizer=SimpleNamespace(pad_token_id=0)
    )
    evaluating.job = SimpleNamespace(
        adapter_hashes={"sft": "weights"}, source=SimpleNamespace(fingerprint="base"), output_dir=tmp_path,
        config=SimpleNamespace(batch_size=8), parts=1,
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{**pair, "length": 10} for pair in PAIRS])
    kept = torch.tensor([[-1.0, -2.0]] * len(rows))
    key = stored.key_of("rows", "weights", "base", torch.float32, True, 8)
    stored.write(stored.place(tmp_path, key), key, kept)
    model = tiny("Llama")
    assert evaluating._score("sft", model, rows).tolist() == kept.tolist()
    assert (evaluating._score("base", model, rows) != kept.numpy()).all()
    evaluating.job.config.batch_size = 4
    assert (evaluating._score("sft", model, rows) != kept.numpy()).all()
