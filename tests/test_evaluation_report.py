"""The evaluation's report, its screen and its card: all that was measured, nothing unescaped, numbers as they are."""

import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_reports import ATTACKS

from preference_tuning.config import BaseModelConfig, EvaluationConfig, GateConfig
from preference_tuning.evaluation import catalogue, deciding, differences, general, report, screen, statistics
from preference_tuning.evaluation.deciding import Judgement, Measured, Reigning, Terms
from preference_tuning.evaluation.gate import Rule, Verdict
from preference_tuning.evaluation.generation import KINDS, Answer
from preference_tuning.evaluation.job import Evaluation, Sample
from preference_tuning.evaluation.judge import Calibration, Cost, Judged, Opinion
from preference_tuning.evaluation.statistics import Figure
from preference_tuning.registry import card

PAIRS = 60
REFERENCES = {"sft": "base", "dpo": "sft", "champion": "base"}


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here is about the last digits of an interval."""
    monkeypatch.setattr(statistics, "RESAMPLES", 200)


def scored(names: tuple[str, ...]) -> dict[str, Any]:
    """Scores of models each of which is further from the base than the one before."""
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
    return found


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


def evaluated(
    everything: bool = True, text: str = "words", version: str = "v1", changed: dict[str, Figure] | None = None
) -> tuple[Evaluation, Measured]:
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
    figures[terms.candidate] |= changed or {}
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


def words(html: str) -> str:
    """What a reader sees."""
    return " ".join(unescape(re.sub(r"<[^>]+>", "", html)).split())


def test_the_report_has_every_figure_as_it_is_in_the_json() -> None:
    evaluation, measured = evaluated()
    Path("/tmp/spec/out.html").write_text(report.render(evaluation, measured))
    print("\n".join(screen.render(evaluation)))
