"""Jobs that are stopped, orphaned, out of memory or cut off from something: how they end, and how they go on."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty
import pytest
from conftest import preference_rows, tiny_parameters, write_jsonl
from test_training import COMET

from preference_tuning import events, failures, fingerprint, jobs, machine_memory, starter
from preference_tuning.config import RunConfig, TrainingConfig
from preference_tuning.data import job as data_job
from preference_tuning.data import prepare
from preference_tuning.data.table import Dataset
from preference_tuning.errors import ConfigError, InterruptedJobError, PreferenceTuningError
from preference_tuning.models.source import locate
from preference_tuning.tracking.spool import read
from preference_tuning.training import job
from preference_tuning.training.job import Trained, TrainingJob, TrainingRecord

Run = tuple[RunConfig, Dataset]

# --- jobs in this file are forked, not started: their parent's way to start them is replaced ------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Run:
    folder = tmp_path_factory.mktemp("run")
    parameters = tiny_parameters(tiny_model, write_jsonl(folder / "rows.jsonl", preference_rows(40)))
    config = RunConfig.model_validate(parameters)
    dataset = prepare.prepare(config.data, data_job.fingerprints_of(config.data), folder / "data")
    assert dataset.manifest.train % 8, "the last batch is short"
    return config, dataset


def job_of(run: Run, out: Path, stage: str, settings: dict[str, Any] | None = None, **changes: Any) -> TrainingJob:
    config, dataset = run
    section = getattr(config, stage).model_copy(
        update={"num_train_epochs": 1.5, "per_device_eval_batch_size": 8, "eval_steps": 0.5, **(settings or {})}
    )
    extra = {"lora": config.lora} if stage == "sft" else {}
    return job.from_artifacts(
        stage, config.base_model, locate(config.base_model), dataset, out, COMET, **{stage: section}, **extra, **changes
    )  # type: ignore[arg-type]


def trained_in_forks(work: TrainingJob, fault: faulty.Fault | None = None) -> Trained:
    """Do what ``job.train`` does, with children that are forked and have a fault in them."""
    folder = (work.output_dir / "jobs" / f"{work.stage}-{fingerprint.of_value(work.identity())[:16]}").absolute()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "_run_child", lambda module, folder, *_: faulty.run(folder, fault))
        patch.setattr(jobs, "BACKOFF_SECONDS", 0.01)
        record = jobs.run(job.MODULE, folder, work, TrainingRecord)
    return Trained(record=record, adapter=folder / job.ADAPTER, evidence=folder / job.EVIDENCE)


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Both stages without a fault."""
    out = tmp_path_factory.mktemp("whole")
    sft = trained_in_forks(job_of(run, out, "sft"))
    return {"sft": sft, "dpo": trained_in_forks(job_of(run, out, "dpo", adapter=sft.adapter))}


def values(trained: Trained) -> list[tuple[int, dict[str, float]]]:
    # TRL counts tokens anew after a resume.
    counted = f"{trained.record.stage}/train/num_tokens", f"{trained.record.stage}/eval/num_tokens"
    points = read(trained.evidence / job.METRICS)
    return [(p.step, {k: v for k, v in p.metrics.items() if k not in counted}) for p in points]


# --- signals --------------------------------------------------------------------------------------------------------


def signal_in(module: str, name: str, number: int, twice: bool = False, at_call: int = 1) -> None:
    """Let this process get a signal while it is in a function, and note when; the job then seems to take for ever."""
    import importlib

    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    plain, calls = getattr(owner, last), [0]

    @functools.wraps(plain)
    def signalled(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at_call:
            (Path(sys.argv[1]).parent / "signalled").write_text(str(time.time()))
            for _ in range(1 + twice):
                os.kill(os.getpid(), number)
        return plain(*args, **kwargs)

    setattr(owner, last, signalled)


TRAINERS = "preference_tuning.training.trainers"
PHASES = {
    "loading": ("sft", "preference_tuning.models.loading", "load_base", 1),
    "tokenising": ("dpo", "preference_tuning.models.rows", "tokenise", 2),
    "the reference": ("dpo", "preference_tuning.models.scoring", "token_scores", 3),
    "a step": ("sft", TRAINERS, "_ByLength.training_step", 3),
    "an evaluation": ("dpo", TRAINERS, "_ByLength.prediction_step", 1),
    "the last evaluation": ("sft", TRAINERS, "_ByLength.prediction_step", 3),
    "writing a checkpoint": ("dpo", "transformers", "Trainer._save_optimizer_and_scheduler", 1),
    "saving the result": ("sft", "preference_tuning.models.weights", "save", 1),
}
"""Where a signal comes: the stage, and the call of a function. A job of 6 steps evaluates at 3 and 6, 2 batches each."""


@pytest.mark.faults
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_at_any_time_ends_a_job_at_once_and_it_goes_on_to_the_same_result(
    run: Run, whole: dict[str, Trained], tmp_path: Path, phase: str
) -> None:
    stage, *where, at_call = PHASES[phase]
    number = (signal.SIGTERM, signal.SIGINT)[list(PHASES).index(phase) % 2]
    extra = {"adapter": whole["sft"].adapter} if stage == "dpo" else {}
    work = job_of(run, tmp_path, stage, **extra)
    fault = functools.partial(signal_in, *where, number, twice="checkpoint" in phase, at_call=at_call)
    with pytest.raises(InterruptedJobError, match="the same command continues it"):
        trained_in_forks(work, fault)
    assert time.time() - float((tmp_path / "jobs" / "signalled").read_text()) < 5
    again = trained_in_forks(work)
    assert again.record.adapter_hash == whole[stage].record.adapter_hash
    assert values(again) == values(whole[stage]), "no gap, no duplicate, the same floats, no evaluation missing"
    assert bool(again.record.resumed_at) is (phase not in ("loading", "tokenising", "the reference"))


# --- orphans --------------------------------------------------------------------------------------------------------

STARTER = """
import sys
from preference_tuning.training import job
job.train(job.TrainingJob.model_validate_json(sys.argv[1]))
"""


@pytest.mark.faults
@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_whose_starter_is_killed_saves_and_ends_before_the_next_one_starts(
    run: Run, whole: dict[str, Trained], tmp_path: Path, capfd: pytest.CaptureFixture[str], processes: int
) -> None:
    work = job_of(run, tmp_path, "sft", training=TrainingConfig(processes=processes), settings={"save_steps": 1.0})
    folder = tmp_path / "jobs" / f"sft-{fingerprint.of_value(work.identity())[:16]}"
    parent = subprocess.Popen([sys.executable, "-c", STARTER, work.model_dump_json()], cwd=fingerprint.PACKAGE.parent)
    spool = folder / job.EVIDENCE / job.METRICS
    wait_until(lambda: spool.is_file() and "sft/train/loss" in spool.read_text(), parent)
    parent.kill()  # and it stays a zombie, as in a container whose first process buries nobody
    again = job.train(work)
    parent.wait()
    assert "is gone; waiting" in capfd.readouterr().err
    assert again.record.resumed_at != [], "the orphan's checkpoint was gone on from"
    if processes == 1:
        assert again.record.adapter_hash == whole["sft"].record.adapter_hash
        assert values(again) == values(whole["sft"])


def wait_until(condition: Callable[[], bool], parent: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 90
    while not condition():
        assert parent.poll() is None, "the job ended too soon"
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_lock_tells_a_living_starter_from_a_dead_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "ORPHAN_SECONDS", 0.3)
    mine = starter.mark()
    assert not starter.is_gone(mine)
    host, number, _ = mine.split()
    dead = subprocess.Popen(["true"])
    for gone in (f"{host} {number} 1", f"{host} {dead.pid} -" if dead.wait() == 0 else ""):
        assert starter.is_gone(gone)
    for unknown in ("", f"another-{host} {dead.pid} 1"):
        assert not starter.is_gone(unknown)
    path = tmp_path / "lock"
    with starter.lock(path, tmp_path):
        with pytest.raises(PreferenceTuningError, match="already running in"), starter.lock(path, tmp_path):
            pass
        path.write_text(f"{host} {dead.pid} 1\n")
        with pytest.raises(PreferenceTuningError, match="lost what started it"), starter.lock(path, tmp_path):
            pass


# --- memory ---------------------------------------------------------------------------------------------------------


def out_of_memory_above(answers: int) -> None:
    """Let passes over more than ``answers`` sequences find no memory."""
    from preference_tuning.models import scoring

    plain = scoring.token_scores

    def token_scores(model: Any, rows: Any, dtype: Any) -> Any:
        import torch

        if rows.answers > answers:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(model, rows, dtype)

    scoring.token_scores = token_scores


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_out_of_memory_cuts_batches_and_changes_no_number(
    run: Run, whole: dict[str, Trained], tmp_path: Path, capfd: pytest.CaptureFixture[str], stage: str
) -> None:
    """Batches of 8, the last of 6: in 4 pieces of at most 2 pairs, or 2 pieces of 4 rows; the try needs 4 answers."""
    extra = {"adapter": whole["sft"].adapter} if stage == "dpo" else {}
    cut = trained_in_forks(job_of(run, tmp_path, stage, **extra), functools.partial(out_of_memory_above, 4))
    parts = {"sft": 2, "dpo": 4}[stage]
    assert (cut.record.parts, cut.record.micro_batch) == (parts, 8 // parts)
    told = [event for event in cut.record.events if event.kind == "out_of_memory"]
    assert [event.facts["parts"] for event in told] == [2, 4][: len(told)] and told[-1].facts["parts"] == parts
    assert "the effective batch stays" in capfd.readouterr().err
    assert_alike(cut, whole[stage])


def assert_alike(cut: Trained, whole: Trained) -> None:
    """Every loss to 1e-5, and every metric of every step and evaluation."""
    assert cut.record.identity == whole.record.identity
    assert (cut.record.steps, cut.record.tokens) == (whole.record.steps, whole.record.tokens)
    for (step, found), (same, expected) in zip(values(cut), values(whole), strict=True):
        assert (step, found.keys()) == (same, expected.keys())
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=1e-5, rel=0 if name.endswith("loss") else 1e-4), name


@pytest.mark.faults
def test_pieces_in_several_processes_change_no_number(run: Run, whole: dict[str, Trained], tmp_path: Path) -> None:
    """Torchrun, two processes with batches of 4: shares in pieces of a row, some without any."""
    half = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    two = {"training": TrainingConfig(processes=2), "adapter": whole["sft"].adapter, "settings": half}
    cut = job.train(job_of(run, tmp_path, "dpo", **two).model_copy(update={"parts": 4}))
    assert (cut.record.processes, cut.record.parts, cut.record.micro_batch) == (2, 4, 1)
    for (step, found), (same, expected) in zip(values(cut), values(whole["dpo"]), strict=True):
        assert step == same
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=1e-5, rel=1e-4), f"{name} at step {step}"


@pytest.mark.faults
def test_a_row_that_does_not_fit_is_an_error_that_says_what_would(
    run: Run, whole: dict[str, Trained], tmp_path: Path
) -> None:
    with pytest.raises(PreferenceTuningError) as caught:
        trained_in_forks(job_of(run, tmp_path, "sft"), long_rows_do_not_fit)
    expected = (
        r"SFT ran out of memory; a row of (\d+) tokens went through; one of up to (\d+) tokens did not; .* has .* GiB; "
        r"a piece is one row already; what would fit: base_model\.max_seq_length: \1, or "
        r"sft\.gradient_checkpointing: true, or base_model\.load_in_4bit: true \(CUDA\)"
    )
    assert (found := re.fullmatch(expected, str(caught.value))), caught.value
    assert int(found[1]) < int(found[2])
    (folder,) = (tmp_path / "jobs").glob("sft-*")
    assert [event.facts["parts"] for event in events.read(folder)] == [2, 4, 8]


def long_rows_do_not_fit() -> None:
    """Let training find no memory for rows of a length that some have."""
    import torch

    from preference_tuning.training import sharing, trainers

    plain = trainers.AnswerSFTTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
        if self.model.training and inputs[sharing.LONGEST] > 34:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, model, inputs, **kwargs)

    trainers.AnswerSFTTrainer.compute_loss = compute_loss
