"""Training that is killed, whose checkpoints are damaged, whose disk is full: it ends as if nothing had happened."""

import functools
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import faulty
import pytest
from conftest import preference_rows, tiny_parameters, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from preference_tuning import events, fingerprint, jobs
from preference_tuning.config import RunConfig, TrainingConfig
from preference_tuning.data import job as data_job
from preference_tuning.data import prepare
from preference_tuning.data.table import Dataset
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.models.source import locate
from preference_tuning.tracking.spool import Point, read
from preference_tuning.training import checkpoints, disk, job
from preference_tuning.training.job import TrainingJob, TrainingRecord

STEPS = 12


class Place(NamedTuple):
    """A config and its data, and a folder for what all jobs share: token rows, and scores of the held-out pairs."""

    config: RunConfig
    dataset: Dataset
    shared: Path

    def job(
        self, stage: str, adapter: Path | None = None, training: TrainingConfig | None = None, **changes: Any
    ) -> TrainingJob:
        """Return a job of 12 steps, with checkpoints after 3, 6, 9 and 12 of them."""
        section = getattr(self.config, stage).model_copy(update=changes)
        own = {"lora": self.config.lora} if stage == "sft" else {"adapter": adapter}
        return job.from_artifacts(
            stage, self.config.base_model, locate(self.config.base_model), self.dataset, self.shared,
            training, **{stage: section}, **own,
        )  # type: ignore[arg-type]  # fmt: skip


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Place:
    folder = tmp_path_factory.mktemp("place")
    parameters = tiny_parameters(tiny_model, write_jsonl(folder / "rows.jsonl", preference_rows(32)))
    parameters["base_model"] |= {"device": "cpu", "threads": 1, "attention": "sdpa"}
    parameters["data"]["held_out"] = 0.25
    stage = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_steps": 0.25, "eval_steps": 0.5}
    for name in ("sft", "dpo"):
        parameters[name] |= stage
    config = RunConfig.model_validate(parameters)
    dataset = prepare.prepare(config.data, data_job.fingerprints_of(config.data), folder / "data")
    return Place(config, dataset, folder / "shared")


def done(folder: Path) -> TrainingRecord:
    return TrainingRecord.model_validate_json((folder / jobs.RESULT).read_text(encoding="utf-8"))


def points(folder: Path) -> list[Point]:
    return list(read(folder / job.EVIDENCE / job.METRICS))


def error(folder: Path) -> str:
    return str(json.loads((folder / jobs.ERROR).read_text(encoding="utf-8"))["message"])


@pytest.fixture(scope="module")
def sft(at: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an SFT job that nothing happened to."""
    folder = faulty.place(at.job("sft"), tmp_path_factory.mktemp("jobs") / "sft")
    assert faulty.run(folder) == 0, error(folder)
    assert done(folder).steps == STEPS
    return folder


@pytest.fixture(scope="module")
def whole(at: Place, sft: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of jobs that nothing happened to."""
    dpo = faulty.place(at.job("dpo", sft / job.ADAPTER), tmp_path_factory.mktemp("jobs") / "dpo")
    assert faulty.run(dpo) == 0, error(dpo)
    assert done(dpo).steps == STEPS
    return {"sft": sft, "dpo": dpo}


def assert_same(folder: Path, whole: Path) -> None:
    """The same bytes, the same metrics in every step and of every evaluation as floats, and the same totals."""
    one, other = done(folder), done(whole)
    assert fingerprint.of_directory(folder / job.ADAPTER) == one.adapter_hash == other.adapter_hash
    assert points(folder) == points(whole), "a gap, a duplicate or another number"
    name = f"{one.stage}/train/loss"
    losses = [point.metrics[name] for point in points(folder) if name in point.metrics]
    assert len(losses) == one.steps
    assert one.train_loss == pytest.approx(sum(losses) / len(losses), abs=1e-9)
    assert (one.train_loss, one.tokens, one.steps) == (other.train_loss, other.tokens, other.steps)


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_job_killed_in_every_step(at: Place, whole: dict[str, Path], tmp_path: Path, stage: str) -> None:
    folder = faulty.place(at.job(stage, whole["sft"] / job.ADAPTER), tmp_path / stage)
    for step in range(1, STEPS + 1):
        assert faulty.run(folder, functools.partial(faulty.kill_at_step, step)) == faulty.KILLED
    assert faulty.run(folder) == 0, error(folder)
    assert_same(folder, whole[stage])
    assert done(folder).resumed_at == [3, 3, 3, 6, 6, 6, 9, 9, 9]
    kinds = [event.kind for event in done(folder).events]
    assert kinds == ["resumed"] * 9
    assert done(folder).seconds < 60


@pytest.mark.faults
def test_a_job_killed_in_every_operation_of_a_checkpoints_write(at: Place, tmp_path: Path) -> None:
    """Some operations put a checkpoint in place, so the job is a longer one; it writes a checkpoint in every step."""
    often = TrainingConfig(save_every_minutes=1e-9)
    work = at.job("sft", training=often, num_train_epochs=3, save_steps=0.99, eval_steps=0.99)
    undisturbed, folder = (faulty.place(work, tmp_path / name) for name in ("undisturbed", "killed"))
    assert faulty.run(undisturbed) == 0, error(undisturbed)
    place = folder / checkpoints.FOLDER
    assert faulty.run(folder, functools.partial(faulty.kill_at_step, 4)) == faulty.KILLED
    operation, newest = 0, 3
    while (code := faulty.run(folder, functools.partial(faulty.kill_in_write, operation + 1, place))) == faulty.KILLED:
        operation += 1
        found, rejected = checkpoints.newest_good(place)
        assert rejected == [], "a folder with a checkpoint's name is complete"
        step = checkpoints.step_of(found) if found else -1
        assert step >= newest, "the last good checkpoint was deleted"
        newest = step
    assert code == faulty.WHOLE_WRITE
    killed = {line.split()[-1] for line in faulty.said(folder).splitlines() if line.startswith("killed at")}
    assert killed >= {path.name for path in (place / f"checkpoint-{newest}").iterdir()}, "at every file"
    assert killed >= {"checkpoint-4", ".deleting-checkpoint-2"}, "putting in place, and removing"
    assert faulty.run(folder) == 0, error(folder)
    assert_same(folder, undisturbed)
    assert [path.name for path in sorted(place.iterdir())] == [".writing", "checkpoint-17", "checkpoint-18"]


@pytest.mark.faults
@pytest.mark.parametrize("moment", [job.RECORD, jobs.RESULT])
def test_a_job_killed_after_its_last_step_trains_no_more(at: Place, sft: Path, tmp_path: Path, moment: str) -> None:
    """It ends in the middle of an epoch, where transformers would take one step more."""
    work = at.job("sft", num_train_epochs=1.5)
    undisturbed, folder = (faulty.place(work, tmp_path / name) for name in ("undisturbed", "killed"))
    assert faulty.run(undisturbed) == 0, error(undisturbed)
    assert faulty.run(folder, functools.partial(faulty.kill_before, moment)) == faulty.KILLED
    assert not (folder / jobs.RESULT).exists()
    assert faulty.run(folder, functools.partial(faulty.in_step, 10, faulty.kill)) == 0, error(folder)
    assert done(folder).resumed_at == [9]
    assert_same(folder, undisturbed)


# --- damaged ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(at: Place, whole: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a DPO job that was killed in its 11th step, with checkpoints of steps 6 and 9."""
    work = at.job("dpo", whole["sft"] / job.ADAPTER)
    folder = faulty.place(work, tmp_path_factory.mktemp("half") / "dpo")
    assert faulty.run(folder, functools.partial(faulty.kill_at_step, 11)) == faulty.KILLED
    assert sorted(path.name for path in (folder / "checkpoints").glob("c*")) == ["checkpoint-6", "checkpoint-9"]
    return folder


def copied(half: Path, to: Path) -> Path:
    shutil.copytree(half, to)
    return to


def cut(name: str, checkpoint: Path) -> None:
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero_tail(name: str, checkpoint: Path) -> None:
    path = checkpoint / name
    content = path.read_bytes()
    path.write_bytes(content[:-512] + bytes(512))


def lose(name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def mark(checkpoint: Path) -> None:
    (checkpoint / checkpoints.INCOMPLETE).touch()


def rename(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.with_name("checkpoint-10"))


ADAPTER = "adapter_model.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated weights": (functools.partial(cut, ADAPTER), f"changed since it was written: {ADAPTER}"),
    "zero tail of the weights": (functools.partial(zero_tail, ADAPTER), f"changed since it was written: {ADAPTER}"),
    "no weights": (functools.partial(lose, ADAPTER), f"lost since it was written: {ADAPTER}"),
    "truncated optimizer": (functools.partial(cut, "optimizer.pt"), "changed since it was written: optimizer.pt"),
    "no optimizer": (functools.partial(lose, "optimizer.pt"), "lost since it was written: optimizer.pt"),
    "no schedule": (functools.partial(lose, "scheduler.pt"), "lost since it was written: scheduler.pt"),
    "no state": (functools.partial(lose, "trainer_state.json"), "lost since it was written: trainer_state.json"),
    "no random state": (functools.partial(lose, "rng_state.pth"), "lost since it was written: rng_state.pth"),
    "no totals": (functools.partial(lose, checkpoints.TOTALS), "lost since it was written: totals.json"),
    "no manifest": (functools.partial(lose, checkpoints.SEAL), "it was not finished (no readable manifest)"),
    "truncated manifest": (functools.partial(cut, checkpoints.SEAL), "it was not finished (no readable manifest)"),
    "empty folder": (empty, "it was not finished (no readable manifest)"),
    "marked as incomplete": (mark, "it was not finished (it has a checkpoint-is-incomplete.txt)"),
    "of another step": (rename, "it is of step 9"),
}


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_not_resumed_from(
    whole: dict[str, Path], half: Path, tmp_path: Path, damage: str
) -> None:
    folder = copied(half, tmp_path / "dpo")
    harm, reason = DAMAGES[damage]
    harm(folder / "checkpoints" / "checkpoint-9")
    name = "checkpoint-10" if harm is rename else "checkpoint-9"
    assert faulty.run(folder) == 0, error(folder)
    assert_same(folder, whole["dpo"])
    assert done(folder).resumed_at == [6]
    rejected = next(event for event in done(folder).events if event.kind == "checkpoint_rejected")
    assert rejected.facts == {"checkpoint": name, "reason": reason}
    assert f"warning: {name}: {reason}; not resumed from" in faulty.said(folder)
    left = [path.name for path in (folder / "checkpoints").glob("checkpoint-*")]
    assert sorted(left) == ["checkpoint-12", "checkpoint-9"], "the damaged one gave its place to a good one"


@pytest.mark.faults
def test_without_an_intact_checkpoint_a_stage_starts_over_or_is_refused(
    at: Place, whole: dict[str, Path], half: Path, tmp_path: Path
) -> None:
    folder = copied(half, tmp_path / "dpo")
    for checkpoint in (folder / "checkpoints").glob("c*"):
        cut(ADAPTER, checkpoint)
    strict = at.job("dpo", whole["sft"] / job.ADAPTER, training=TrainingConfig(strict_resume=True))
    assert faulty.run(faulty.place(strict, folder)) == PreferenceTuningError.exit_code
    assert "checkpoint-6: changed since it was written" in error(folder)
    assert "training.strict_resume" in error(folder)
    assert sorted(path.name for path in (folder / "checkpoints").glob("c*")) == ["checkpoint-6", "checkpoint-9"]
    assert faulty.run(faulty.place(at.job("dpo", whole["sft"] / job.ADAPTER), folder)) == 0, error(folder)
    assert_same(folder, whole["dpo"])
    assert [event.kind for event in events.read(folder)] == ["checkpoint_rejected"] * 2 + ["started_over"]
    assert "warning: no checkpoint is intact; the stage starts over" in faulty.said(folder)


@pytest.mark.faults
def test_a_checkpoint_of_other_work_is_refused_by_the_names_of_what_differs(
    at: Place, whole: dict[str, Path], half: Path, tmp_path: Path
) -> None:
    other = at.job("dpo", whole["sft"] / job.ADAPTER, learning_rate=1e-3, seed=7)
    folder = faulty.place(other, tmp_path / "other")
    shutil.copytree(half / "checkpoints", folder / "checkpoints")
    assert faulty.run(folder) == ConfigError.exit_code
    assert "checkpoint-9 was written by other work: dpo.learning_rate: 0.003 -> 0.001; dpo.seed: 42 -> 7." in error(
        folder
    )


def test_what_differs_between_two_identities() -> None:
    one = {"code": "a" * 64, "sft": {"optim": "auto", "beta": [1]}, "lora": None, "old": 1}
    two = {"code": "b" * 64, "sft": {"optim": "auto", "beta": (2,)}, "lora": {"rank": 2}}
    assert checkpoints.differences(one, two) == [
        "code: aaaaaaaaaaaa -> bbbbbbbbbbbb",
        "lora.rank: None -> 2",
        "old: 1 -> None",
        "sft.beta: [1] -> [2]",
    ]
    assert checkpoints.differences(one, one) == []


def test_work_may_go_on_with_what_was_forced(tmp_path: Path) -> None:
    written(tmp_path, 4, {"seed": 1})
    assert checkpoints.check(tmp_path / "checkpoint-4", {"seed": 1}) == []
    assert checkpoints.check(tmp_path / "checkpoint-4", {"seed": 2}, forced=True) == ["seed: 1 -> 2"]
    with pytest.raises(ConfigError, match="seed: 1 -> 2"):
        checkpoints.check(tmp_path / "checkpoint-4", {"seed": 2})


# --- kept ------------------------------------------------------------------------------------------------------------


def written(folder: Path, step: int, identity: dict[str, Any]) -> None:
    aside = checkpoints.aside(folder) / f"checkpoint-{step}"
    aside.mkdir(parents=True, exist_ok=True)
    for name in (*checkpoints.NEEDED, "adapter_config.json", ADAPTER):
        (aside / name).write_text(f"{name} of {step}")
    checkpoints.publish(folder, step, checkpoints.Totals(), identity)


@settings(max_examples=25, deadline=None)
@given(happens=st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.booleans()), max_size=8))
def test_the_newest_two_that_verify_are_kept_whatever_happens_to_the_others(
    tmp_path_factory: pytest.TempPathFactory, happens: list[tuple[bool, int, bool]]
) -> None:
    """Checkpoints are written and damaged in any order; training goes on from the newest that is good."""
    folder = tmp_path_factory.mktemp("checkpoints")
    good: list[int] = []
    for writes, which, loses in happens:
        there = sorted(folder.glob("checkpoint-*"), key=checkpoints.step_of)
        if writes:
            step = max(good, default=0) + 1 + which
            written(folder, step, {})
            good = sorted({*good, step})[-checkpoints.KEPT :]
            assert sorted(folder.glob("c*")) == sorted(folder / f"checkpoint-{step}" for step in good)
        elif there:
            damaged = there[which % len(there)]
            (damaged / "optimizer.pt").unlink(missing_ok=True)
            if not loses:
                (damaged / "optimizer.pt").write_text("something else")
            good = [step for step in good if step != checkpoints.step_of(damaged)]
            if not good:
                checkpoints.rotate(folder)
                assert sorted(folder.glob("c*")) == sorted(there), "the last ones are all that can tell what happened"
        newest, _ = checkpoints.newest_good(folder)
        assert newest == (folder / f"checkpoint-{good[-1]}" if good else None)


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / checkpoints.FOLDER
    written(folder, 4, {})
    left = folder / ".deleting-checkpoint-2", folder / ".writing" / "checkpoint-6"
    for path in left:
        path.mkdir()
        (path / "optimizer.pt").touch()
    checkpoints.clean(folder)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-4"]
    checkpoints.remove(tmp_path)
    assert list(tmp_path.iterdir()) == []
    checkpoints.remove(tmp_path)


# --- the disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.faults
def test_a_disk_that_is_too_small_is_told_before_training(at: Place, small_disk: Path) -> None:
    folder = faulty.place(at.job("sft"), small_disk / "sft")
    faulty.fill(small_disk / "filler", 500_000)
    assert faulty.run(folder, functools.partial(faulty.kill_at_step, 1)) == PreferenceTuningError.exit_code
    assert error(folder).startswith(f"output_dir: the disk of {folder} has 0.")
    assert "MB are needed for 3 checkpoints and the result; free some space" in error(folder)


@pytest.mark.faults
def test_a_disk_that_fills_up_midway_costs_nothing(at: Place, whole: dict[str, Path], small_disk: Path) -> None:
    """It is full for the metrics, for the weights, for the optimizer, for the small files; each time space is freed."""
    folder, filler = faulty.place(at.job("sft"), small_disk / "sft"), small_disk / "filler"
    files = [path.stat().st_size for path in (whole["sft"] / "checkpoints" / "checkpoint-9").iterdir()]
    pages = sum(4096 * -(-size // 4096) for size in files)
    for step, left in ((5, 0), (6, 4096), (6, pages // 5), (6, pages * 4 // 5), (6, pages - 8192)):
        code = faulty.run(folder, functools.partial(faulty.fill_disk, step, filler, left))
        assert code == PreferenceTuningError.exit_code, left
        assert "is full" in error(folder)
        assert "checkpoint-3 is intact. Free some space: the same command continues" in error(folder)
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-3"]
        filler.unlink()
    assert faulty.run(folder) == 0, error(folder)
    assert_same(folder, whole["sft"])


@pytest.mark.faults
def test_the_expected_size_of_a_checkpoint_is_that_of_a_real_one(
    at: Place, whole: dict[str, Path], tiny_model: Path
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    for stage, folder in whole.items():
        checkpoint = folder / "checkpoints" / "checkpoint-12"
        trained = [weight.requires_grad_() for weight in load_file(checkpoint / ADAPTER).values()]
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        expected = disk.checkpoint_size(trained, tokenizer, "adamw_torch_fused", STEPS, sharded=False)
        real = sum(path.stat().st_size for path in checkpoint.iterdir())
        assert real <= expected <= 1.25 * real, stage
        result = sum(path.stat().st_size for path in (folder / job.ADAPTER).iterdir())
        assert disk.weights_size(trained, tokenizer) == pytest.approx(result, rel=0.1), stage
    large = [torch.nn.Parameter(torch.zeros(1000, 1000))]
    full, eight = (disk.checkpoint_size(large, tokenizer, name, STEPS, False) for name in ("adamw_torch", "adamw_8bit"))
    assert full - eight == 6_000_000, "two moments of one byte instead of four"
