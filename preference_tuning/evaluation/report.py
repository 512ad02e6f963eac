"""The evaluation report: the verdict, the models side by side, and what they answer."""

from preference_tuning import reports
from preference_tuning.evaluation import metrics
from preference_tuning.evaluation.deciding import Measured
from preference_tuning.evaluation.job import Evaluation

SHOWN = {
    "likelihood/accuracy": "finds the chosen answer likelier",
    "likelihood/accuracy_norm": "the same, per token",
    "nll/chosen": "loss on chosen answers, nats a token",
    "rewards/accuracies": "reward accuracy, against the model before it",
    "rewards/margins": "reward margin, beta times log-ratio",
    "nll/chosen_change": "change of the loss on chosen answers",
}


def render(evaluation: Evaluation, measured: Measured) -> str:
    """Return the report of an evaluation as HTML."""
    verdict = evaluation.verdict
    return reports.page(
        "Evaluation",
        f"{evaluation.pairs} held-out pairs · data {evaluation.data_fingerprint[:16]} · {evaluation.seconds:.0f} s",
        reports.section(
            "Verdict",
            reports.Html(f"<p>{reports.badge(verdict.decision)} {reports.text(verdict.reason)}</p>"),
            reports.table(
                ["rule", "measured", "wanted", "outcome"],
                [[rule.name, rule.measured, rule.wanted, rule.outcome] for rule in verdict.rules],
            ),
        ),
        reports.section(
            "Models side by side",
            reports.paragraph(
                "Each figure with its 95 % interval, on the same held-out pairs; ties count as half. Rewards are those "
                f"of a model against the one before it, with beta {evaluation.terms.beta:g} for DPO and 1 for SFT."
            ),
            _figures(evaluation),
        ),
        reports.section("Per example", reports.charts(*_charts(evaluation, measured.scores))),
        reports.section("Answers to held-out prompts", _samples(evaluation)),
    )


def _figures(evaluation: Evaluation) -> reports.Html:
    rows = [
        [
            f"{meaning} ({name})",
            *(str(figures[name]) if name in figures else "–" for figures in evaluation.models.values()),
        ]
        for name, meaning in SHOWN.items()
    ]
    return reports.table(["", *evaluation.models], rows, numeric=True)


def _charts(evaluation: Evaluation, scores: metrics.Scores) -> list[reports.Html]:
    names = list(evaluation.models)
    accuracy = {name: figures["likelihood/accuracy"].value for name, figures in evaluation.models.items()}
    margins = {
        f"{name} against {parent}": metrics.reward_margins(scores, name, parent).tolist()
        for name, parent in evaluation.terms.references.items()
    }
    per_token = {name: (scores[f"{name}/chosen"] / scores["chosen_tokens"]).tolist() for name in names}
    return [
        reports.bars("Finds the chosen answer likelier", accuracy, "{:.3f}", top=1.0),
        reports.histogram("Log-ratio margins of the pairs", margins, "nats"),
        reports.histogram("Log-probability of chosen answers", per_token, "nats a token"),
    ]


def _samples(evaluation: Evaluation) -> reports.Html:
    rows = [
        [sample.prompt, *(sample.answers[name] for name in evaluation.models), sample.chosen]
        for sample in evaluation.samples
    ]
    return reports.table(["prompt", *evaluation.models, "chosen, in the data"], rows)
