"""Figures from the score table: of a model, of a model against its reference, and of two models pair by pair.

Names and definitions are TRL's where they agree. They differ in two places: ties count as half, so that a policy that
equals its reference has a reward accuracy of 0.5 and not 0; and every mean is over pairs, not over means of batches.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from preference_tuning.evaluation import statistics
from preference_tuning.evaluation.statistics import Array, Figure

BASE, CHAMPION = "base", "champion"
ANSWERS = ("chosen", "rejected")
MATCHED_WITHIN = 0.1
PAIRED = ("likelihood/accuracy", "likelihood/accuracy_norm", "nll/chosen")

Scores = Mapping[str, Array]
"""Columns of the score table: ``prompt`` (pairs of one prompt share it), ``chosen_tokens``, ``rejected_tokens``; for
each model ``<model>/chosen`` and ``<model>/rejected`` (summed log-probabilities), and where they were measured
``<model>/chosen_kl`` and ``<model>/rejected_kl`` (summed KL against its reference); all in nats."""
Figures = dict[str, Figure]


def figures(scores: Scores, references: Mapping[str, str], beta: float, seed: int) -> dict[str, Figures]:
    """Return the figures of every model of the table.

    Args:
        scores: the table.
        references: the reference of each model that has one.
        beta: of the DPO model's rewards; those of others are log-ratios.
        seed: of the bootstrap.
    """
    found: dict[str, Figures] = {}
    for model in models(scores):
        found[model] = of_model(scores, model, seed)
        if model in references:
            found[model] |= against(scores, model, references[model], beta if model == "dpo" else 1.0, seed)
            found[model] |= paired(scores, model, references[model], PAIRED, "change", seed)
        if model not in (BASE, CHAMPION) and CHAMPION in models(scores):
            found[model] |= paired(scores, model, CHAMPION, (*PAIRED, "rewards/accuracies"), "vs_champion", seed)
    return found


def models(scores: Scores) -> list[str]:
    """Return the models of the table, in its order."""
    return [name.removesuffix("/chosen") for name in scores if name.endswith("/chosen")]


def of_model(scores: Scores, model: str, seed: int) -> Figures:
    """Return what can be said of any model: which answer it finds likelier, and how likely the answers are."""
    chosen, rejected = (scores[f"{model}/{answer}"] for answer in ANSWERS)
    tokens, prompts = scores["chosen_tokens"], scores["prompt"]
    log_perplexity = statistics.means({"ppl/chosen": -chosen / tokens}, prompts, seed, weights=tokens)
    means = {
        "nll/chosen": -chosen / tokens,
        "nll/rejected": -rejected / scores["rejected_tokens"],
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    return {
        **_likelihood(scores, model),
        **statistics.means(means, prompts, seed),
        **{name: _exponential(figure) for name, figure in log_perplexity.items()},
        **_of_matched(scores, lambda part: _likelihood(part, model)),
        "matched/pairs": Figure.exact(int(matched(scores).sum())),
    }


def against(scores: Scores, model: str, reference: str, beta: float, seed: int) -> Figures:
    """Return TRL's rewards/* of ``model`` against ``reference``, how they follow length, and the divergence."""
    margins = beta * reward_margins(scores, model, reference)
    lengths = scores["chosen_tokens"] - scores["rejected_tokens"]
    follows = statistics.correlation(margins, lengths, scores["prompt"], seed)
    divergence = {
        name: figure
        for answer in ANSWERS
        if f"{model}/{answer}_kl" in scores
        for name, figure in _divergence(scores, model, answer, seed).items()
    }
    return {
        **_rewards(scores, model, reference, beta, seed),
        **_of_matched(scores, lambda part: _rewards(part, model, reference, beta, seed)),
        **({"rewards/margins_length_correlation": follows} if follows else {}),
        **divergence,
    }


def paired(scores: Scores, model: str, other: str, compared: Sequence[str], suffix: str, seed: int) -> Figures:
    """Return ``<metric>_<suffix>``, the figures of ``model`` less those of ``other`` on the same pairs.

    For accuracies ``<metric>_<suffix>_p`` is the p-value of McNemar's test.
    """
    prompts = scores["prompt"]
    gains = {metric: gain(scores, metric, model, other) for metric in compared}
    rises = {f"{metric}_{suffix}": -values if metric == "nll/chosen" else values for metric, values in gains.items()}
    tests = {
        f"{metric}_{suffix}_p": Figure.exact(statistics.mcnemar(values, prompts))
        for metric, values in gains.items()
        if metric != "nll/chosen"
    }
    return {**statistics.means(rises, prompts, seed), **tests}


def gain(scores: Scores, metric: str, model: str, other: str) -> Array:
    """Return by how much ``model`` is better than ``other`` on each pair [pairs], in units of ``metric``.

    Reward accuracies are those of both against the base model.
    """
    difference: Array = _QUALITY[metric](scores, model) - _QUALITY[metric](scores, other)
    return difference


def reward_margins(scores: Scores, model: str, reference: str) -> Array:
    """Return (log pi/ref of chosen) - (log pi/ref of rejected), [pairs] nats; times beta, these are TRL's margins."""
    chosen, rejected = (log_ratio(scores, model, reference, answer) for answer in ANSWERS)
    margins: Array = chosen - rejected
    return margins


def log_ratio(scores: Scores, model: str, reference: str, answer: str) -> Array:
    """Return log pi/ref of the chosen or rejected answers, [pairs] nats."""
    ratio: Array = scores[f"{model}/{answer}"] - scores[f"{reference}/{answer}"]
    return ratio


def wins(margins: Array) -> Array:
    """Return 1 for margins above 0, a half for ties, 0 for those below, nan for those that are not finite."""
    return np.where(np.isfinite(margins), np.heaviside(margins, 0.5), np.nan)


def matched(scores: Scores) -> Array:
    """Return which pairs have answers of like length: the shorter has at least 90 % of the tokens of the longer."""
    chosen, rejected = scores["chosen_tokens"], scores["rejected_tokens"]
    near: Array = np.abs(chosen - rejected) <= MATCHED_WITHIN * np.maximum(chosen, rejected)
    return near


def part(scores: Scores, where: Array) -> dict[str, Array]:
    """Return the table of the pairs at which ``where`` holds."""
    return {name: column[where] for name, column in scores.items()}


def _likelihood(scores: Scores, model: str) -> Figures:
    names = ("likelihood/accuracy", "likelihood/accuracy_norm")
    return {name: statistics.proportion(_QUALITY[name](scores, model), scores["prompt"]) for name in names}


def _rewards(scores: Scores, model: str, reference: str, beta: float, seed: int) -> Figures:
    prompts = scores["prompt"]
    chosen, rejected = (beta * log_ratio(scores, model, reference, answer) for answer in ANSWERS)
    means = {"rewards/margins": chosen - rejected, "rewards/chosen": chosen, "rewards/rejected": rejected}
    accuracy = statistics.proportion(wins(chosen - rejected), prompts)
    return {"rewards/accuracies": accuracy, **statistics.means(means, prompts, seed)}


def _divergence(scores: Scores, model: str, answer: str, seed: int) -> Figures:
    tokens = scores[f"{answer}_tokens"]
    per_token = {f"kl/{answer}": scores[f"{model}/{answer}_kl"] / tokens}
    return statistics.means(per_token, scores["prompt"], seed, weights=tokens)


def _of_matched(scores: Scores, measure: Callable[[Scores], Figures]) -> Figures:
    near = matched(scores)
    found = measure(part(scores, near)) if near.any() else {}
    return {f"matched/{name}": figure for name, figure in found.items()}


def _exponential(figure: Figure) -> Figure:
    low, value, high = (float(np.exp(end)) for end in (figure.low, figure.value, figure.high))
    return Figure(value=value, low=low, high=high)


def _per_token(scores: Scores, model: str, answer: str) -> Array:
    mean: Array = scores[f"{model}/{answer}"] / scores[f"{answer}_tokens"]
    return mean


# What a metric says of each pair, the higher the better.
_QUALITY: dict[str, Callable[[Scores, str], Array]] = {
    "rewards/accuracies": lambda scores, model: wins(reward_margins(scores, model, BASE)),
    "likelihood/accuracy": lambda scores, model: wins(scores[f"{model}/chosen"] - scores[f"{model}/rejected"]),
    "likelihood/accuracy_norm": lambda scores, model: wins(
        _per_token(scores, model, "chosen") - _per_token(scores, model, "rejected")
    ),
    "nll/chosen": lambda scores, model: _per_token(scores, model, "chosen"),
}
