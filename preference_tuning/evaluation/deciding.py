"""From what was measured to the verdict: pure functions of stored files, so that anyone can do it again.

The evaluation's job and `run.py evaluate --verify` call the same ``decide``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from preference_tuning import fingerprint
from preference_tuning.config import EvaluationConfig
from preference_tuning.evaluation import gate, general, generation, judge, metrics, scores, statistics
from preference_tuning.evaluation.gate import Kind, Rule, Verdict
from preference_tuning.evaluation.generation import Answer
from preference_tuning.evaluation.judge import Calibration, Judged
from preference_tuning.evaluation.metrics import BASE, CHAMPION, Figures
from preference_tuning.evaluation.statistics import Figure

SCORES, ANSWERS, GENERAL, JUDGED, TASKS, PROBES = (
    "scores.parquet", "answers.parquet", "general.parquet", "judged.json", "lm_eval.json", "probes.json",
)  # fmt: skip
FILES = (SCORES, ANSWERS, GENERAL, JUDGED, TASKS, PROBES)
"""What was measured, each tied to the verdict by its hash; no figure comes from the probes (``evaluation.probes``)."""
UNSEEN = "new_to_champion"
"""Column of the score table: whether the champion was not trained on the pair or on another of its prompt."""


class Reigning(BaseModel):
    """The champion that a candidate has to beat."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    finetuning_type: str
    same_base_model: bool
    """Only then can it be scored beside the others."""


class Terms(BaseModel):
    """What the verdict depends on beside what was measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    candidate: str
    references: dict[str, str]
    """The reference of each tuned model; that of the candidate is its parent."""
    beta: float
    config: EvaluationConfig
    champion: Reigning | None

    @property
    def reigning(self) -> str | None:
        """The version of the champion, if there is one."""
        return self.champion.version if self.champion else None


class Judgement(BaseModel):
    """What a judge said of the candidate's answers, and how far it is to be believed."""

    calibration: Calibration
    against_parent: Judged
    against_champion: Judged | None = None


@dataclass(frozen=True)
class Measured:
    """Everything that was measured, as it lies in the evidence folder."""

    scores: dict[str, Any]
    answers: list[Answer]
    general: dict[str, Any] | None
    judgement: Judgement | None
    tasks: dict[str, Figures]

    @classmethod
    def read(cls, folder: Path) -> "Measured":
        """Return what lies in an evidence folder.

        Raises:
            OSError: the score table is missing.
            ValueError: a file is damaged.
        """
        return cls(
            scores=scores.read(folder / SCORES),
            answers=generation.read(folder / ANSWERS) if (folder / ANSWERS).is_file() else [],
            general=general.read(folder / GENERAL) if (folder / GENERAL).is_file() else None,
            judgement=_judgement(folder / JUDGED),
            tasks=_tasks(folder / TASKS),
        )


def decide(measured: Measured, terms: Terms) -> tuple[dict[str, Figures], Verdict]:
    """Return the figures of every model, and the verdict on the candidate."""
    figures = of_scores(measured, terms)
    for figures_of in (of_answers, of_general, of_tasks, of_judge):
        for model, found in figures_of(measured, terms).items():
            if model in figures:
                figures[model] |= found
    table = _table(measured)
    parent = terms.references[terms.candidate]
    evidence = gate.Evidence(
        candidate=terms.candidate,
        parent=parent,
        scores=table,
        figures=figures,
        measured=_expected(terms.config),
        champion=_champion(measured, terms),
    )
    rules = [*gate.own_rules(evidence, terms.config), _champion_rule(evidence, terms)]
    return figures, gate.verdict(terms.candidate, rules)


def of_scores(measured: Measured, terms: Terms) -> dict[str, Figures]:
    """Return what the score table says of every model, in the order in which one came of the other."""
    found = metrics.figures(_table(measured), terms.references, terms.beta, terms.config.seed)
    return {model: found[model] for model in (BASE, *terms.references) if model in found}


def of_answers(measured: Measured, terms: Terms) -> dict[str, Figures]:
    """Return ``generation/*`` of every model that answered."""
    models = dict.fromkeys(answer.model for answer in measured.answers)
    return {model: _of_answers(measured.answers, model, terms, terms.config.seed) for model in models}


def of_general(measured: Measured, terms: Terms) -> dict[str, Figures]:
    """Return ``general/*`` of every model, where there is general text."""
    text, seed = measured.general, terms.config.seed
    if text is None:
        return {}
    models = (BASE, *terms.references)
    return {model: general.figures(text, model, terms.references.get(model), seed) for model in models}


def of_judge(measured: Measured, terms: Terms) -> dict[str, Figures]:
    """Return ``judge/*`` of the candidate, where there is a judge."""
    if measured.judgement is None:
        return {}
    return {terms.candidate: _of_judge(measured.judgement, terms.config.seed)}


def of_tasks(measured: Measured, terms: Terms) -> dict[str, Figures]:
    """Return ``lm_eval/*`` of every model, where there are tasks."""
    return dict(measured.tasks)


def _table(measured: Measured) -> dict[str, Any]:
    """Return the columns of the score table that figures are made of."""
    return {name: column for name, column in measured.scores.items() if name not in ("content", UNSEEN)}


def bound(folder: Path, terms: Terms, identity: dict[str, Any]) -> dict[str, str]:
    """Return the hashes that tie a verdict to what it stands on.

    Args:
        folder: with the files that were measured.
        terms: of the verdict.
        identity: of the evaluation: data split, models, base model, code, by name.
    """
    files = {f"files/{name}": fingerprint.of_file(folder / name) for name in FILES if (folder / name).is_file()}
    named = {name: value if isinstance(value, str) else fingerprint.of_value(value) for name, value in identity.items()}
    return {**named, "terms": fingerprint.of_value(terms.model_dump(mode="json")), **files}


def seal(bonds: dict[str, str], figures: dict[str, Figures], verdict: Verdict) -> str:
    """Return one hash over a verdict, its figures and all that they stand on."""
    told = {model: {name: repr(figure) for name, figure in found.items()} for model, found in figures.items()}
    return fingerprint.of_value([bonds, told, verdict.model_dump(mode="json")])


def _expected(config: EvaluationConfig) -> frozenset[Kind]:
    """Return what has to be there beside log-probabilities; what is missing then fails its rule."""
    kinds: set[Kind] = {"kl"}
    kinds |= {"generation"} if config.samples else set()
    kinds |= {"judge"} if config.judge is not None else set()
    return frozenset(kinds)


def _champion(measured: Measured, terms: Terms) -> gate.Champion | None:
    if terms.champion is None or not terms.champion.same_base_model:
        return None
    everything = np.ones(len(measured.scores["prompt"]))
    unseen = measured.scores.get(UNSEEN, everything).astype(bool)
    return gate.Champion(terms.champion.version, terms.champion.finetuning_type, unseen)


def _champion_rule(evidence: gate.Evidence, terms: Terms) -> Rule:
    if terms.champion is None:
        return gate.first_model()
    if evidence.champion is None:
        measured = f"{terms.champion.version} has another base model"
        return Rule(name="champion", measured=measured, wanted="the same base model", outcome="undecided")
    return gate.against_champion(evidence, terms.config)


def _of_answers(answers: list[Answer], model: str, terms: Terms, seed: int) -> Figures:
    """Return ``generation/*`` of a model: means over its answers, and over their differences from others' answers.

    Intervals are over the prompts.
    """
    own = _in_order(answers, model)
    if not own:
        return {}
    columns = generation.values(own)
    others = {"change": terms.references.get(model), "vs_champion": None if model in (BASE, CHAMPION) else CHAMPION}
    for suffix, other in others.items():
        if theirs := _in_order(answers, other):
            paired = generation.values(theirs)
            columns |= {f"{name}_{suffix}": columns[name] - paired[name] for name in paired}
    means = statistics.means(columns, np.array([str(answer.prompt) for answer in own]), seed)
    distinct = {f"distinct_{n}": Figure.exact(generation.distinct(own, n)) for n in (1, 2)}
    return {f"generation/{name}": figure for name, figure in {**means, **distinct}.items()}


def _in_order(answers: list[Answer], model: str | None) -> list[Answer]:
    return sorted((a for a in answers if a.model == model), key=lambda answer: (answer.prompt, answer.kind))


def _of_judge(judgement: Judgement, seed: int) -> Figures:
    against = judgement.against_champion
    if against is None:
        return judge.figures(judgement.against_parent, judgement.calibration, seed)
    found = judge.figures(judgement.against_parent, judgement.calibration, seed, beside=against.cost)
    win_rate = judge.figures(against, judgement.calibration, seed)["judge/win_rate"]
    return {**found, "judge/win_rate_vs_champion": win_rate}


def _judgement(path: Path) -> Judgement | None:
    return Judgement.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def _tasks(path: Path) -> dict[str, Figures]:
    if not path.is_file():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {m: {name: Figure.model_validate(f) for name, f in figures.items()} for m, figures in stored.items()}
