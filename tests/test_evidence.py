"""Only finished, healthy, measured work is registered: each kind of unfinished result is tried."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from preference_tuning import fingerprint, jobs
from preference_tuning.config import RegistryConfig
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.evaluation.job import Evaluation
from preference_tuning.models.source import ModelSource
from preference_tuning.registry import evidence, result
from preference_tuning.tracking.spool import Point, Spool
from preference_tuning.training.job import ReferenceProof, TrainingRecord

STEPS = 6
SOURCE = ModelSource(kind="hub", location="org/m", fingerprint="base")
MANIFEST: Any = SimpleNamespace(split_fingerprint="data")


def record(stage: str, adapter_hash: str, sft_hash: str | None = None) -> TrainingRecord:
    proof = sft_hash and ReferenceProof(
        sft_adapter_hash=sft_hash, data_fingerprint="data", template_hash="t", pairs=1, loss=0.69, expected_loss=0.69,
        largest_difference=0, tolerance=1e-3,
    )  # fmt: skip
    identity = {stage: {"logging_steps": 2}, "data_fingerprint": "data", "base_model_fingerprint": "base"}
    return TrainingRecord.model_validate(
        {
            "stage": stage, "job": f"{stage}-1", "identity": {**identity, "adapter_hash": sft_hash},
            "adapter_hash": adapter_hash, "steps": STEPS, "max_steps": STEPS, "epochs": 1, "seconds": 1, "rows": 1,
            "held_out_rows": 1, "dropped_rows": 0, "cut_rows": 0, "tokens": 1, "train_loss": 1, "metrics": {},
            "trainable_parameters": 1, "processes": 1, "engine": "e", "engine_reason": "", "backend": "transformers",
            "template_hash": "t", "resumed_at": [], "versions": {}, "reference": proof or None,
            "compute": {"device": "cpu", "dtype": "float32", "attention": "sdpa", "threads": 1, "reason": ""},
        }
    )  # fmt: skip


class Folders:
    """What a finished DPO run leaves, in a folder."""

    def __init__(self, root: Path) -> None:
        self.adapter, self.evaluation = root / "adapter", root / "evaluation"
        self.training = {"sft": root / "sft", "dpo": root / "dpo"}
        for folder in (self.adapter, self.evaluation, *self.training.values()):
            folder.mkdir()
        (self.adapter / "adapter_config.json").write_text("{}")
        self.write_weights(torch.ones(4, 4))
        spool = Spool(self.evaluation / "metrics.jsonl", resume_at=-1)
        spool.append(Point(step=0, metrics={"evaluation/sft/nll/chosen": 1.0}))
        for stage, folder in self.training.items():
            spool = Spool(folder / "metrics.jsonl")
            for step in (2, 4, 6):
                spool.append(Point(step=step, metrics={f"{stage}/train/loss": 1.0}))
            spool.close()

    @property
    def weights(self) -> Path:
        return self.adapter / "adapter_model.safetensors"

    def write_weights(self, weight: torch.Tensor) -> None:
        """Write weights, and evidence of a run that ended with them."""
        save_file({"w": weight, "v": torch.zeros(2)}, self.weights)
        tuned = fingerprint.of_directory(self.adapter)
        for made in (record("sft", "sft-hash"), record("dpo", tuned, "sft-hash")):
            jobs.write_json(self.training[made.stage] / "record.json", made.model_dump(mode="json"))
        evaluation = Evaluation.model_validate(
            {
                "pairs": 1, "dropped": 0, "data_fingerprint": "data", "base_model_fingerprint": "base",
                "template_hash": "t", "adapter_hashes": {"sft": "sft-hash", "dpo": tuned},
                "models": {"sft": {"nll/chosen": {"value": 1.0, "low": 0.9, "high": 1.1}}},
                "terms": {"candidate": "dpo", "references": {"dpo": "sft"}, "beta": 0.1, "config": {}, "champion": None},
                "bonds": {}, "seal": "s",
                "samples": [], "worse": [], "verdict": {"decision": "promote", "candidate": "dpo", "rules": []}, "seconds": 1,
            }
        )  # fmt: skip
        jobs.write_json(self.evaluation / "evaluation.json", evaluation.model_dump(mode="json"))

    def change(self, path: Path, **values: Any) -> None:
        kept = json.loads(path.read_text())
        for name, value in values.items():
            *parents, last = name.split("__")
            inner = kept
            for parent in parents:
                inner = inner[parent]
            inner[last] = value
        jobs.write_json(path, kept)

    def of(self, stage: str, **values: Any) -> None:
        self.change(self.training[stage] / "record.json", **values)

    def cut_spool(self, stage: str, keep: Callable[[list[str]], list[str]]) -> None:
        path = self.training[stage] / "metrics.jsonl"
        path.write_text("".join(keep(path.read_text().splitlines(keepends=True))))

    def problems(self) -> list[str]:
        return evidence.problems(("sft", "dpo"), self.adapter, self.training, self.evaluation, SOURCE, MANIFEST)


@pytest.fixture
def finished(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


UNFINISHED: dict[str, tuple[Callable[[Folders], Any], str]] = {
    "SFT stopped early": (lambda f: f.of("sft", steps=4), "SFT ended at step 4 of 6"),
    "DPO stopped early": (lambda f: f.of("dpo", steps=5), "DPO ended at step 5 of 6"),
    "no record of SFT": (lambda f: (f.training["sft"] / "record.json").unlink(), "SFT has no record of finished work"),
    "no record of DPO": (lambda f: (f.training["dpo"] / "record.json").unlink(), "DPO has no record of finished work"),
    "no DPO at all": (lambda f: f.training.pop("dpo"), "DPO has no record of finished work"),
    "weights cut off": (lambda f: f.weights.write_bytes(f.weights.read_bytes()[:-8]), "cannot be read"),
    "no weights": (lambda f: f.weights.unlink(), "adapter_model.safetensors is missing"),
    "NaN": (lambda f: f.write_weights(torch.full((4, 4), torch.nan)), "w has values that are not finite"),
    "NaN, bfloat16": (
        lambda f: f.write_weights(torch.full((4, 4), torch.nan, dtype=torch.bfloat16)), "w has values that are not",
    ),
    "absurd weight, bfloat16": (
        lambda f: f.write_weights(torch.full((4, 4), -2.3e10, dtype=torch.bfloat16)), "w reaches 2.3e+10",
    ),
    "absurd weight": (lambda f: f.write_weights(torch.full((4, 4), -2.3e10)), "w reaches 2.3e+10"),
    "other weights": (
        lambda f: save_file({**load_file(f.weights), "v": torch.ones(2)}, f.weights), "not those that DPO wrote",
    ),
    "DPO of another SFT": (lambda f: f.of("dpo", identity__adapter_hash="other"), "did not start from this SFT"),
    "DPO without proof": (lambda f: f.of("dpo", reference=None), "DPO has no proof of its reference"),
    "proof of another SFT": (lambda f: f.of("dpo", reference__sft_adapter_hash="other"), "that of another SFT result"),
    "other data": (lambda f: f.of("sft", identity__data_fingerprint="other"), "SFT was trained on other data"),
    "other base": (lambda f: f.of("dpo", identity__base_model_fingerprint="other"), "DPO was trained from another base"),
    "a gap": (lambda f: f.cut_spool("dpo", lambda lines: lines[:1] + lines[2:]), "metrics of DPO have a gap at step 4"),
    "no end": (lambda f: f.cut_spool("sft", lambda lines: lines[:-1]), "metrics of SFT have a gap at step 6"),
    "a step twice": (lambda f: f.cut_spool("sft", lambda lines: [*lines, lines[-1]]), "hold a step twice"),
    "no metrics": (lambda f: (f.training["sft"] / "metrics.jsonl").unlink(), "the metrics of SFT are missing"),
    "no evaluation": (lambda f: shutil.rmtree(f.evaluation), "the evaluation has no summary"),
    "evaluation of other weights": (
        lambda f: f.change(f.evaluation / "evaluation.json", adapter_hashes__dpo="other"), "is of other weights",
    ),
    "evaluation of SFT alone": (
        lambda f: f.change(f.evaluation / "evaluation.json", adapter_hashes={"sft": "sft-hash"}), "is of other weights",
    ),
    "evaluation on other data": (
        lambda f: f.change(f.evaluation / "evaluation.json", data_fingerprint="other"), "the evaluation is on other data",
    ),
    "evaluation's metrics twice": (
        lambda f: (f.evaluation / "metrics.jsonl").write_text((f.evaluation / "metrics.jsonl").read_text() * 2),
        "are not the figures of its summary, each once",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "told"), UNFINISHED.values(), ids=UNFINISHED)
def test_what_is_not_finished_is_never_registered(
    finished: Folders, tmp_path: Path, damage: Callable[[Folders], Any], told: str
) -> None:
    assert finished.problems() == []
    damage(finished)
    assert [line for line in finished.problems() if told in line] != []
    outcome: Any = SimpleNamespace(
        finetuning_type="dpo", adapter=finished.adapter, training=finished.training, evaluation=finished.evaluation,
        source=SOURCE, dataset=SimpleNamespace(manifest=MANIFEST),
    )  # fmt: skip
    registry = tmp_path / "registry"
    with pytest.raises(PreferenceTuningError, match="nothing is registered: "):
        result.register(outcome, RegistryConfig(folder=str(registry)))
    assert not registry.exists()


def test_a_forced_resume_may_change_how_often_is_logged(finished: Folders) -> None:
    finished.of("sft", identity__sft__logging_steps=1, forced={"step": 4, "from": "sft-2", "changed": []})
    assert finished.problems() == ["the metrics of SFT have a gap at step 5 of 6"]
    finished.of("sft", forced={"step": 5, "from": "sft-2", "changed": []})
    assert finished.problems() == []
