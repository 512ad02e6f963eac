"""Whether a verdict in the registry still follows from what lies beside it: every file, every bond, every figure.

Nothing is loaded or scored: the verdict is decided again from the stored scores of each pair.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from preference_tuning import fingerprint
from preference_tuning.data import sides
from preference_tuning.data.table import MANIFEST, SPLIT, Manifest
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.evaluation import deciding, scores
from preference_tuning.evaluation import job as evaluation_job
from preference_tuning.evaluation.deciding import Measured
from preference_tuning.evaluation.gate import Verdict
from preference_tuning.evaluation.job import Evaluation
from preference_tuning.evaluation.metrics import Figures
from preference_tuning.evaluation.statistics import Figure
from preference_tuning.registry import evidence
from preference_tuning.registry.folder import DECISION, Decision, FolderRegistry, Version, differences, weights_hash
from preference_tuning.training.job import TrainingRecord

PRECISE = 1e-9
"""Relative: processors add in different orders, which moves the last digits of a figure."""


@dataclass
class Verification:
    """What was looked at, each with what is wrong with it, and what a reader should know beside."""

    title: str
    version: Version
    model: Path
    """Its folder."""
    evaluation: Path
    """The evidence of the verdict."""
    checks: list[tuple[str, list[str]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong."""
        return [problem for _, problems in self.checks for problem in problems]

    def document(self) -> dict[str, Any]:
        """Return it for a program to read."""
        checks = [{"name": name, "problems": problems} for name, problems in self.checks]
        told = {"version": self.version.id, "decision": self.version.verdict.decision, "title": self.title}
        return {**told, "holds": not self.problems, "checks": checks, "notes": self.notes}

    def __str__(self) -> str:
        lines = [self.title]
        for name, problems in self.checks:
            lines += [f"  changed  {name}: {problem}" for problem in problems] or [f"  ok       {name}"]
        lines += [f"  note     {note}" for note in self.notes]
        wrong = [name for name, problems in self.checks if problems]
        return "\n".join([*lines, f"does not hold: {', '.join(wrong)}" if wrong else "holds"])


@dataclass(frozen=True)
class _Decided:
    """A verdict with everything that it stands on, as it lies in the registry."""

    version: Version
    model: Path
    training: dict[str, TrainingRecord]
    evaluation: Path
    told: Evaluation
    """What lies in the folder ``evaluation``."""
    data: Path
    config: dict[str, Any]
    verdict: Verdict
    seal: str
    files: list[str]
    """What is wrong with the files themselves."""

    @cached_property
    def again(self) -> tuple[dict[str, Figures], Verdict]:
        """The figures and the verdict that follow from what was measured."""
        return deciding.decide(Measured.read(self.evaluation), self.told.terms)


def verify(registry: FolderRegistry, name: str) -> Verification:
    """Look whether the verdict on a version holds; that of the champion is the one which promoted it.

    Args:
        registry: that the version is in.
        name: as for ``FolderRegistry.find``.

    Raises:
        ConfigError: there is no such version.
        PreferenceTuningError: its manifest cannot be read.
    """
    version = registry.find(name)
    if version is None:
        known = ", ".join(registry.ids()) or "none yet"
        raise ConfigError(f"registry: no version {name!r} of {registry.name!r} in {registry.place}; there are: {known}")
    pointer = registry.champion()
    seal = pointer.seal if pointer and pointer.version == version else None
    try:
        decided = _read(registry, version, seal)
    except (OSError, ValueError) as error:
        raise PreferenceTuningError(f"registry: what is stored of {version} cannot be read: {_line(error)}") from None
    verdict = decided.verdict
    title = f"version {version} of {registry.name}, verdict {verdict.decision}: {verdict.reason}"
    files = [("files of the version", decided.files)]
    found = Verification(title, decided.version, decided.model, decided.evaluation, files)
    for what, look in _LOOKS.items():
        try:
            found.checks.append((what, list(look(decided))))
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            found.checks.append((what, [f"it cannot be looked at: {_line(error)}"]))
    if decided.told.bonds.get("code") != fingerprint.of_sources(evaluation_job.MODULE):
        found.notes.append("the code that scores and decides has changed since; this is what today's code decides")
    return found


def _read(registry: FolderRegistry, id: str, seal: str | None) -> _Decided:
    version, folder = registry.version(id), registry.path(id)
    files, config, verdict = registry.verify(id), version.config, version.verdict
    own = version.metrics.get("seal")
    if seal is not None and seal != own:
        folder = registry.decision(id, seal)
        if not (folder / DECISION).is_file():
            raise PreferenceTuningError(f"registry: the decision that promoted {id} is missing: {folder}")
        decision = Decision.model_validate_json((folder / DECISION).read_text(encoding="utf-8"))
        files = [*files, *differences(folder / "evidence", decision.evidence_files)]
        config, verdict, own = decision.config, decision.verdict, decision.seal
    return _Decided(
        version=version,
        model=registry.path(id) / "model",
        training=evidence.records({stage: folder / "evidence" / stage for stage in ("sft", "dpo")}),
        evaluation=folder / "evidence" / "evaluation",
        told=evaluation_job.load_summary(folder / "evidence" / "evaluation"),
        data=folder / "evidence" / "data",
        config=config,
        verdict=verdict,
        seal=seal or str(own),
        files=files,
    )


def _measured_files(decided: _Decided) -> Iterator[str]:
    """Yield which files of the evaluation are not those that were decided on."""
    bound = {
        name.removeprefix("files/"): value for name, value in decided.told.bonds.items() if name.startswith("files/")
    }
    for name, value in bound.items():
        path = decided.evaluation / name
        if not path.is_file():
            yield f"{name} is missing"
        elif fingerprint.of_file(path) != value:
            yield f"{name} is not what was decided on"
    for name in deciding.FILES:
        if name not in bound and (decided.evaluation / name).is_file():
            yield f"{name} was not there"


def _terms(decided: _Decided) -> Iterator[str]:
    if decided.told.bonds.get("terms") != fingerprint.of_value(decided.told.terms.model_dump(mode="json")):
        yield "they are not those that were decided on"


def _model(decided: _Decided) -> Iterator[str]:
    """Yield how the model is not the one that was measured, or its training not what made it."""
    if decided.told.bonds.get("adapter_hashes") != fingerprint.of_value(decided.told.adapter_hashes):
        yield "the hashes of the weights that were measured"
    if weights_hash(decided.model) != decided.told.adapter_hashes[decided.told.terms.candidate]:
        yield "its weights are not those that were measured"
    for stage, value in decided.told.adapter_hashes.items():
        if decided.training[stage].adapter_hash != value:
            yield f"the record of {stage.upper()} is that of other weights"


def _data(decided: _Decided) -> Iterator[str]:
    manifest = Manifest.model_validate_json((decided.data / MANIFEST).read_text(encoding="utf-8"))
    if not decided.told.bonds.get("data_fingerprint") == decided.told.data_fingerprint == manifest.split_fingerprint:
        yield "the dataset is another one"
    if decided.told.bonds.get("split") != sides.fingerprint_of(decided.data / SPLIT):
        yield "its split is another one"
    scored = scores.read(decided.evaluation / deciding.SCORES)["content"]
    if not set(scored) <= sides.held_out(decided.data / SPLIT):
        yield "pairs were scored that are not held out"
    for stage in decided.told.adapter_hashes:
        if decided.training[stage].identity["data_fingerprint"] != manifest.split_fingerprint:
            yield f"{stage.upper()} was trained on another one"


def _base_model(decided: _Decided) -> Iterator[str]:
    used = {record.identity["base_model_fingerprint"] for record in decided.training.values()}
    used |= {decided.told.base_model_fingerprint, decided.version.base_model["fingerprint"]}
    if used != {decided.told.bonds.get("base_model_fingerprint")}:
        yield "it is another one"


def _config(decided: _Decided) -> Iterator[str]:
    """Yield which sections of the config are not those of the evaluation or of the training."""
    config, bonds, evaluation = decided.config, decided.told.bonds, decided.told
    if not bonds.get("config") == fingerprint.of_value(config["evaluation"]) == _hash_of(evaluation.terms.config):
        yield "evaluation"
    if bonds.get("base_model") != fingerprint.of_value(config["base_model"]):
        yield "base_model"
    if bonds.get("beta") != fingerprint.of_value(config["dpo"]["beta"]):
        yield "dpo.beta"
    for stage, record in decided.training.items():
        sections = (stage, "lora") if stage == "sft" else (stage,)
        yield from (name for name in sections if record.identity[name] != config[name])
        if fingerprint.of_value(record.identity)[:16] not in record.job:
            yield f"the record of {stage.upper()} has other settings than its job"


def _figures(decided: _Decided) -> Iterator[str]:
    found, evaluation = decided.again[0], decided.told
    names = {(model, name) for figures in (found, evaluation.models) for model, f in figures.items() for name in f}
    for model, name in sorted(names):
        told, again = evaluation.models.get(model, {}).get(name), found.get(model, {}).get(name)
        if told is None or again is None or not _alike(told, again):
            yield f"{model} {name} is {told}, and from what was measured {again}"


def _verdict(decided: _Decided) -> Iterator[str]:
    told, again = decided.told.verdict, decided.again[1]
    if decided.verdict != told:
        yield "the manifest has another one than the evaluation"
    if told.decision != again.decision:
        yield f"it is {told.decision}, and from what was measured {again.decision}: {again.reason}"
    rules = [{rule.name: rule.outcome for rule in verdict.rules} for verdict in (told, again)]
    for name in dict.fromkeys([*rules[0], *rules[1]]):
        if rules[0].get(name) != rules[1].get(name):
            yield f"{name}: {rules[0].get(name)}, and from what was measured {rules[1].get(name)}"


def _seal(decided: _Decided) -> Iterator[str]:
    if deciding.seal(decided.told.bonds, decided.told.models, decided.told.verdict) != decided.told.seal:
        yield "it is not that of these figures, this verdict and these bonds"
    if decided.seal != decided.told.seal:
        yield "the registry has another one than the evaluation"


_LOOKS: dict[str, Callable[[_Decided], Iterator[str]]] = {
    "what was measured": _measured_files,
    "terms of the verdict": _terms,
    "model and training records": _model,
    "data and split": _data,
    "base model": _base_model,
    "config": _config,
    "figures, computed again": _figures,
    "verdict, decided again": _verdict,
    "seal": _seal,
}


def _alike(one: Figure, other: Figure) -> bool:
    def near(a: float, b: float) -> bool:
        return a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=PRECISE, abs_tol=PRECISE)

    return near(one.value, other.value) and near(one.low, other.low) and near(one.high, other.high)


def _hash_of(section: Any) -> str:
    return fingerprint.of_value(section.model_dump(mode="json"))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
