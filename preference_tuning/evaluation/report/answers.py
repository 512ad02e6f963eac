"""What every model answers to the same held-out prompts, side by side."""

from collections.abc import Mapping

from preference_tuning import reports
from preference_tuning.evaluation import catalogue
from preference_tuning.evaluation.job import Evaluation, Sample


def side_by_side(evaluation: Evaluation) -> reports.Html:
    """Return the greedy answers, and the sampled ones folded in."""
    words = (
        f"{len(evaluation.samples)} held-out prompts. Greedy answers of at most "
        f"{evaluation.terms.config.max_new_tokens} tokens, beside the one that the data calls chosen."
    )
    shown = [_sample(sample, evaluation.champion) for sample in evaluation.samples]
    return reports.section("Answers to held-out prompts", reports.paragraph(words), *shown)


def _sample(sample: Sample, champion: str | None) -> reports.Html:
    chosen = reports.quotation("chosen, in the data", sample.chosen)
    greedy = reports.beside(*_answers(sample.answers, champion), chosen)
    drawn = reports.folded("one seeded sample of each", reports.beside(*_answers(sample.sampled, champion)))
    return reports.Html(f"<article>{reports.quotation('prompt', sample.prompt)}{greedy}{drawn}</article>")


def _answers(answers: Mapping[str, str], champion: str | None) -> list[reports.Html]:
    return [reports.quotation(catalogue.title(model, champion), answer) for model, answer in answers.items()]
