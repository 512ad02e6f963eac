"""The data report, as a page and as one screen of text."""

import json
from collections.abc import Iterable, Sequence

import pyarrow.parquet as pq

from preference_tuning import reports
from preference_tuning.config import Problems
from preference_tuning.data import table
from preference_tuning.data.ledger import line_of, meaning
from preference_tuning.data.shown import Piece, Shown
from preference_tuning.data.table import Dataset, Finding, LengthBias, Manifest, ProblemCount, SourceSummary

NAMED = 16
"""Topics or sources that are drawn."""


def render(dataset: Dataset, of_run: Iterable[Finding] = ()) -> str:
    """Return the report of a canonical dataset as HTML; ``of_run`` is what a run makes of it."""
    manifest = dataset.manifest
    parts = [
        _facts(manifest),
        reports.section("Findings", _findings([*manifest.findings, *of_run])),
        reports.section("How the rows were read", _sources(manifest)),
        reports.section("Problems of rows", _problems(manifest.problems, _looked_for(manifest))),
    ]
    if manifest.sft_source:
        parts.append(reports.section("Problems of the SFT answers", _problems(manifest.sft_problems, ())))
    parts += [
        reports.section("Lengths", _lengths(dataset)),
        *_names(manifest),
        reports.section("Rows as the model reads them", _shown(dataset)),
    ]
    return reports.page("Preference data", f"{manifest.source} · fingerprint {manifest.fingerprint[:16]}", *parts)


def text(manifest: Manifest, of_run: Iterable[Finding] = ()) -> str:
    """Return the report as one screen of text."""
    lines = [f"  {_read(source)}" for source in (*manifest.sources, manifest.sft_source) if source]
    lines.append("")
    lines += [f"  {name:22} {value}" for name, value in _figures(manifest).items()]
    for title, problems in (("rows", manifest.problems), ("SFT answers", manifest.sft_problems)):
        if problems:
            lines += ["", f"  problems of {title}"]
            lines += [f"  {_shortened(line_of(problem))} -> {problem.policy}" for problem in problems]
    found = [*manifest.findings, *of_run]
    if found:
        lines += ["", *(f"  {finding.level}: {finding.message}" for finding in found)]
    return "\n".join(lines)


def _shortened(line: str, width: int = 160) -> str:
    flat = line.replace("\n", " ")
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def _read(source: SourceSummary) -> str:
    split = f", held out: its split {source.test_split}" if source.test_split else ""
    return f"{source.name}: {source.rows:,} rows as {source.recognised}{split}"


def _figures(manifest: Manifest) -> dict[str, str]:
    pairs = manifest.train + manifest.held_out
    how = (
        "the source's own split" if manifest.held_out_share is None else f"{manifest.held_out / pairs:.1%} of the pairs"
    )
    figures = {
        "rows in": f"{manifest.rows_in:,}",
        "training pairs": f"{manifest.train:,}",
        "held-out pairs": f"{manifest.held_out:,} ({how})",
        "different prompts": f"{manifest.prompts:,}",
        "left out": f"{manifest.dropped:,}",
        "chosen is longer": bias_in_words(manifest.length_bias),
    }
    if manifest.sft is not None:
        figures["SFT answers"] = f"{manifest.sft:,}"
    limit = f" (dpo.max_length {manifest.max_length:,})" if manifest.max_length else ""
    for name, length in manifest.lengths.items():
        figures[f"{name}, {manifest.unit}"] = (
            f"median {length.median:,.0f}, 95 % below {length.p95:,.0f}, longest {length.longest:,}{limit}"
        )
    figures["fingerprint"] = manifest.fingerprint[:16]
    return figures


def bias_in_words(bias: LengthBias) -> str:
    """Return the length bias in a few words."""
    return f"{bias.chosen_longer:.0%} of the time, d = {bias.effect:+.2f}"


def _facts(manifest: Manifest) -> reports.Html:
    bias = manifest.length_bias
    figures: dict[str, object] = {
        "rows in": f"{manifest.rows_in:,}",
        "training pairs": f"{manifest.train:,}",
        "held-out pairs": f"{manifest.held_out:,}",
        "different prompts": f"{manifest.prompts:,}",
        "left out": f"{manifest.dropped:,}",
        "chosen is longer": f"{bias.chosen_longer:.0%}",
        "effect of length (d)": f"{bias.effect:+.2f}",
    }
    if manifest.sft is not None:
        figures["SFT answers"] = f"{manifest.sft:,}"
    return reports.facts(figures)


def _findings(findings: Sequence[Finding]) -> reports.Html:
    if not findings:
        return reports.paragraph("None.")
    return reports.table(
        ["", "finding", "what it says"], [[reports.badge(f.level), f.name, f.message] for f in findings]
    )


def _sources(manifest: Manifest) -> reports.Html:
    rows = [
        [s.name, f"{s.rows:,}", f"{s.pairs:,}", f"{s.not_sampled:,}", s.recognised, s.test_split or "none"]
        for s in (*manifest.sources, manifest.sft_source)
        if s
    ]
    return reports.table(["source", "rows", "pairs", "not sampled", "recognised as", "own held-out split"], rows)


def _problems(problems: Sequence[ProblemCount], looked_for: Iterable[str]) -> reports.Html:
    absent = ", ".join(name for name in looked_for if name not in {problem.problem for problem in problems})
    nothing = reports.paragraph(f"Looked for and not found: {absent}.") if absent else reports.Html("")
    if not problems:
        return reports.Html(reports.paragraph("None: every row is in the dataset.") + nothing)
    rows = [
        [p.problem, f"{p.rows:,}", p.policy, meaning(p.problem), _places(p), p.details[0] if p.details else ""]
        for p in problems
    ]
    table_ = reports.table(["problem", "rows", "policy", "meaning", "where", "the first of them"], rows)
    return reports.Html(table_ + nothing)


def _looked_for(manifest: Manifest) -> list[str]:
    """Return the problems that every row was checked for."""
    in_tokens = {"identical_after_cut", "long_prompt", "answer_cut", "no_tools"}
    blind = in_tokens if manifest.max_length is None else set()
    blind |= {"near_duplicate"} if manifest.near_duplicate_prompts is None else set()
    return [name for name in Problems.model_fields if name not in blind]


def _places(problem: ProblemCount) -> str:
    rest = problem.rows - len(problem.places)
    return ", ".join(problem.places) + (f" and {rest:,} more" if rest > 0 else "")


def _lengths(dataset: Dataset) -> reports.Html:
    manifest = dataset.manifest
    stored = pq.read_table(dataset.folder / table.LENGTHS)
    sides = {name: stored[name].to_pylist() for name in ("prompt", "chosen", "rejected")}
    answers = {name: sides[name] for name in ("chosen", "rejected")}
    whole = [p + max(c, r) for p, c, r in zip(*sides.values(), strict=True)]
    limits = {"dpo.max_length": manifest.max_length} if manifest.max_length else {}
    bound = {"max_prompt_length": manifest.max_prompt_length} if manifest.max_prompt_length else {}
    figures = reports.charts(
        reports.histogram("Prompt", {"prompt": sides["prompt"]}, manifest.unit, marks=bound),
        reports.histogram("Answers", answers, manifest.unit),
        reports.histogram("Prompt and longer answer", {"row": whole}, manifest.unit, marks=limits),
    )
    pairs = manifest.train + manifest.held_out
    sample = "all pairs" if manifest.sampled >= pairs else f"a sample of {manifest.sampled:,} of {pairs:,} pairs"
    cut = (
        f"Lengths in {manifest.unit}, over {sample}. Over all pairs: {manifest.answers_cut:,} with an answer cut by "
        f"dpo.max_length, {manifest.prompts_cut:,} with a prompt cut; chosen is longer "
        f"{bias_in_words(manifest.length_bias)}, with a mean of {manifest.length_bias.mean_chosen:,.0f} characters "
        f"against {manifest.length_bias.mean_rejected:,.0f}."
    )
    if manifest.max_length is None:
        cut = f"Lengths in characters, over {sample}: give a run config to count tokens against its limits."
    return reports.Html(figures + reports.paragraph(cut))


def _names(manifest: Manifest) -> list[reports.Html]:
    found = {"topic": manifest.topics, "source": manifest.by_source}
    figures = [
        reports.bars(f"Pairs by {name}", dict(list(counts.items())[:NAMED]))
        for name, counts in found.items()
        if len(counts) > 1
    ]
    return [reports.section("Topics and sources", reports.charts(*figures))] if figures else []


def _shown(dataset: Dataset) -> reports.Html:
    rows = [Shown.model_validate(row) for row in json.loads((dataset.folder / table.SHOWN).read_text(encoding="utf-8"))]
    key = reports.key(
        {"prompt": "read", "chosen": "trained: chosen", "rejected": "trained: rejected", "cut": "cut off"}
    )
    return reports.Html(key + "".join(_row(row) for row in rows))


def _row(row: Shown) -> reports.Html:
    counts = ", ".join(f"{name} {count} tokens" for name, count in (row.tokens or {}).items())
    title = f"{row.source} row {row.row}, {row.split.replace('_', ' ')}" + (f": {counts}" if counts else "")
    return reports.marked_text(title, [(piece.text, _classes(piece)) for piece in row.pieces])


def _classes(piece: Piece) -> str:
    return f"{piece.kind} special" if piece.special else piece.kind
