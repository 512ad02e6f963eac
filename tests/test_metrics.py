"""Every metric against hand-computed values, and its symmetries; against TRL's own evaluation in test_scoring.py."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_tuning.evaluation import metrics, statistics
from preference_tuning.evaluation.metrics import Scores
from preference_tuning.evaluation.statistics import Figure

# Four pairs, the last two of one prompt. DPO doubles what SFT learned; the champion is the SFT model.
SCORES = {
    "prompt": np.array(["a", "b", "c", "c"]),
    "chosen_tokens": np.array([2.0, 4.0, 5.0, 10.0]),
    "rejected_tokens": np.array([4.0, 2.0, 5.0, 5.0]),
    "base/chosen": np.array([-4.0, -8.0, -5.0, -20.0]),
    "base/rejected": np.array([-6.0, -6.0, -5.0, -10.0]),
    "sft/chosen": np.array([-3.0, -7.0, -5.0, -20.0]),
    "sft/rejected": np.array([-6.0, -6.0, -6.0, -9.0]),
    "sft/chosen_kl": np.array([1.0, 2.0, 0.5, 7.0]),
    "sft/rejected_kl": np.array([0.0, 0.0, 4.0, 4.0]),
    "dpo/chosen": np.array([-2.0, -6.0, -5.0, -20.0]),
    "dpo/rejected": np.array([-6.0, -9.0, -7.0, -8.0]),
    "champion/chosen": np.array([-3.0, -7.0, -5.0, -20.0]),
    "champion/rejected": np.array([-6.0, -6.0, -6.0, -9.0]),
}
REFERENCES = {"sft": "base", "dpo": "sft", "champion": "base"}

BY_HAND = {
    "base": {
        # margins 2, -2, 0, -10: one win, one tie, two losses
        "likelihood/accuracy": 1.5 / 4,
        # a token -2 and -1.5, -2 and -3, -1 and -1, -2 and -2: one loss, one win, two ties
        "likelihood/accuracy_norm": 2 / 4,
        "nll/chosen": (2 + 2 + 1 + 2) / 4,
        "nll/rejected": (1.5 + 3 + 1 + 2) / 4,
        "ppl/chosen": math.exp(37 / 21),
        "logps/chosen": -37 / 4,
        "logps/rejected": -27 / 4,
        # only the third pair has answers of like length
        "matched/pairs": 1,
        "matched/likelihood/accuracy": 0.5,
        "matched/likelihood/accuracy_norm": 0.5,
    },
    "sft": {
        # log-ratios: chosen 1, 1, 0, 0; rejected 0, 0, -1, 1; margins 1, 1, 1, -1
        "rewards/accuracies": 3 / 4,
        "rewards/margins": 2 / 4,
        "rewards/chosen": 2 / 4,
        "rewards/rejected": 0,
        "matched/rewards/accuracies": 1,
        "matched/rewards/margins": 1,
        "matched/rewards/chosen": 0,
        "matched/rewards/rejected": -1,
        # lengths -2, 2, 0, 5 and margins 1, 1, 1, -1: covariance -1.875, variances 6.6875 and 0.75
        "rewards/margins_length_correlation": -1.875 / math.sqrt(6.6875 * 0.75),
        "kl/chosen": 10.5 / 21,
        "kl/rejected": 8 / 16,
        # margins 3, -1, 1, -11 after 2, -2, 0, -10: the third pair, from a tie to a win
        "likelihood/accuracy_change": 0.5 / 4,
        "likelihood/accuracy_change_p": 1,
        # a token -1.5 and -1.5, -1.75 and -3, -1 and -1.2, -2 and -1.8: 0.5, 1, 1, 0 after 0, 1, 0.5, 0.5
        "likelihood/accuracy_norm_change": 0.5 / 4,
        "likelihood/accuracy_norm_change_p": 1,
        "nll/chosen_change": (-1 / 2 - 1 / 4) / 4,
        "nll/chosen_vs_champion": 0,
        "likelihood/accuracy_vs_champion": 0,
        "likelihood/accuracy_vs_champion_p": 1,
        "likelihood/accuracy_norm_vs_champion": 0,
        "likelihood/accuracy_norm_vs_champion_p": 1,
        "rewards/accuracies_vs_champion": 0,
        "rewards/accuracies_vs_champion_p": 1,
    },
    "dpo": {
        # against SFT, chosen 1, 1, 0, 0; rejected 0, -3, -1, 1; margins 1, 4, 1, -1; times beta 0.5
        "rewards/accuracies": 3 / 4,
        "rewards/margins": 0.5 * 5 / 4,
        "rewards/chosen": 0.5 * 2 / 4,
        "rewards/rejected": 0.5 * -3 / 4,
        # margins 4, 3, 2, -12 after 3, -1, 1, -11: the second pair is won
        "likelihood/accuracy_change": 1 / 4,
        "nll/chosen_change": (-1 / 2 - 1 / 4) / 4,
        "nll/chosen_vs_champion": (-1 / 2 - 1 / 4) / 4,
        # both against the base: 2, 5, 2, -2 and 1, 1, 1, -1
        "rewards/accuracies_vs_champion": 0,
    },
}


def test_every_figure_by_hand() -> None:
    found = metrics.figures(SCORES, REFERENCES, beta=0.5, seed=0)
    for model, expected in BY_HAND.items():
        values = {name: figure.value for name, figure in found[model].items()}
        assert {name: values[name] for name in expected} == pytest.approx(expected), model
    assert set(found["base"]) == set(BY_HAND["base"])
    assert set(found["sft"]) == {*BY_HAND["base"], *BY_HAND["sft"]}, "no figure without its value by hand"
    assert {name for name in found["champion"] if "champion" in name} == set(), "it is not compared with itself"


def test_intervals_hold_the_value_and_count_prompts() -> None:
    found = metrics.figures(SCORES, REFERENCES, beta=0.5, seed=0)
    for name, figure in found["dpo"].items():
        assert figure.low <= figure.value <= figure.high, name
    wins = np.array([1.0, 0.0, 0.5, 0.0])
    assert found["base"]["likelihood/accuracy"] == statistics.proportion(wins, SCORES["prompt"])
    assert found["base"]["likelihood/accuracy"] != statistics.proportion(wins, np.array(["a", "b", "c", "d"]))


def test_a_policy_equal_to_its_reference_has_accuracy_one_half() -> None:
    """TRL counts ties as losses and reports 0."""
    found = metrics.against(SCORES, "base", "base", beta=0.5, seed=0)
    assert found["rewards/accuracies"].value == 0.5
    assert found["rewards/margins"] == Figure.exact(0)
    assert "rewards/margins_length_correlation" not in found, "what does not vary correlates with nothing"


def test_without_pairs_of_like_length_only_their_number_is_told() -> None:
    apart = metrics.part(SCORES, ~metrics.matched(SCORES))
    found = metrics.figures(apart, REFERENCES, beta=0.5, seed=0)["dpo"]
    assert {name: figure.value for name, figure in found.items() if name.startswith("matched/")} == {"matched/pairs": 0}


def test_pairs_match_within_a_tenth_of_the_longer_answer() -> None:
    lengths = {
        "chosen_tokens": np.array([100.0, 90, 89, 10, 11]),
        "rejected_tokens": np.array([91.0, 100, 100, 11, 13]),
    }
    assert metrics.matched(lengths).tolist() == [True, True, False, True, False]


def tables(draw: Any) -> dict[str, Any]:
    n = draw(st.integers(2, 12))
    logps = st.lists(st.integers(-60, -1).map(float), min_size=n, max_size=n)
    lengths = st.lists(st.integers(1, 20).map(float), min_size=n, max_size=n)
    table: dict[str, Any] = {
        "prompt": np.array(draw(st.lists(st.sampled_from("abcdef"), min_size=n, max_size=n))),
        **{f"{answer}_tokens": np.array(draw(lengths)) for answer in metrics.ANSWERS},
    }
    columns = [f"{model}/{answer}" for model in ("base", "sft", "dpo", "champion") for answer in metrics.ANSWERS]
    return table | {name: np.array(draw(logps)) for name in columns}


def swapped(scores: Scores) -> dict[str, Any]:
    """Return the table with the labels the other way round."""
    other = {"chosen": "rejected", "rejected": "chosen"}

    def name_of(name: str) -> str:
        model, slash, answer = name.rpartition("/")
        if slash:
            return f"{model}/{other[answer]}"
        return f"{other[name.removesuffix('_tokens')]}_tokens" if name.endswith("_tokens") else name

    return {name_of(name): column for name, column in scores.items()}


# What a figure and that of swapped labels make together: 1 for shares, 0 for differences.
MIRRORED = {"likelihood/accuracy": 1, "likelihood/accuracy_norm": 1, "rewards/accuracies": 1, "rewards/margins": 0}
MIRRORED |= dict.fromkeys(("likelihood/accuracy_change", "rewards/accuracies_vs_champion"), 0)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_symmetries(data: Any) -> None:
    """Swapped labels mirror accuracies around one half and margins around 0; the order of rows changes nothing."""
    scores = tables(data.draw)
    order = np.array(data.draw(st.permutations(range(len(scores["prompt"])))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 20)
        plain, mirrored, mixed = (
            metrics.figures(table, REFERENCES, 0.3, seed=1)
            for table in (scores, swapped(scores), metrics.part(scores, order))
        )
    for name, total in MIRRORED.items():
        one, other = plain["dpo"][name], mirrored["dpo"][name]
        assert one.value + other.value == pytest.approx(total)
        if total:
            assert (one.low + other.high, one.high + other.low) == pytest.approx((total, total))
    for model, figures in plain.items():
        for name, figure in figures.items():
            again = mixed[model][name]
            assert (again.value, again.low, again.high) == pytest.approx((figure.value, figure.low, figure.high)), name
