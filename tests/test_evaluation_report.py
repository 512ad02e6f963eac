"""The evaluation's report, its screen and its card: all that was measured, nothing unescaped, numbers as they are."""

import math
import re
from collections.abc import Iterator
from html import escape, unescape
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_reports import ATTACKS

from preference_tuning import reports
from preference_tuning.config import BaseModelConfig, EvaluationConfig, GateConfig
from preference_tuning.evaluation import catalogue, deciding, differences, general, report, screen, statistics
from preference_tuning.evaluation.deciding import Judgement, Measured, Reigning, Terms
from preference_tuning.evaluation.gate import Rule, Verdict
from preference_tuning.evaluation.generation import KINDS, Answer
from preference_tuning.evaluation.job import Evaluation, Sample
from preference_tuning.evaluation.judge import Calibration, Cost, Judged, Opinion, measures
from preference_tuning.evaluation.statistics import Figure
from preference_tuning.models.source import ModelSource
from preference_tuning.registry import card
from preference_tuning.reports.markdown import plain

PAIRS = 60
REFERENCES = {"sft": "base", "dpo": "sft", "champion": "base"}


@pytest.fixture(scope="module", autouse=True)
def fewer_resamples() -> Iterator[None]:
    """No test here is about the last digits of an interval."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 200)
        patch.setattr(measures, "RESAMPLES", 20)
        yield


def scored(names: tuple[str, ...]) -> dict[str, Any]:
    """Scores of models each of which is further from the base than the one before; columns by name, as they are stored."""
    rng = np.random.default_rng(3)
    found: dict[str, Any] = {
        "content": np.arange(PAIRS).astype(str), "prompt": np.arange(PAIRS).astype(str),
        "chosen_tokens": rng.integers(8, 40, PAIRS).astype(float),
        "rejected_tokens": rng.integers(8, 40, PAIRS).astype(float),
    }  # fmt: skip
    for side in ("chosen", "rejected"):
        found[f"base/{side}"] = -2.0 * found[f"{side}_tokens"] + rng.normal(0, 4, PAIRS)
    for far, name in enumerate(names[1:], start=1):
        found[f"{name}/chosen"] = found["base/chosen"] + far * rng.normal(1, 2, PAIRS)
        found[f"{name}/rejected"] = found["base/rejected"] - far * rng.normal(1, 2, PAIRS)
        found |= {f"{name}/{side}_kl": far * rng.gamma(2, 1, PAIRS) for side in ("chosen", "rejected")}
    return dict(sorted(found.items()))


def answered(names: tuple[str, ...], text: str, count: int = 8) -> list[Answer]:
    """Answers of which those of later models loop more."""
    return [
        Answer(
            model=name, prompt=number, kind=kind, text=f"{text} {name} {number} {kind}", finished=bool(number % 3),
            tokens=[*range(9 - far), *[5] * 4 * far], leaked=False,
        )
        for far, name in enumerate(names) for number in range(count) for kind in KINDS
    ]  # fmt: skip


def judged(wins: int, of: int = 20) -> Judged:
    opinions = [
        Opinion(group=str(i), length_difference=i % 5 - 2, asked=True, candidate_first="A" if i < wins else "B", candidate_second="B" if i < wins else "A")
        for i in range(of)
    ]  # fmt: skip
    return Judged(opinions=opinions, cost=Cost(requests=2 * of, prompt_tokens=4000, completion_tokens=280))


def evaluated(everything: bool = True, text: str = "words", version: str = "v1") -> tuple[Evaluation, Measured]:
    """An evaluation with every optional part, or with none; figures and verdict are those of the real rules."""
    names = ("base", "sft", "dpo", "champion") if everything else ("base", "sft")
    references = {name: REFERENCES[name] for name in names[1:]}
    scores = scored(names)
    if everything:
        scores[deciding.UNSEEN] = np.ones(PAIRS)
    calibration = Calibration(
        agreement=Figure(value=0.8, low=0.7, high=0.9), injection_shift=Figure.exact(0.0), pairs=50,
        cost=Cost(requests=140, prompt_tokens=9000, completion_tokens=900),
    )  # fmt: skip
    measured = Measured(
        scores=scores,
        answers=answered(names, text) if everything else [],
        general={general.TOKENS: np.full(9, 20.0), **{n: np.linspace(-70, -60 - 3 * i, 9) for i, n in enumerate(names)}}
        if everything else None,
        judgement=Judgement(calibration=calibration, against_parent=judged(12), against_champion=judged(9)) if everything else None,
        tasks={n: {"lm_eval/own/acc": Figure(value=0.5, low=0.4, high=0.6)} for n in names} if everything else {},
    )  # fmt: skip
    terms = Terms(
        candidate=names[2] if everything else "sft",
        references=references,
        beta=0.5,
        config=EvaluationConfig(samples=8 if everything else 0, gate=GateConfig(max_kl=9)),
        champion=Reigning(version=version, finetuning_type="dpo", same_base_model=True) if everything else None,
    )
    figures, verdict = deciding.decide(measured, terms)
    samples = [
        Sample(
            prompt=f"{text}?", chosen=text,
            answers=dict.fromkeys(names, text), sampled=dict.fromkeys(names, f"{text} sampled"),
        )
    ] * terms.config.samples  # fmt: skip
    evaluation = Evaluation(
        pairs=PAIRS, dropped=0, data_fingerprint="d" * 64, base_model_fingerprint="b" * 64, template_hash="t" * 64,
        adapter_hashes={"sft": "a" * 64}, terms=terms, models=figures, worse=differences.worse(figures, terms),
        samples=samples, verdict=verdict, notes=[calibration.reason] if everything else [],
        bonds={"code": "c" * 64, "terms": "e" * 64}, seal="5ea1" * 16, seconds=12.3,
    )  # fmt: skip
    return evaluation, measured


@pytest.fixture(scope="module")
def full(fewer_resamples: None) -> tuple[Evaluation, Measured]:
    return evaluated()


def words(html: str) -> str:
    """What a reader sees."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(r"-?\d[\d,]*\.?\d*", re.sub(r"(?<=\d), ", " ", text))]


def ends(figure: Figure) -> list[float]:
    return [figure.value] if figure.low == figure.high else [figure.value, figure.low, figure.high]


PAIRED = ("_change", "_vs_champion", "_p")


def test_every_figure_is_in_the_report_as_it_is_in_the_json(full: tuple[Evaluation, Measured]) -> None:
    evaluation, measured = full
    html = report.render(evaluation, measured)
    stored = Evaluation.model_validate_json(evaluation.model_dump_json())
    shown = [n for n in catalogue.measured(stored.models) if not n.endswith(PAIRED) or n.startswith("judge/")]
    assert len(shown) > 40
    for name in shown:
        (row,) = re.findall(rf"<small>{name}</small></td>(.*?)</tr>", html)
        expected = [end for figures in stored.models.values() if name in figures for end in ends(figures[name])]
        assert numbers(words(row)) == pytest.approx(expected, rel=5e-3, abs=6e-4), name
    seen = words(html)
    for difference in differences.between(stored.models, stored.terms.references):
        assert difference.nothing or catalogue.in_line(difference.metric, difference.figure) in seen
    for told in (stored.verdict.reason, *stored.worse, stored.seal, *stored.bonds.values(), *stored.notes):
        assert told in seen
    assert all(" ".join((rule.name, rule.measured, rule.wanted, rule.outcome)) in seen for rule in stored.verdict.rules)
    assert html.count("<article>") == 8
    assert seen.count("words sampled") == 8 * 4
    assert "champion v1" in seen


def test_without_its_optional_parts_the_report_says_nothing_of_them() -> None:
    evaluation, measured = evaluated(everything=False)
    html = report.render(evaluation, measured)
    seen = words(html) + "\n".join(screen.render(evaluation)) + str(evaluation.metadata())
    for part in ("win rate", "judge", "Answers", "General", "lm-eval", "champion v1", "<article>"):
        assert part not in seen
    assert "What got worse" in seen
    assert evaluation.worse == []
    assert "Nothing." in seen
    assert "got worse  nothing" in seen


def test_nothing_from_data_models_or_registry_is_markup(full: tuple[Evaluation, Measured]) -> None:
    attack = " ".join(ATTACKS)
    evaluation, measured = evaluated(text=attack, version=attack)
    rules = [Rule(name=attack, measured=attack, wanted=attack, outcome="skipped"), *evaluation.verdict.rules]
    verdict = evaluation.verdict.model_copy(update={"rules": rules})
    evaluation = evaluation.model_copy(update={"verdict": verdict, "worse": [attack], "notes": [attack]})
    html = report.render(evaluation, measured)
    assert html.count(escape(attack)) > 8 * 10
    for tag in ("<script", "<img", "<iframe", "<a ", "onload=alert(1)>", "onerror=alert(1)>"):
        assert tag not in html
    assert html.count("<svg ") == report.render(*full).count("<svg "), "one that is not ours"
    assert html.count("class='muted'>&lt;script") == 3, "a skipped rule is grey"


def test_long_answers_are_whole_but_folded() -> None:
    html = reports.quotation("dpo", "<" * 5000)
    assert html.count("&lt;") == 5000
    assert html.index("4,300 more characters") > html.index("&lt;" * 700)
    assert "nothing" in reports.quotation("dpo", " \n")


def test_scores_that_are_no_numbers_are_told_and_drawn_around(full: tuple[Evaluation, Measured]) -> None:
    evaluation, measured = full
    scores = {**measured.scores, "dpo/chosen": np.full(PAIRS, math.nan)}
    figures, verdict = deciding.decide(Measured(**{**vars(measured), "scores": scores}), evaluation.terms)
    worse = differences.worse(figures, evaluation.terms)
    assert "loss on chosen answers: the difference from sft is not a number" in worse
    broken = evaluation.model_copy(update={"models": figures, "verdict": verdict, "worse": worse})
    html = report.render(broken, Measured(**{**vars(measured), "scores": scores}))
    assert verdict.decision == "hold"
    assert "not a number" in words(html)
    assert not re.search(r"=['\"]nan", html)
    assert all(math.isfinite(value) for value in broken.metadata().values() if isinstance(value, float))


# --- what got worse -------------------------------------------------------------------------------------------------


def figure(low: float, value: float, high: float) -> Figure:
    return Figure(low=low, value=value, high=high)


@pytest.mark.parametrize(
    ("dpo", "sentences"),
    [
        ({}, []),
        ({"nll/chosen_change": figure(-0.1, 0.1, 0.3)}, []),
        ({"nll/chosen_change": figure(-0.3, -0.2, -0.1)}, []),
        (
            {"nll/chosen_change": figure(0.1, 0.2, 0.3)},
            ["loss on chosen answers rose from 2.000 (sft) to 2.200: by 0.200 [0.100, 0.300] nats a token"],
        ),
        (
            {
                "likelihood/accuracy_change": figure(-0.3, -0.2, -0.1),
                "likelihood/accuracy_change_p": Figure.exact(0.004),
            },
            [
                "accuracy of the likelihood fell from 0.800 (sft) to 0.600: by -0.200 [-0.300, -0.100], McNemar's p 0.004"
            ],
        ),
        ({"likelihood/accuracy_change": figure(0.1, 0.2, 0.3)}, []),
        (
            {"rewards/accuracies_vs_champion": figure(-0.3, -0.2, -0.1)},
            ["reward accuracy against the base is lower than that of champion v1: by -0.200 [-0.300, -0.100]"],
        ),
        (
            {"generation/empty_change": figure(-0.1, 0.1, 0.3)},
            ["empty answers rose from 0.000 (sft) to 0.100: by 0.100 [-0.100, 0.300], which may be chance"],
        ),
        ({"generation/empty_change": figure(-0.3, -0.1, 0.1), "generation/length_change": figure(5, 9, 12)}, []),
        (
            {"general/nll_change": figure(math.nan, math.nan, math.nan)},
            ["loss on general text: the difference from sft is not a number"],
        ),
        (
            {"rewards/accuracies": figure(0.3, 0.4, 0.45)},
            ["reward accuracy against sft is 0.400 [0.300, 0.450], below the 0.5 of an equal model"],
        ),
        ({"judge/win_rate": figure(0.1, 0.2, 0.3), "judge/calibrated": Figure.exact(0)}, []),
        (
            {"judge/win_rate": figure(0.1, 0.2, 0.3), "judge/calibrated": Figure.exact(1)},
            ["the judge's win rate against sft is 0.200 [0.100, 0.300], below the 0.5 of an equal model"],
        ),
    ],
)
def test_what_got_worse(full: tuple[Evaluation, Measured], dpo: dict[str, Figure], sentences: list[str]) -> None:
    before = {"nll/chosen": 2.0, "likelihood/accuracy": 0.8, "generation/empty": 0.0}
    after = {"nll/chosen": 2.2, "likelihood/accuracy": 0.6, "generation/empty": 0.1}
    models = {
        name: {m: Figure.exact(v) for m, v in values.items()} for name, values in (("sft", before), ("dpo", after))
    }
    # What became of SFT is no matter of the candidate.
    models["sft"]["nll/chosen_change"] = figure(1, 2, 3)
    models["dpo"] |= dpo
    assert differences.worse(models, full[0].terms) == sentences


# --- the other two places -------------------------------------------------------------------------------------------


def test_the_terminal_shows_one_screen(full: tuple[Evaluation, Measured]) -> None:
    lines = screen.render(full[0])
    sample = Sample(
        prompt="why? " * 90, chosen="", answers=dict.fromkeys(full[0].models, "\x1b[2J\n" * 90), sampled={}
    )  # fmt: skip
    rules = [Rule(name="a rule " * 30, measured="much " * 30, wanted="more", outcome="failed")]
    verdict = Verdict(decision="hold", candidate="dpo", rules=rules)
    wide = {
        model: figures | {name: figure(-120.5, 345.25, 1234.5) for name in screen.ROWS}
        for model, figures in full[0].models.items()
    }
    worse = [f"sentence {n} " * 9 for n in range(9)]
    most = full[0].model_copy(update={"samples": [sample], "verdict": verdict, "worse": worse, "models": wide})
    crowded = screen.render(most)
    for shown in (lines, crowded):
        assert len(shown) <= 45 - 8, "the summary of a run has eight lines more"
        assert max(map(len, shown)) <= 120
        assert all(line.isprintable() for line in shown)
    assert lines[0].split() == ["held-out", "pairs", "base", "sft", "dpo", "champion"]
    loss = next(line for line in lines if line.startswith("loss on chosen"))
    assert numbers(loss) == pytest.approx(
        [end for figures in full[0].models.values() for end in ends(figures["nll/chosen"])], abs=6e-4
    )
    assert f"verdict    {full[0].verdict.decision}: " in "\n".join(lines)
    assert any("and 4 more, see the report" in line for line in crowded)


def test_the_dashboard_shows_main_figures_with_their_ends(full: tuple[Evaluation, Measured]) -> None:
    evaluation = full[0]
    shown = evaluation.metadata()
    accuracy = evaluation.models["dpo"]["rewards/accuracies"]
    assert [shown[f"dpo/rewards/accuracies{end}"] for end in ("", "/low", "/high")] == ends(accuracy)
    assert (shown["decision"], shown["champion"], shown["seal"]) == ("hold", "v1", evaluation.seal)
    assert "dpo/generation/empty/low" not in shown, "it is no estimate"
    assert len(shown) < 130
    assert not [name for name in shown if "logps" in name or name.endswith("_p")]


def test_the_card_tells_verdict_figures_and_what_got_worse(full: tuple[Evaluation, Measured]) -> None:
    evaluation = full[0].model_copy(deep=True)
    for figures in evaluation.models.values():
        figures["lm_eval/a|b/acc"] = Figure.exact(0.25)
    manifest: Any = SimpleNamespace(train=9, held_out=9, source="rows.jsonl", fingerprint="f", split_fingerprint="s")
    told = card.Card(
        name="tuned", adapter=True, base_model=BaseModelConfig(source="m"), licence=None, languages=[], datasets=[],
        source=ModelSource(kind="directory", location="m", fingerprint="b"), manifest=manifest, records={},
        evaluation=evaluation, verdict=evaluation.verdict, software={}, links={}, charts=[],
    )  # fmt: skip
    text = card.render(told)
    assert f"Verdict: **hold** ({plain(evaluation.verdict.reason)})." in text
    assert evaluation.seal in text
    assert "| figure | base | sft | dpo | champion v1 |\n|---|---|---|---|---|" in text
    assert all(f"- {plain(sentence)}" in text for sentence in evaluation.worse)
    assert "rose" in text
    table = [line for line in text.partition("## Figures")[2].partition("##")[0].splitlines() if line.startswith("|")]
    assert len(table) < 20, "readable"
    assert {len(re.split(r"(?<!\\)\|", line)) for line in table} == {7}
    (row,) = [line for line in table if "(`nll/chosen`)" in line]
    assert plain(evaluation.models["dpo"]["nll/chosen"]) in row
