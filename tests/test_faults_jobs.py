"""Jobs that are stopped, orphaned, out of memory or cut off from something: how they end, and how they go on."""

import errno
import functools
import itertools
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
from pydantic import BaseModel
from test_processes import in_every_step

from preference_tuning import errors, events, failures, fingerprint, jobs
from preference_tuning.config import RunConfig, TrainingConfig
from preference_tuning.data import job as data_job
from preference_tuning.data import prepare
from preference_tuning.data.table import Dataset
from preference_tuning.errors import ConfigError, InterruptedJobError, PreferenceTuningError
from preference_tuning.jobs import machine_memory, starter, stopping
from preference_tuning.models.source import locate
from preference_tuning.tracking.spool import read
from preference_tuning.training import checkpoints, job
from preference_tuning.training.job import Trained, TrainingJob, TrainingRecord

Run = tuple[RunConfig, Dataset]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Run:
    folder = tmp_path_factory.mktemp("run")
    rows = preference_rows(40)
    rows[3]["chosen"] += " It is long." * 3
    parameters = tiny_parameters(tiny_model, write_jsonl(folder / "rows.jsonl", rows))
    # One thread each: tests share the cores.
    parameters["base_model"] |= {"threads": 1, "attention": "sdpa"}
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
        stage, config.base_model, locate(config.base_model), dataset, out, **{stage: section}, **extra, **changes
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
from preference_tuning.training import checkpoints, job
job.train(job.TrainingJob.model_validate_json(sys.argv[1]))
"""


@pytest.mark.faults
@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_whose_starter_is_killed_saves_and_ends_before_the_next_one_starts(
    run: Run,
    whole: dict[str, Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    processes: int,
) -> None:
    work = job_of(run, tmp_path, "sft", training=TrainingConfig(processes=processes))
    folder, steps = tmp_path / "jobs" / f"sft-{fingerprint.of_value(work.identity())[:16]}", tmp_path / "steps"
    code = f"open({str(steps)!r}, 'a').write(f'{{os.getpid()}} {{time.time()}}\\n'); time.sleep(0.6)"
    with in_every_step(tmp_path / "patch", monkeypatch, code):
        parent = subprocess.Popen(
            [sys.executable, "-c", STARTER, work.model_dump_json()], cwd=fingerprint.PACKAGE.parent
        )
        wait_until(lambda: steps.is_file() and len(steps.read_text().splitlines()) > processes, parent)
        parent.kill()
        # It stays a zombie, as in a container whose first process buries nobody.
        os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
        if processes == 2:
            with starter.lock(folder / jobs.LOCK, folder):
                told = json.loads((folder / jobs.ERROR).read_text())
            assert told["exit_code"] == InterruptedJobError.exit_code
            assert checkpoints.newest_good(folder / "checkpoints")[0] is not None
        else:
            again = job.train(work)
            assert again.record.resumed_at != [], "it went on from the orphan's checkpoint"
            assert again.record.adapter_hash == whole["sft"].record.adapter_hash
            assert values(again) == values(whole["sft"])
    parent.wait()
    assert "is gone; waiting" in capfd.readouterr().err
    lines = [line.split() for line in steps.read_text().splitlines()]
    assert len({process for process, _ in lines}) == 2, "the orphan and the next, or the two of one job"
    if processes == 1:
        changes = sum(one != other for (one, _), (other, _) in itertools.pairwise(lines))
        assert changes == 1, "the next one stepped only after the last step of the orphan"


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
    assert [event.facts["parts"] for event in told] == {"sft": [2], "dpo": [2, 4]}[stage]
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
    (folder,) = (path for path in (tmp_path / "jobs").glob("sft-*") if path.is_dir())
    happened = [event for event in events.read(folder) if event.kind == "out_of_memory"]
    assert [event.facts["parts"] for event in happened] == [2, 4, 8]


def long_rows_do_not_fit() -> None:
    """Let training find no memory for rows of a length that some have."""
    import torch

    from preference_tuning.training import sharing, trainers

    plain = trainers.AnswerSFTTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
        if self.model.training and inputs[sharing.LONGEST] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, model, inputs, **kwargs)

    trainers.AnswerSFTTrainer.compute_loss = compute_loss


@pytest.mark.faults
def test_pieces_are_not_made_where_they_do_not_help_and_are_kept(run: Run, tmp_path: Path) -> None:
    def told(work: TrainingJob, **facts: Any) -> str:
        failure = failures.Failure(exit_code=1, message="no memory", kind="out_of_memory", facts=facts)
        with pytest.raises(PreferenceTuningError) as caught:
            jobs._in_smaller_parts(tmp_path, work, failure)
        return str(caught.value)

    work = job_of(run, tmp_path, "dpo", adapter=tmp_path)
    assert "it is the model that does not fit" in told(work, rows=0)
    coupled = job_of(run, tmp_path, "dpo", {"loss_type": ("sigmoid", "sft")}, adapter=tmp_path)
    assert "dpo.loss_type: sft needs its batch whole, so it is not cut" in told(coupled, rows=8, longest=40)
    assert "dpo.max_length: 30, or dpo.gradient_checkpointing" in told(work, rows=1, longest=40, passed=30)
    assert "a smaller dpo.max_length" in told(work.model_copy(update={"parts": 8}))
    assert events.read(tmp_path) == []

    assert jobs._parts(tmp_path, work) == 1
    jobs.write_json(tmp_path / jobs.JOB, work.model_copy(update={"parts": 4}).model_dump(mode="json"))
    assert jobs._parts(tmp_path, work) == 4, "an interrupted job goes on in the pieces that it had come to"
    assert jobs._parts(tmp_path, coupled) == 1
    assert work.model_copy(update={"parts": 4}).identity() == work.identity()


# --- retries --------------------------------------------------------------------------------------------------------


class AnsweredError(Exception):
    """An error of a client that carries the answer of a server."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the server answers {status}")
        self.response = type("Response", (), {"status_code": status})()


def raised_from(cause: BaseException) -> Exception:
    try:
        raise RuntimeError("loading failed") from cause
    except RuntimeError as error:
        return error


def instance(name: str) -> BaseException:
    """Return an error of the class with this full name; of a package that is not installed, one that is called so."""
    import importlib

    module, _, kind = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), kind)
    except ModuleNotFoundError:
        found = type(kind, (Exception,), {"__module__": module})
    error: BaseException = found.__new__(found)
    return error


def test_the_table_of_what_is_tried_again() -> None:
    for name in failures.TRANSIENT:
        for error in (instance(name), raised_from(instance(name))):
            assert failures.kind_of(error) == "transient", name
    for number in failures.ERRNOS:
        assert failures.kind_of(OSError(number, os.strerror(number))) == "transient", number
    for status in failures.STATUS_CODES:
        assert failures.kind_of(AnsweredError(status)) == "transient", status
    assert failures.kind_of(errors.TransientError("another process is gone")) == "transient"

    for name in failures.OUT_OF_MEMORY:
        assert failures.kind_of(instance(name)) == "out_of_memory", name
    for text in failures.OUT_OF_MEMORY_MESSAGES:
        assert failures.kind_of(RuntimeError(f"{text}: tried 2 GiB")) == "out_of_memory", text
    assert failures.kind_of(OSError(errno.ENOMEM, "")) == "out_of_memory"

    final: list[BaseException] = [
        *(instance(name) for name in failures.FINAL),
        *(raised_from(instance(name)) for name in failures.FINAL),
        *(kind("") for kind in (ConfigError, errors.DataError, errors.DivergedError, InterruptedJobError)),
        *(raised_from(kind("")) for kind in (ConfigError, errors.DataError)),
        *(OSError(number, "") for number in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EACCES, errno.EIO)),
        *(AnsweredError(status) for status in (400, 401, 403, 404)),
        *(kind("") for kind in (ValueError, TypeError, KeyError, AssertionError, RuntimeError, KeyboardInterrupt)),
        PreferenceTuningError("what the user is told, raised while a connection failed"),
    ]
    final[-1].__cause__ = ConnectionError()
    for error in final:
        assert failures.kind_of(error) == "final", repr(error)


def fails(error: Exception, times: int, folder: Path) -> None:
    """Let loading the model fail, in the first children of a job."""
    from preference_tuning.models import loading

    plain = loading.load_base

    def load_base(*args: Any, **kwargs: Any) -> Any:
        path = folder / "children"
        with path.open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        if len(path.read_text().splitlines()) <= times:
            raise error
        return plain(*args, **kwargs)

    loading.load_base = load_base


@pytest.mark.faults
def test_what_passes_by_itself_is_tried_again_in_fresh_processes(
    run: Run, whole: dict[str, Trained], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fault = functools.partial(fails, ConnectionResetError("reset by peer"), 2, tmp_path)
    trained = trained_in_forks(job_of(run, tmp_path, "sft"), fault)
    assert len(set((tmp_path / "children").read_text().split())) == 3
    assert trained.record.adapter_hash == whole["sft"].record.adapter_hash
    told = [(event.kind, event.facts["attempt"], event.facts["seconds"]) for event in trained.record.events]
    assert told == [("retried", 2, 0.01), ("retried", 3, 0.02)]
    assert "ConnectionResetError: reset by peer" in capfd.readouterr().err


@pytest.mark.faults
@pytest.mark.parametrize(
    ("error", "kind", "children"),
    [
        (ConfigError("the template does not fit"), ConfigError, 1),
        (OSError(errno.ENOSPC, "No space left on device"), PreferenceTuningError, 1),
        (TimeoutError("no answer"), PreferenceTuningError, 2),
    ],
    ids=["config", "disk full", "timeout"],
)
def test_what_does_not_pass_is_tried_no_more_than_it_may(
    run: Run, tmp_path: Path, error: Exception, kind: type[PreferenceTuningError], children: int
) -> None:
    work = job_of(run, tmp_path, "sft", training=TrainingConfig(retries=1))
    with pytest.raises(kind, match=str(error).rpartition("] ")[2]) as caught:
        trained_in_forks(work, functools.partial(fails, error, 9, tmp_path))
    assert type(caught.value) is kind
    assert len((tmp_path / "children").read_text().split()) == children


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (75, InterruptedJobError, "could not write why"),
        (4, errors.DivergedError, "could not write why"),
        (1, PreferenceTuningError, "could not write why"),
        (-signal.SIGTERM, InterruptedJobError, "was stopped by SIGTERM"),
        (-signal.SIGKILL, PreferenceTuningError, "out of memory?"),
    ],
)
def test_a_child_that_could_tell_nothing_is_known_by_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[PreferenceTuningError], message: str
) -> None:
    monkeypatch.setattr(jobs, "_run_child", lambda *_: code)
    with pytest.raises(PreferenceTuningError, match=re.escape(message)) as caught:
        jobs.run("a.module", tmp_path, jobs.Job(), TrainingRecord)
    assert type(caught.value) is kind


def test_a_child_that_breaks_after_its_result_has_done_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Done(BaseModel):
        figure: int

    def child(_: str, folder: Path, *_more: Any) -> int:
        jobs.write_json(folder / jobs.RESULT, {"figure": 7})
        return -signal.SIGABRT

    monkeypatch.setattr(jobs, "_run_child", child)
    assert jobs.run("a.module", tmp_path, jobs.Job(), Done).figure == 7


def test_a_child_that_cannot_write_its_error_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(*_: Any) -> None:
        def write_json(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(jobs, "write_json", write_json)
        raise errors.DataError("no row is left")

    jobs.write_json(tmp_path / jobs.JOB, {})
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path)])
    handlers = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    with pytest.raises(SystemExit) as caught:
        jobs.main(jobs.Job, work)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert caught.value.code == 3
    assert capsys.readouterr().err == f"no row is left (not written to {tmp_path}: No space left on device)\n"


@pytest.mark.parametrize("version", [1, 2])
def test_the_kernels_kills_are_counted_and_its_limit_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    own = tmp_path / "cgroup"
    own.write_text({1: "4:memory:/a/b\n3:cpu:/\n0::/\n", 2: "0::/a/b\n"}[version])
    place = tmp_path / "fs" / {1: "memory/a/b", 2: "a/b"}[version]
    place.mkdir(parents=True)
    names = {1: ("memory.oom_control", "memory.limit_in_bytes"), 2: ("memory.events", "memory.max")}[version]
    assert machine_memory.kills(tmp_path / "fs", own) == 0
    (place / names[0]).write_text("oom 5\noom_kill 3\n")
    (place / names[1]).write_text("1048576\n")
    assert machine_memory.kills(tmp_path / "fs", own) == 3
    assert machine_memory.of_machine(tmp_path / "fs", own) == 1 << 20
    (place / names[1]).write_text({1: "9223372036854771712\n", 2: "max\n"}[version])
    assert machine_memory.of_machine(tmp_path / "fs", own) > 1 << 20

    counted = iter([3, 4, 4, 4])
    monkeypatch.setattr(machine_memory, "kills", lambda: next(counted))
    monkeypatch.setattr(jobs, "_run_child", lambda *_: -signal.SIGKILL)
    with pytest.raises(PreferenceTuningError, match="and the kernel ended it; use a machine with more memory"):
        jobs.run("a.module", tmp_path / "job", jobs.Job(), TrainingRecord)
