"""What lies behind the figures: charts with a value for each held-out pair."""

from preference_tuning import reports
from preference_tuning.evaluation import metrics
from preference_tuning.evaluation.job import Evaluation
from preference_tuning.evaluation.metrics import Scores
from preference_tuning.evaluation.statistics import Array

DRAWN = 1000
"""Points of a chart; of more pairs, as many evenly spread ones are drawn."""


def charts(evaluation: Evaluation, scores: Scores) -> reports.Html:
    """Return the distributions over the pairs, and how the candidate's margins follow the length of the answers."""
    references = evaluation.terms.references
    margins = {
        f"{model} against {reference}": metrics.reward_margins(scores, model, reference)
        for model, reference in references.items()
    }
    losses = {model: -scores[f"{model}/chosen"] / scores["chosen_tokens"] for model in evaluation.models}
    divergences = {
        f"{model} from {reference}": scores[f"{model}/chosen_kl"] / scores["chosen_tokens"]
        for model, reference in references.items()
        if f"{model}/chosen_kl" in scores
    }
    candidate = evaluation.terms.candidate
    against = f"{candidate} against {references[candidate]}"
    longer = scores["chosen_tokens"] - scores["rejected_tokens"]
    every = -(-len(longer) // DRAWN)
    points = list(zip(longer[::every].tolist(), margins[against][::every].tolist(), strict=True))
    return reports.section(
        "Pair by pair",
        reports.charts(
            reports.histogram("Log-ratio margins (right of 0: learned)", _lists(margins), "nats"),
            reports.scatter(f"Log-ratio margin of {against}, by length", {against: points}, "chosen longer by, tokens"),
            reports.histogram("Loss on chosen answers", _lists(losses), "nats a token"),
            reports.histogram("Divergence on chosen answers", _lists(divergences), "nats a token"),
        ),
    )


def _lists(columns: dict[str, Array]) -> dict[str, list[float]]:
    return {name: column.tolist() for name, column in columns.items()}
