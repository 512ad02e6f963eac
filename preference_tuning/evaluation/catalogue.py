"""What figures are called in words, and under which headings they are shown."""

import math
from collections.abc import Iterable, Mapping

from preference_tuning.evaluation.metrics import CHAMPION, Figures
from preference_tuning.evaluation.statistics import Figure

GROUPS: dict[str, dict[str, str]] = {
    "Preference": {
        "likelihood/accuracy": "finds the chosen answer likelier",
        "likelihood/accuracy_norm": "the same, per token",
        "rewards/accuracies": "reward accuracy, against its reference",
        "rewards/margins": "reward margin",
        "rewards/chosen": "reward of chosen answers",
        "rewards/rejected": "reward of rejected answers",
        "rewards/margins_length_correlation": "correlation of margin and length difference",
    },
    "Pairs of like length": {
        "matched/pairs": "pairs",
        "matched/likelihood/accuracy": "finds the chosen answer likelier",
        "matched/likelihood/accuracy_norm": "the same, per token",
        "matched/rewards/accuracies": "reward accuracy, against its reference",
        "matched/rewards/margins": "reward margin",
        "matched/rewards/chosen": "reward of chosen answers",
        "matched/rewards/rejected": "reward of rejected answers",
    },
    "Likelihood": {
        "nll/chosen": "loss on chosen answers, nats a token",
        "nll/rejected": "loss on rejected answers, nats a token",
        "ppl/chosen": "perplexity of chosen answers",
        "logps/chosen": "log-probability of chosen answers, nats",
        "logps/rejected": "log-probability of rejected answers, nats",
    },
    "Divergence from the reference": {
        "kl/chosen": "on chosen answers, nats a token",
        "kl/rejected": "on rejected answers, nats a token",
    },
    "Answers to held-out prompts": {
        "generation/length": "length, tokens",
        "generation/empty": "share that is empty",
        "generation/unfinished": "share that is cut off, unfinished",
        "generation/rep_4": "share of repeated 4-grams",
        "generation/longest_loop": "longest loop, tokens",
        "generation/template_leak": "share with marks of the chat template",
        "generation/distinct_1": "distinct tokens over all (distinct-1)",
        "generation/distinct_2": "distinct pairs of tokens over all (distinct-2)",
    },
    "General text": {
        "general/nll": "loss, nats a token",
        "general/ppl": "perplexity",
    },
}
JUDGE: dict[str, str] = {
    "judge/win_rate": "win rate against its reference, both orders, ties as half",
    "judge/lc_win_rate": "the same if both answers were equally long",
    "judge/win_rate_vs_champion": "win rate against the champion",
    "judge/tie_rate": "share of ties",
    "judge/position_consistency": "same choice in both orders",
    "judge/first_position_rate": "prefers the answer that it reads first",
    "judge/invalid_rate": "replies that are no answer",
    "judge/agreement_with_labels": "agrees with labelled pairs",
    "judge/injection_shift": "agreement lost to an instruction in an answer",
    "judge/calibrated": "is listened to: better than chance, and obeys no answer",
    "judge/requests": "requests",
    "judge/tokens_prompt": "tokens read",
    "judge/tokens_completion": "tokens written",
}
COUNTS = {"matched/pairs", "judge/calibrated", "judge/requests", "judge/tokens_prompt", "judge/tokens_completion"}
TASKS = "lm_eval/"
MAIN = (
    "likelihood/accuracy",
    "likelihood/accuracy_norm",
    "rewards/accuracies",
    "nll/chosen",
    "kl/chosen",
    "general/nll",
    "generation/length",
    "generation/rep_4",
    "generation/empty",
)
"""The figures that say most: those of the model card and of the dashboard."""


def groups(models: Mapping[str, Figures]) -> dict[str, dict[str, str]]:
    """Return the headings with what was measured under each: names of figures with their words; without the judge's."""
    tasks = {name: name.removeprefix(TASKS) for name in measured(models) if name.startswith(TASKS)}
    shown = {
        title: {name: words for name, words in group.items() if name in measured(models)}
        for title, group in {**GROUPS, "Tasks of lm-evaluation-harness": tasks}.items()
    }
    return {title: group for title, group in shown.items() if group}


def main(models: Mapping[str, Figures]) -> dict[str, str]:
    """Return the main figures that were measured with their words, tasks and the judge's win rates among them."""
    words = {name: words for group in (*groups(models).values(), JUDGE) for name, words in group.items()}
    words["kl/chosen"] = "divergence from the reference, nats a token"
    words["general/nll"] = "loss on general text, nats a token"
    words["generation/length"] = "length of answers, tokens"
    words["generation/empty"] = "share of empty answers"
    tasks = [name for name in measured(models) if name.startswith(TASKS)]
    wanted = (*MAIN, "judge/win_rate", "judge/win_rate_vs_champion", *tasks)
    return {name: words[name] for name in wanted if name in measured(models)}


def measured(models: Mapping[str, Figures]) -> list[str]:
    """Return the names of all figures, each once."""
    return list(dict.fromkeys(name for figures in models.values() for name in figures))


def title(model: str, champion: str | None) -> str:
    """Return what a model is called; the champion with its version."""
    return f"{CHAMPION} {champion}" if model == CHAMPION and champion else model


def told(name: str, figure: Figure) -> tuple[str, str]:
    """Return a figure in words and its interval, each empty where there is none."""
    if math.isnan(figure.value):
        return "not a number", ""
    if name in COUNTS:
        return f"{figure.value:,.0f}", ""
    exact = figure.low == figure.high or math.isnan(figure.low)
    largest = abs(figure.value) if exact else max(abs(figure.low), abs(figure.high))
    # Four digits tell as much of a perplexity as of an accuracy.
    places = 3 - sum(largest >= limit for limit in (10, 100, 1000))
    return f"{figure.value:.{places}f}", "" if exact else f"[{figure.low:.{places}f}, {figure.high:.{places}f}]"


def in_line(name: str, figure: Figure | None) -> str:
    """Return a figure with its interval, nothing of none."""
    return " ".join(filter(None, told(name, figure))) if figure else ""


def numbers(name: str, figure: Figure) -> Iterable[tuple[str, float]]:
    """Yield a figure as plain numbers with names, its ends only where it has an interval, and only what is finite."""
    ends = {} if figure.low == figure.high else {f"{name}/low": figure.low, f"{name}/high": figure.high}
    return ((key, value) for key, value in {name: figure.value, **ends}.items() if math.isfinite(value))
