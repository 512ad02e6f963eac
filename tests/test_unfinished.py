"""Unfinished training of other settings: what counts as such, and what becomes of it."""

import fcntl
from pathlib import Path
from typing import Any

import pytest

from preference_tuning import events, fingerprint, jobs
from preference_tuning.config import BaseModelConfig, LoraConfig, SFTConfig
from preference_tuning.errors import ConfigError
from preference_tuning.models.source import ModelSource
from preference_tuning.training import checkpoints, unfinished
from preference_tuning.training.job import TrainingJob


def job(out: Path, **changes: Any) -> TrainingJob:
    sft = SFTConfig(**changes.pop("sft", {}))
    fields = {
        "stage": "sft", "base_model": BaseModelConfig(source="m"), "lora": LoraConfig(), "sft": sft, "data": out,
        "source": ModelSource(kind="hub", location="m", fingerprint="base"), "split": "train", "name": "mine",
        "data_fingerprint": "d", "max_prompt_length": None, "keep_end": False, "output_dir": out,
    }  # fmt: skip
    return TrainingJob(**{**fields, **changes})


def begin(work: TrainingJob, steps: tuple[int, ...] = (4, 8), code: str | None = None) -> Path:
    """Leave what an interrupted job leaves in the folder where it is done."""
    folder, work = unfinished.settle(work)
    folder.mkdir(parents=True, exist_ok=True)
    jobs.write_json(folder / jobs.JOB, work.model_dump(mode="json"))
    identity = work.identity() | ({"code": code} if code else {})
    for step in steps:
        checkpoint = folder / checkpoints.FOLDER / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        for name in (*checkpoints.NEEDED, "adapter_config.json", "adapter_model.safetensors"):
            (checkpoint / name).write_text("{}")
        checkpoints.seal(checkpoint, identity)
    return folder


OTHER = {
    "settings": ({"sft": {"learning_rate": 1e-4}}, "sft.learning_rate: 0.0003 -> 0.0001"),
    "several": ({"sft": {"seed": 1, "weight_decay": 0.5}}, "sft.seed: 42 -> 1; sft.weight_decay: 0.01 -> 0.5"),
    "data": ({"data_fingerprint": "e"}, "data_fingerprint: d -> e"),
    "base model": (
        {"source": ModelSource(kind="hub", location="m", fingerprint="new")}, "base_model_fingerprint: base -> new",
    ),
    "processes": ({"processes": 2}, "processes: 1 -> 2"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "told"), OTHER.values(), ids=OTHER)
def test_other_work_is_refused_continued_or_removed(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    began = begin(job(tmp_path))
    with pytest.raises(ConfigError) as refusal:
        unfinished.settle(job(tmp_path, **changes))
    for part in (f"{began}, at step 8", f": {told}. Undo", "--force-resume", "training.unfinished=start_over"):
        assert part in str(refusal.value)
    assert unfinished.settle(job(tmp_path)) == (began, job(tmp_path)), "the same work goes on"

    folder, forced = unfinished.settle(job(tmp_path, unfinished="continue", **changes))
    assert forced.forced == {"from": began.name, "step": 8, "changed": told.split("; ")}
    assert not began.exists()
    assert (folder / "checkpoints" / "checkpoint-8").is_dir()
    exact = fingerprint.of_value(forced.identity())[:16]
    assert folder.name == f"sft-{exact}-forced", "never found as the result of a clean job"
    (event,) = events.read(folder)
    assert (event.kind, event.facts["changed"]) == ("forced_resume", told.split("; "))

    wanted = job(tmp_path, unfinished="start_over", **changes)
    clean, work = unfinished.settle(wanted)
    assert (clean.name, work.forced) == (f"sft-{exact}", None)
    assert not folder.exists()
    assert [event.kind for event in events.read(clean)] == ["started_over"]


def test_other_code_is_other_work(tmp_path: Path) -> None:
    """The code of an interrupted job is what its checkpoints say; its folder is that of the code today."""
    began = begin(job(tmp_path), code="0" * 64)
    began.rename(began.with_name("sft-0000000000000000"))
    with pytest.raises(ConfigError, match="code: 000000000000 -> "):
        unfinished.settle(job(tmp_path))


def test_a_forced_job_goes_on_as_such_and_never_as_a_clean_one(tmp_path: Path) -> None:
    begin(job(tmp_path))
    changed = {"sft": {"seed": 1}}
    again = job(tmp_path, unfinished="continue", **changed)
    folder, work = unfinished.settle(again)
    jobs.write_json(folder / jobs.JOB, work.model_dump(mode="json"))
    assert unfinished.settle(again) == (folder, work), "interrupted again, and continued"
    assert len(events.read(folder)) == 1
    with pytest.raises(ConfigError, match=r"sft-.*-forced"):
        unfinished.settle(job(tmp_path, **changed))

    third, twice = unfinished.settle(job(tmp_path, unfinished="continue", sft={"seed": 2}))
    assert twice.forced is not None
    assert twice.forced["changed"] == ["sft.seed: 42 -> 1", "sft.seed: 42 -> 2"]
    (third / jobs.RESULT).write_text("{}")
    assert unfinished.settle(job(tmp_path, unfinished="continue", sft={"seed": 2})) == (third, twice)
    clean, plain = unfinished.settle(job(tmp_path, sft={"seed": 2}))
    assert plain.forced is None
    assert clean != third


def test_the_form_of_a_checkpoint_cannot_be_forced(tmp_path: Path) -> None:
    began = begin(job(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot go on with lora\.rank: 32 -> 8"):
        unfinished.settle(job(tmp_path, unfinished="continue", lora=LoraConfig(rank=8)))
    assert began.is_dir()


def test_what_is_no_unfinished_work_is_left_alone(tmp_path: Path) -> None:
    """Finished, of another model, without a good checkpoint, or running at this moment."""
    finished = begin(job(tmp_path, data_fingerprint="1"))
    (finished / jobs.RESULT).write_text("{}")
    begin(job(tmp_path, data_fingerprint="2", name="theirs"))
    begin(job(tmp_path, data_fingerprint="3", name="none"), steps=())
    hopeless = begin(job(tmp_path, data_fingerprint="4", name="mine"), steps=(4,))
    (hopeless / "checkpoints" / "checkpoint-4" / "optimizer.pt").unlink()
    running = begin(job(tmp_path, data_fingerprint="5"))
    with (running / jobs.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for policy in ("refuse", "continue", "start_over"):
            folder, work = unfinished.settle(job(tmp_path, unfinished=policy))
            assert (folder.exists(), work.forced) == (False, None)
    assert len(list((tmp_path / "jobs").iterdir())) == 5


def test_checkpoints_are_kept_until_a_result_is_there(tmp_path: Path) -> None:
    finished, waiting = begin(job(tmp_path)), begin(job(tmp_path, name="theirs", data_fingerprint="1"))
    (finished / jobs.RESULT).write_text("{}")
    (finished / "adapter").mkdir()
    unfinished.clear(tmp_path)
    assert sorted(path.name for path in finished.iterdir()) == sorted(["adapter", jobs.JOB, jobs.LOCK, jobs.RESULT])
    assert (waiting / "checkpoints" / "checkpoint-8").is_dir()


def test_what_becomes_of_unfinished_work_is_no_part_of_a_job(tmp_path: Path) -> None:
    assert job(tmp_path, unfinished="continue", name="other").identity() == job(tmp_path).identity()


def test_an_event_is_one_line_whatever_its_message_holds(tmp_path: Path) -> None:
    events.add(tmp_path, "retried", "no\u2028such\x85file")
    with (tmp_path / events.FILE).open("a") as stream:
        stream.write('{"cut')
    assert [event.message for event in events.read(tmp_path)] == ["no\u2028such\x85file"]
