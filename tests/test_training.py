"""Training jobs in their own process: exact, proven, resumable, and stopped when they are not healthy."""

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import preference_rows, tiny_parameters, write_jsonl

from preference_tuning import fingerprint
from preference_tuning.config import RunConfig
from preference_tuning.data import job as data_job
from preference_tuning.data import prepare
from preference_tuning.data.table import Dataset
from preference_tuning.errors import ConfigError, DivergedError
from preference_tuning.models.source import locate
from preference_tuning.tracking.spool import read
from preference_tuning.training import checkpoints, job, reference
from preference_tuning.training.job import Trained, TrainingJob
from preference_tuning.training.schedule import steps_of_share


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[RunConfig, Dataset]:
    folder = tmp_path_factory.mktemp("run")
    data = write_jsonl(folder / "rows.jsonl", preference_rows(64))
    parameters = tiny_parameters(tiny_model, data)
    parameters["dpo"]["num_train_epochs"] = 1
    config = RunConfig.model_validate(parameters)
    dataset = prepare.prepare(config.data, data_job.fingerprints_of(config.data), folder / "data")
    return config, dataset


def job_of(run: tuple[RunConfig, Dataset], out: Path, stage: str, **changes: Any) -> TrainingJob:
    config, dataset = run
    section = getattr(config, stage).model_copy(update=changes.pop("settings", {}))
    extra = {"lora": config.lora} if stage == "sft" else {}
    return job.from_artifacts(
        stage, config.base_model, locate(config.base_model), dataset, out, **{stage: section}, **extra, **changes
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sft(run: tuple[RunConfig, Dataset], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return job.train(job_of(run, tmp_path_factory.mktemp("sft"), "sft"))


@pytest.fixture(scope="module")
def dpo(run: tuple[RunConfig, Dataset], sft: Trained, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return job.train(job_of(run, tmp_path_factory.mktemp("dpo"), "dpo", adapter=sft.adapter))


def losses(trained: Trained) -> list[tuple[int, float]]:
    name = f"{trained.record.stage}/train/loss"
    return [(p.step, p.metrics[name]) for p in read(trained.evidence / job.METRICS) if name in p.metrics]


def test_the_record_tells_what_was_done(run: tuple[RunConfig, Dataset], sft: Trained, dpo: Trained) -> None:
    dataset = run[1]
    for record in (sft.record, dpo.record):
        assert record.rows == dataset.manifest.train
        assert record.steps == math.ceil(record.rows / 8)
        assert record.seconds > 0
        assert record.tokens > 0
        assert record.dropped_rows == record.cut_rows == 0
    for trained in (sft, dpo):
        kept = json.loads((trained.adapter.parent / "compute.json").read_text(encoding="utf-8"))["job"]["compute"]
        assert kept == trained.record.compute.model_dump(mode="json"), "a resumed job goes on with this"
    assert sft.record.adapter_hash != dpo.record.adapter_hash
    assert dpo.record.identity["adapter_hash"] == sft.record.adapter_hash
    assert dpo.record.metrics["rewards/accuracies"] > 0.8
    assert losses(sft)[-1][1] < losses(sft)[0][1]


def test_the_order_of_rows_decides_nothing(
    run: tuple[RunConfig, Dataset], sft: Trained, tmp_path: Path, tiny_model: Path
) -> None:
    """The data's fingerprint does not know the order of rows, so neither may training: it stands for the result."""
    rows = preference_rows(64)
    config = run[0].data.model_copy(update={"source": str(write_jsonl(tmp_path / "shuffled.jsonl", rows[::-1]))})
    shuffled = prepare.prepare(config, data_job.fingerprints_of(config), tmp_path / "data")
    assert shuffled.path("train").read_bytes() != run[1].path("train").read_bytes()
    again = job.train(job_of((run[0], shuffled), tmp_path, "sft"))
    assert again.record.identity == sft.record.identity
    assert again.record.adapter_hash == sft.record.adapter_hash
    assert losses(again) == losses(sft)


@pytest.mark.parametrize("content", [["a"], ["a", "b", "c"], ["b", "a"]])
def test_rows_that_lie_in_order_already_are_read_too(tmp_path: Path, content: list[str]) -> None:
    import pyarrow as pa

    from preference_tuning.models import rows

    table = pa.table({"content": content})
    with pa.ipc.new_stream(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert rows.in_order(tmp_path / "rows.arrow")["content"][:] == sorted(content)


def test_sft_trains_on_answers_of_its_own(run: tuple[RunConfig, Dataset], tmp_path: Path) -> None:
    answers = [{"prompt": f"Say {i}.", "completion": f"{i}, said."} for i in range(24)]
    source = {"source": str(write_jsonl(tmp_path / "answers.jsonl", answers))}
    config = run[0].data.model_validate({**run[0].data.model_dump(), "sft_source": source})
    dataset = prepare.prepare(config, data_job.fingerprints_of(config), tmp_path / "data")
    trained = job.train(job_of((run[0], dataset), tmp_path, "sft"))
    assert (trained.record.rows, trained.record.steps) == (24, 3)
    assert trained.record.held_out_rows == dataset.manifest.held_out
    assert dataset.manifest.fingerprint == run[1].manifest.fingerprint
    assert trained.record.identity["data_fingerprint"] != run[1].manifest.split_fingerprint


def test_rows_are_tokenised_once_for_all_jobs(
    run: tuple[RunConfig, Dataset], tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    from preference_tuning.models import chat, rows

    tokenizer, table = AutoTokenizer.from_pretrained(tiny_model), run[1].path("train")
    whole = rows.tokenise(table, tokenizer, chat.Room(500), tmp_path, answers=2)
    answers = (max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in whole.rows)
    lengths = [len(row["prompt_ids"]) + answer for row, answer in zip(whole.rows, answers, strict=True)]
    room = chat.Room(max(lengths) - 1)
    first = rows.tokenise(table, tokenizer, room, tmp_path, answers=2)
    assert (whole.cut, first.cut) == (0, lengths.count(max(lengths)))
    monkeypatch.setattr(chat, "encode", None)
    again = rows.tokenise(table, tokenizer, room, tmp_path, answers=2)
    assert again.rows.to_list() == first.rows.to_list()
    assert (again.cut, again.dropped) == (first.cut, first.dropped)
    tokenizer.chat_template += " "
    with pytest.raises(TypeError):
        rows.tokenise(table, tokenizer, room, tmp_path, answers=2)


def test_the_reference_proof(sft: Trained, dpo: Trained) -> None:
    proof = dpo.record.reference
    assert proof is not None
    assert proof.sft_adapter_hash == sft.record.adapter_hash
    assert proof.loss == pytest.approx(math.log(2), abs=1e-5)
    assert losses(dpo)[0][1] == pytest.approx(math.log(2), abs=1e-5), "the first step starts there too"
    assert proof.largest_difference < 1e-3


@pytest.mark.parametrize(
    ("loss", "difference", "loss_type", "wrong"),
    [
        (math.log(2), 0.0, ["sigmoid"], False),
        (math.log(2) + 0.02, 0.0, ["sigmoid"], True),
        (math.log(2), 12.0, ["sigmoid"], True),
        (math.nan, 0.0, ["sigmoid"], True),
        (math.log(2), math.nan, ["sigmoid"], True),
        (25.0, 0.0, ["ipo"], False),
        (25.0, 0.5, ["ipo"], True),
    ],
)
def test_a_wrong_reference_stops_the_run(loss: float, difference: float, loss_type: list[str], wrong: bool) -> None:
    if wrong:
        with pytest.raises(DivergedError, match="the DPO reference is not the SFT policy"):
            reference.check(loss, difference, 0.1, loss_type, 1e-3)
    else:
        expected = reference.check(loss, difference, 0.1, loss_type, 1e-3)
        assert expected == (math.log(2) if loss_type == ["sigmoid"] else None)
        assert loss_type == ["ipo"] or reference.check(loss / 2, 0.0, 0.1, loss_type, 1e-3, [0.5]) == math.log(2) / 2


def test_dpo_from_an_adapter_that_changed_is_refused(
    run: tuple[RunConfig, Dataset], sft: Trained, tmp_path: Path
) -> None:
    work = job_of(run, tmp_path, "dpo", adapter=sft.adapter)
    other = tmp_path / "other"
    shutil.copytree(sft.adapter, other)
    (other / "adapter_config.json").write_text("{}")
    with pytest.raises(DivergedError, match="changed since SFT wrote it"):
        job.train(work.model_copy(update={"adapter": other}))


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_adapters_are_byte_reproducible(
    run: tuple[RunConfig, Dataset], sft: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Two processes, two hash seeds, one thread and two: the same bytes in every published file."""
    made = []
    for threads in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", threads)
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        extra = {"adapter": sft.adapter} if stage == "dpo" else {}
        made.append(job.train(job_of(run, tmp_path / threads, stage, **extra)))
    first, second = made
    assert (first.record.compute.threads, second.record.compute.threads) == (1, 2)
    assert first.record.adapter_hash == second.record.adapter_hash
    assert fingerprint.manifest(first.adapter) == fingerprint.manifest(second.adapter)
    assert losses(first) == losses(second)


def test_the_published_adapter_sits_on_the_original_base(run: tuple[RunConfig, Dataset], dpo: Trained) -> None:
    """Loaded with plain peft, it gives what the training's last evaluation gave."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = json.loads((dpo.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert settings["base_model_name_or_path"] == Path(run[0].base_model.source).name
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(run[0].base_model.source, dtype=torch.float32), str(dpo.adapter)
    )
    tokenizer = AutoTokenizer.from_pretrained(dpo.adapter)
    total = 0.0
    rows = list(run[1].rows("held_out"))
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], return_dict=True)["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits.log_softmax(-1)
        total += sum(logps[0, at - 1, ids[at]].item() for at in range(len(prompt), len(ids)))
    # transformers averages over batches of 8; the set is a multiple or close to one
    assert total / len(rows) == pytest.approx(dpo.record.metrics["logps/chosen"], rel=0.05)


def test_finished_work_is_not_done_twice(run: tuple[RunConfig, Dataset], sft: Trained) -> None:
    out = sft.adapter.parent.parent.parent
    start = time.monotonic()
    again = job.train(job_of(run, out, "sft"))
    assert time.monotonic() - start < 2
    assert again.record == sft.record


def test_a_finished_adapter_that_was_damaged_is_trained_again(
    run: tuple[RunConfig, Dataset], sft: Trained, tmp_path: Path
) -> None:
    folder = tmp_path / "jobs" / sft.adapter.parent.name
    shutil.copytree(sft.adapter.parent, folder)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    again = job.train(job_of(run, tmp_path, "sft"))
    assert fingerprint.of_directory(again.adapter) == sft.record.adapter_hash


def test_a_warm_up_longer_than_the_run_is_refused(run: tuple[RunConfig, Dataset], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft\.warmup_steps: 10 of \d+ steps .* would be warm-up"):
        job.train(job_of(run, tmp_path, "sft", settings={"warmup_steps": 10}))


def test_an_engine_that_cannot_run_is_an_error_and_stock_trl_can_be_chosen(
    run: tuple[RunConfig, Dataset], sft: Trained, dpo: Trained, tmp_path: Path
) -> None:
    stock = job.train(job_of(run, tmp_path, "dpo", adapter=sft.adapter, settings={"engine": "trl"}))
    assert (stock.record.engine, dpo.record.engine) == ("trl", "shared_prompt")
    for (step, ours), (_, theirs) in zip(losses(dpo), losses(stock), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3), f"step {step}"


def test_shares_of_a_run() -> None:
    assert sorted(steps_of_share(0.2, 10)) == [2, 4, 6, 8, 10]
    assert sorted(steps_of_share(0.2, 37)) == [7, 15, 22, 30, 37]
    assert sorted(steps_of_share(0.5, 3)) == [2, 3]
    assert sorted(steps_of_share(0.2, 1)) == [1]
    assert sorted(steps_of_share(0.3, 10)) == [3, 6, 9, 10]
    assert sorted(steps_of_share(0.7, 10)) == [7, 10]
    assert sorted(steps_of_share(0.333, 3000)) == [999, 1998, 3000], "a third of the run, three times"


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    "weights", [("adapter_config.json", "adapter_model.safetensors"), ("model.safetensors",), SHARDS], ids=len
)
def test_checkpoints_are_only_trusted_as_sealed(tmp_path: Path, weights: tuple[str, ...]) -> None:
    for step in (4, 8, 9):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if weights == SHARDS:
            index = {"weight_map": dict(zip("ab", SHARDS, strict=True))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for name in (*checkpoints.NEEDED, *weights):
            (folder / name).write_bytes(os.urandom(64))
        if step == 9:
            (folder / weights[-1]).unlink()
        checkpoints.seal(folder, {})
    assert checkpoints.problem(tmp_path / "checkpoint-9") == f"it has no {weights[-1]}"
    shutil.rmtree(tmp_path / "checkpoint-9")
    newest = tmp_path / "checkpoint-8"
    assert checkpoints.newest_good(tmp_path) == (newest, [])
    damages = {
        "zero tail": lambda: (newest / "optimizer.pt").write_bytes(
            (newest / "optimizer.pt").read_bytes()[:-8] + bytes(8)
        ),
        "missing": lambda: (newest / "scheduler.pt").unlink(),
        "cut manifest": lambda: (newest / checkpoints.SEAL).write_text('{"optimizer'),
        "no manifest": lambda: (newest / checkpoints.SEAL).unlink(),
        "empty": lambda: (shutil.rmtree(newest), newest.mkdir()),
    }
    for damage in damages.values():
        damage()
        good, rejected = checkpoints.newest_good(tmp_path)
        assert good == tmp_path / "checkpoint-4"
        assert rejected[0].startswith("checkpoint-8: ")


@pytest.mark.faults
def test_a_run_that_diverges_is_stopped_and_nothing_is_kept(
    run: tuple[RunConfig, Dataset], sft: Trained, tmp_path: Path
) -> None:
    """NaN in one weight: transformers alone would log loss 0.0 and save it."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "adapter"
    shutil.copytree(sft.adapter, broken)
    weights = load_file(broken / "adapter_model.safetensors")
    first = next(iter(weights))
    weights[first][0, 0] = math.nan
    save_file(weights, broken / "adapter_model.safetensors")
    with pytest.raises(DivergedError):
        job.train(job_of(run, tmp_path, "dpo", adapter=broken))
    assert not list(tmp_path.glob("jobs/*/result.json"))
    assert not list(tmp_path.glob("jobs/*/adapter"))
