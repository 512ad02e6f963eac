"""Thirty nights of scheduled retraining: real training of a tiny model, real registry, gate, lock, decision and history.

The jobs run in the test's own process. Nights in which a process dies or holds the lock are forked ones.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import hub_server
import pyarrow.parquet as pq
import pytest
from conftest import preference_rows, tiny_parameters
from in_process import Lab

from preference_tuning import tracked
from preference_tuning.config import RunConfig
from preference_tuning.data import job as data_job
from preference_tuning.data.content import group_of_prompt, share_of
from preference_tuning.data.table import SPLIT
from preference_tuning.evaluation import job as evaluation_job
from preference_tuning.models.source import locate
from preference_tuning.registry import result as registering
from preference_tuning.registry.pushing import patience, report, targets
from preference_tuning.retraining.attempt import attempt
from preference_tuning.retraining.history import History, Result, Run
from preference_tuning.tracking.folder import RunFolder
from preference_tuning.tracking.recording import Tracking

pytestmark = pytest.mark.whole

Rows = list[dict[str, Any]]
FIRST = datetime(2026, 1, 1, 3, tzinfo=UTC)
DEAD = "http://127.0.0.1:9"
START = 192


def rows(count: int) -> Rows:
    """Plain answers over shouted ones, and in every fourth pair plain answers over doubtful ones."""
    made = []
    for number, row in enumerate(preference_rows(count)):
        doubtful = {"rejected": f"perhaps perhaps or perhaps not, {number % 5}?"} if number % 4 == 0 else {}
        made.append({**{k: row[k] for k in ("prompt", "chosen", "rejected")}, **doubtful})
    return made


def swapped(made: Rows, which: Callable[[int, dict[str, Any]], bool]) -> Rows:
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if which(i, row) else row
        for i, row in enumerate(made)
    ]


def is_held_out(row: dict[str, Any]) -> bool:
    return share_of(group_of_prompt([{"role": "user", "content": row["prompt"]}]), 42) < 0.25


def weak() -> Rows:
    """A quarter of the training pairs is the wrong way round."""
    return swapped(rows(START), lambda i, row: i % 4 == 0 and not is_held_out(row))


def bad_batch(good: int, bad: int) -> Rows:
    """The last ``bad`` pairs are the wrong way round, the held-out ones among them too."""
    return swapped(rows(good + bad), lambda i, row: i >= good)


class Nights:
    """A scheduler, the one command it starts, and what the world does to it."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.night = lab, 0
        self.outcomes: dict[int, str] = {}
        self.history = History(lab.folder / "outputs")

    def put(self, data: Rows) -> None:
        self.lab.rows("rows", data)

    def start(self, before: Callable[[], None] = lambda: None, **changes: Any) -> Run:
        """Do what the scheduler's command does; ``before`` is done when it has decided to train."""

        def train(config: RunConfig) -> Result:
            before()
            output_dir = Path(config.output_dir)
            tracking = Tracking(output_dir / "tracking", config.tracking, uuid.uuid4().hex)
            outcome = self.lab.train_with(config)
            with tracking.stage("registry"):
                registered = registering.register(outcome, config.registry)
                tracked.complete(tracking, outcome, registered)
            tracking.close()
            version, receipts = targets.push(config, registered.version.id, output_dir)
            report.raise_failed(version, receipts)
            return Result(**registered.metadata())

        data = {"data": {"source": str(self.lab.folder / "rows.jsonl"), "held_out": 0.25}}
        clock = FIRST + timedelta(days=self.night)
        return attempt(self.lab.config(**data, **changes), "night", train, lambda: clock)

    def sleep(self, **changes: Any) -> Run:
        """Let the next night come and go."""
        self.night += 1
        run = self.start(**changes)
        self.outcomes[self.night] = run.outcome
        return run

    def crash(self) -> None:
        """A night in which the power goes while DPO trains, after its first checkpoint."""
        self.night += 1
        child = self._elsewhere(crashing)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        (killed,) = (run for run in self.history.runs() if run.started == FIRST + timedelta(days=self.night))
        self.outcomes[self.night] = killed.outcome

    def overlap(self) -> Run:
        """A night that is still at work when the next start comes; return that start."""
        self.night += 1
        ours, theirs = PROCESSES.Pipe()
        child = self._elsewhere(waiting, theirs)
        assert ours.poll(120)
        second = self.start()
        ours.send("go on")
        child.join()
        assert child.exitcode == 0
        first, _ = (run for run in self.history.runs() if run.started == FIRST + timedelta(days=self.night))
        self.outcomes[self.night] = first.outcome
        return second

    def record(self, run: Run, stage: str) -> dict[str, Any]:
        """Return the training record of a stage of a run."""
        assert run.result
        path = self.lab.registry.path(run.result.version) / "evidence" / stage / "record.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def accuracy(self, version: str) -> float:
        """Return how often a model prefers the right answer to the held-out prompts of tonight, against the base."""
        config = self.lab.config(data={"source": str(self.lab.folder / "rows.jsonl"), "held_out": 0.25})
        source = locate(config.base_model)
        work = evaluation_job.from_artifacts(
            config.base_model, source, data_job.prepare_for_run(data_job.of_run(config, source)),
            {"model": self.lab.registry.path(version) / "model"}, config.evaluation, Path(config.output_dir),
            beta=1.0, max_length=128,
        )  # fmt: skip
        return evaluation_job.evaluate(work).evaluation.models["model"]["rewards/accuracies"].value

    def _elsewhere(self, act: Callable[..., None], *words: Any) -> Any:
        """Start the night in a process of its own."""
        child = PROCESSES.Process(target=act, args=(self.lab.folder, self.lab.parameters, self.night, *words))
        child.start()
        return child


# A process from which others are forked that has everything imported, and that has computed nothing: a fork of one that
# has may find locks held for ever.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["test_thirty_nights", "peft", "trl.trainer.dpo_trainer", "trl.trainer.sft_trainer"])


def in_night(folder: Path, parameters: dict[str, Any], night: int) -> Nights:
    nights = Nights(Lab(folder, parameters, pytest.MonkeyPatch()))
    nights.night = night
    return nights


def crashing(folder: Path, parameters: dict[str, Any], night: int) -> None:
    def checkpoints() -> set[Path]:
        return set(folder.glob("outputs/jobs/dpo-*/checkpoints/checkpoint-*"))

    before = checkpoints()

    def cut_power() -> None:
        while not checkpoints() - before:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    in_night(folder, parameters, night).start(threading.Thread(target=cut_power, daemon=True).start)


def waiting(folder: Path, parameters: dict[str, Any], night: int, pipe: Any) -> None:
    def wait() -> None:
        pipe.send("at work")
        pipe.recv()

    run = in_night(folder, parameters, night).start(wait)
    sys.exit(run.exit_code)


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Nights]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    parameters = tiny_parameters(tiny_model, Path("none"))
    stage = {"per_device_train_batch_size": 16, "num_train_epochs": 1, "learning_rate": 2e-3, "eval_steps": 0.5}
    parameters["base_model"] |= {"threads": 1, "device": "cpu"}
    parameters["lora"] = {"rank": 4, "alpha": 8}
    parameters["data"] = {}
    parameters["sft"] |= stage
    parameters["dpo"] |= stage
    parameters["evaluation"] = {"samples": 2, "max_new_tokens": 8, "batch_size": 16}
    with pytest.MonkeyPatch.context() as patch:
        yield Nights(Lab(tmp_path_factory.mktemp("nights"), parameters, patch))
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_thirty_nights(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    nights.put(weak())
    assert nights.sleep().reason == "no run was completed yet"
    nights.sleep()
    nights.sleep()
    nights.put(rows(START + 16))
    assert nights.sleep().outcome == "promoted", "a quarter of the labels was mended"
    nights.sleep()
    nights.put(rows(START + 32))
    assert nights.sleep().reason == "16 new pairs"
    nights.sleep()
    nights.put(bad_batch(START + 32, START))
    bad = nights.sleep()
    assert bad.reason == "192 new pairs"
    nights.sleep()
    nights.put(rows(START + 48))
    nights.sleep()
    nights.sleep()

    nights.put(rows(START + 64))
    nights.crash()
    assert nights.record(nights.sleep(), "dpo")["resumed_at"], "it goes on from its checkpoint"
    nights.sleep()
    nights.put(rows(START + 80))
    second = nights.overlap()
    assert (second.outcome, second.exit_code) == ("locked", 75)
    nights.sleep()
    nights.put(rows(START + 96))
    an_outage(nights, monkeypatch)

    whole = rows(START + 112)
    nights.put(whole)
    with (nights.lab.folder / "rows.jsonl").open("a") as stream:
        stream.write('{"prompt": "cut')
    assert nights.sleep().exit_code == 3
    nights.put(whole)
    nights.sleep()
    nights.sleep()
    nights.put(rows(START + 128))
    nights.crash()
    nights.put(rows(START + 144))
    anew = nights.sleep()
    events = [event["kind"] for stage in ("sft", "dpo") for event in nights.record(anew, stage)["events"]]
    assert events == ["started_over"], "the SFT of the night before was finished, its DPO is not wanted any more"
    nights.sleep()
    nights.put(rows(START + 144)[::-1])
    nights.sleep()
    reckless = nights.sleep(dpo={"learning_rate": 0.1})
    assert reckless.reason == "changed: config"
    nights.sleep()
    for _ in range(3):
        nights.sleep()

    expected = {
        1: "promoted", 2: "skipped", 3: "skipped", 4: "promoted", 5: "skipped", 6: "held", 7: "skipped", 8: "held",
        9: "skipped", 10: "held", 11: "skipped", 12: "killed", 13: "held", 14: "skipped", 15: "held", 16: "skipped",
        17: "failed", 18: "held", 19: "failed", 20: "held", 21: "skipped", 22: "killed", 23: "held", 24: "skipped",
        25: "skipped", 26: "held", 27: "held", 28: "skipped", 29: "skipped", 30: "skipped",
    }  # fmt: skip
    assert nights.outcomes == expected
    runs = nights.history.runs()
    assert [run.outcome for run in runs] == [*list(expected.values())[:15], "locked", *list(expected.values())[15:]]
    completed = [run for run in runs if run.result and run.fingerprints]
    nothing_is_lost(nights, completed)
    only_better_ones_reign(nights, completed, bad)


def an_outage(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comet and the hub are down for a night; the next one brings the version where it belongs."""
    push = {"push": [{"to": "huggingface", "repo_id": "me/model", "when": "registered"}]}
    with hub_server.running() as hub, monkeypatch.context() as world:
        world.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        world.setattr(patience, "pause", lambda seconds: None)
        keys = {"COMET_API_KEY": "x", "COMET_URL_OVERRIDE": DEAD, "HF_TOKEN": "hf_canary_writer", "HF_ENDPOINT": DEAD}
        for name, value in keys.items():
            world.setenv(name, value)
        down = nights.sleep(tracking={"mode": "online"}, registry=push)
        assert "is registered, but 1 of 1 pushes failed" in str(down.error)
        tracked_runs = [RunFolder(path) for path in nights.lab.folder.glob("outputs/tracking/*")]
        (waiting_run,) = [run for run in tracked_runs if (run.path / "run.json").read_text().count('"online"')]
        assert not waiting_run.ledger().complete, "`run.py track upload` has all of it"
        world.setenv("HF_ENDPOINT", hub.endpoint)
        up = nights.sleep(registry=push)
    assert up.result
    assert f"v-{up.result.version}" in hub.repos["me/model"].tags
    assert up.result.version in str(down.error)


def nothing_is_lost(nights: Nights, completed: list[Run]) -> None:
    registry = nights.lab.registry
    assert {run.result.version for run in completed if run.result} == set(registry.ids())
    assert [problem for version in registry.ids() for problem in registry.verify(version)] == []
    outputs = nights.lab.folder / "outputs"
    assert [path for path in outputs.glob("jobs/*/job.json") if not (path.parent / "result.json").exists()] == []
    assert not list(outputs.glob("jobs/*/checkpoints"))
    sides_of: dict[str, str] = {}
    for run in completed:
        assert run.fingerprints
        dataset = data_job.kept(outputs.absolute(), run.fingerprints.dataset)
        assert dataset
        for row in pq.read_table(dataset.folder / SPLIT, columns=["group", "side"]).to_pylist():
            assert sides_of.setdefault(row["group"], row["side"]) == row["side"], "a prompt never changes sides"
    assert dataset.manifest.train + dataset.manifest.held_out == START + 144


def only_better_ones_reign(nights: Nights, completed: list[Run], bad: Run) -> None:
    """Not by the verdicts: every promoted model, and the bad one, is scored anew on the pairs of the last night."""
    promoted = [run.result.version for run in completed if run.result and run.outcome == "promoted"]
    champion = nights.lab.registry.champion()
    assert champion
    assert champion.version == promoted[-1]
    assert bad.result
    weak, good, worse = (nights.accuracy(version) for version in (*promoted, bad.result.version))
    assert worse < weak < good
