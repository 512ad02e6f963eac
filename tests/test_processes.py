"""Several processes for one training job: real torchrun, two gloo processes, the same losses as one."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import preference_rows, tiny_parameters, write_jsonl

from preference_tuning import fingerprint, jobs
from preference_tuning.config import BaseModelConfig, RunConfig, TrackingConfig, TrainingConfig
from preference_tuning.data import job as data_job
from preference_tuning.data import prepare
from preference_tuning.data.table import Dataset
from preference_tuning.errors import ConfigError, InterruptedJobError, PreferenceTuningError
from preference_tuning.models import devices
from preference_tuning.models.source import locate
from preference_tuning.tracking.comet import CometRun
from preference_tuning.tracking.spool import read
from preference_tuning.training import job
from preference_tuning.training.job import Trained, TrainingJob

COMET = CometRun(config=TrackingConfig(mode="off"), experiment_key="0" * 32, folder=Path("comet"))
Run = tuple[RunConfig, Dataset]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Run:
    folder = tmp_path_factory.mktemp("run")
    data = write_jsonl(folder / "rows.jsonl", preference_rows(52))
    config = RunConfig.model_validate(tiny_parameters(tiny_model, data))
    dataset = prepare.prepare(config.data, data_job.fingerprints_of(config.data), folder / "data")
    return config, dataset


def job_of(run: Run, out: Path, stage: str, processes: int, **changes: Any) -> TrainingJob:
    """Return a job whose steps see 8 rows, in two batches of 4, whatever the number of processes."""
    config, dataset = run
    settings = {
        "per_device_train_batch_size": 4 // processes,
        "per_device_eval_batch_size": 4 // processes,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "eval_steps": 0.5,
        **changes.pop("settings", {}),
    }
    section = getattr(config, stage).model_copy(update=settings)
    extra = {"lora": config.lora} if stage == "sft" else {}
    training = TrainingConfig(processes=processes, **changes.pop("training", {}))
    return job.from_artifacts(
        stage, config.base_model, locate(config.base_model), dataset, out, COMET, training, **{stage: section}, **extra, **changes
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sft(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Trained]:
    out = tmp_path_factory.mktemp("sft")
    return {processes: job.train(job_of(run, out, "sft", processes)) for processes in (1, 2)}


@pytest.fixture(scope="module")
def dpo(run: Run, sft: dict[int, Trained], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Trained]:
    out = tmp_path_factory.mktemp("dpo")
    return {processes: job.train(job_of(run, out, "dpo", processes, adapter=sft[1].adapter)) for processes in (1, 2)}


def points(trained: Trained) -> list[tuple[int, dict[str, float]]]:
    return [(point.step, point.metrics) for point in read(trained.evidence / job.METRICS)]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_two_processes_do_what_one_does(run: Run, request: pytest.FixtureRequest, stage: str) -> None:
    """Loss, gradient norm, learning rate, tokens, rewards and every metric of the evaluations, at every step."""
    trained: dict[int, Trained] = request.getfixturevalue(stage)
    one, two = trained[1].record, trained[2].record
    assert (one.processes, two.processes) == (1, 2)
    assert one.rows % 4 == 1, "the last batch has one row: a process has nothing to do in it"
    assert one.held_out_rows % 4 == 3, "shares of the last evaluated batch differ"
    assert (one.steps, one.tokens) == (two.steps, two.tokens)
    assert len(points(trained[1])) == one.steps + 2
    for (step, alone), (same, together) in zip(points(trained[1]), points(trained[2]), strict=True):
        assert step == same
        for name, value in alone.items():
            assert together[name] == pytest.approx(value, abs=1e-5, rel=1e-4), f"{name} at step {step}"
            if name.endswith("loss"):
                assert together[name] == pytest.approx(value, abs=1e-5), f"{name} at step {step}"
        assert alone.keys() == together.keys()
