"""The evaluation report: the verdict, what got worse, the models side by side, and what they answer."""

from preference_tuning import reports
from preference_tuning.evaluation.deciding import Measured
from preference_tuning.evaluation.gate import Rule
from preference_tuning.evaluation.job import Evaluation
from preference_tuning.evaluation.report import answers, figures, pairs
from preference_tuning.evaluation.report.figures import forests

__all__ = ["MEANING", "forests", "render"]

MEANING = {
    "promote": "every rule passed",
    "hold": "a rule failed",
    "inconclusive": "no rule failed, but the evidence does not decide all of them",
}


def render(evaluation: Evaluation, measured: Measured) -> str:
    """Return the report of an evaluation as HTML."""
    parts = [
        _verdict(evaluation),
        _worse(evaluation),
        figures.side_by_side(evaluation),
        figures.paired_differences(evaluation),
        pairs.charts(evaluation, measured.scores),
    ]
    if evaluation.samples:
        parts.append(answers.side_by_side(evaluation))
    if measured.judgement is not None:
        parts.append(figures.of_judge(evaluation))
    return reports.page(
        "Evaluation",
        f"{evaluation.pairs} held-out pairs{_dropped(evaluation)} · {', '.join(figures.titles(evaluation))} · "
        f"{evaluation.seconds:.0f} s",
        *parts,
        _bound(evaluation),
    )


def _dropped(evaluation: Evaluation) -> str:
    return f" ({evaluation.dropped} more were too long)" if evaluation.dropped else ""


def _verdict(evaluation: Evaluation) -> reports.Html:
    verdict = evaluation.verdict
    decided = f"{verdict.candidate}: {MEANING[verdict.decision]}. Decided by: {verdict.reason}"
    return reports.section(
        "Verdict",
        reports.Html(f"<p>{reports.badge(verdict.decision)} {reports.text(decided)}</p>"),
        reports.table(["rule", "measured", "wanted", "outcome"], [_rule(rule) for rule in verdict.rules]),
    )


def _rule(rule: Rule) -> list[object]:
    told: list[object] = [rule.name, rule.measured, rule.wanted]
    return [*(map(reports.muted, told) if rule.outcome == "skipped" else told), reports.badge(rule.outcome)]


def _worse(evaluation: Evaluation) -> reports.Html:
    found = evaluation.worse
    words = (
        "Figures whose paired difference is worse with its whole interval, and whatever goes wrong in more answers "
        "than before."
    )
    told = reports.listing(found) if found else reports.paragraph("Nothing.")
    return reports.section("What got worse", reports.paragraph(words), told)


def _bound(evaluation: Evaluation) -> reports.Html:
    """Return what the verdict stands on, and how anyone can form it again."""
    terms = evaluation.terms
    champion = terms.champion
    standing: dict[str, object] = {
        "candidate": terms.candidate,
        "references": ", ".join(f"{model}: {reference}" for model, reference in terms.references.items()),
        "champion": f"{champion.version} ({champion.finetuning_type})" if champion else "none",
        "beta": f"{terms.beta:g}",
        "seed": terms.config.seed,
        "chat template": evaluation.template_hash,
        **{f"weights of {stage}": found for stage, found in evaluation.adapter_hashes.items()},
        **evaluation.bonds,
        "seal": evaluation.seal,
    }
    entries = f"{len(standing)} entries, seal {evaluation.seal[:16]}"
    return reports.section(
        "What the verdict is bound to",
        reports.paragraph(
            "Hashes of all that it stands on; the seal is one over them, the figures and the verdict. Once the model "
            "is registered, python run.py evaluate --verify VERSION forms the verdict again from the stored scores, "
            "and says whether anything differs."
        ),
        reports.folded(entries, reports.table(["of", "value"], standing.items())),
    )
