"""lm-evaluation-harness: what is refused before a run, and what it is given; the last test needs the package itself."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import preference_rows, write_jsonl

from preference_tuning.config import BaseModelConfig, HarnessConfig, LoraConfig
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.evaluation import harness
from preference_tuning.models.source import locate

TASK = """\
task: {name}
tag: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{[chosen, rejected]}}}}"
doc_to_target: 0
process_docs: !function anything.that_is_not_run
metric_list: [{{metric: acc}}]
"""


def harness_rows(count: int = 24) -> list[dict[str, str]]:
    """Pairs of which a model cannot get all right: every third one is turned round."""
    rows = preference_rows(count)
    for row in rows[::3]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows


def task_folder(folder: Path, count: int = 24) -> Path:
    folder.mkdir()
    data = write_jsonl(folder / "rows.jsonl", harness_rows(count))
    text = TASK.format(name="pairs", data=data).replace("process_docs: !function anything.that_is_not_run\n", "")
    (folder / "pairs.yaml").write_text(text, encoding="utf-8")
    (folder / "group.yaml").write_text("group: everything\ntask: [pairs]\n", encoding="utf-8")
    return folder


def work(folder: Path, model: Path, **settings: Any) -> harness.HarnessJob:
    """The tasks on the tiny model and on an adapter that is not zero."""
    import torch

    from preference_tuning.models import compute, loading, weights

    base_model = BaseModelConfig(source=str(model), device="cpu", dtype="float32", max_seq_length=128)
    chosen = compute.choose(base_model, folder)
    base = loading.load_base(base_model, locate(base_model), folder, chosen)
    adapted = loading.new_adapter(base, LoraConfig(rank=2), seed=1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    weights.save(adapted, base.tokenizer, folder / "adapter", base_model)
    return harness.HarnessJob(
        config=HarnessConfig(**{"tasks": ("pairs",), "include_path": str(folder / "tasks"), **settings}),
        base_model=base_model, source=locate(base_model), adapters={"sft": folder / "adapter"},
        adapter_hashes={"sft": "a"}, batch_size=4, seed=7, output_dir=folder,
    )  # fmt: skip


def test_what_cannot_run_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = task_folder(tmp_path / "tasks")
    (folder / "other.yaml").write_text(TASK.format(name="other", data="x"), encoding="utf-8")
    there = HarnessConfig(tasks=("pairs", "everything", "ours", "other"), include_path=str(folder))
    monkeypatch.setattr(harness, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"lm-evaluation-harness, which is missing: pip install '\.\[lm-eval\]'"):
        harness.check(there)
    monkeypatch.setattr(harness, "find_spec", lambda _: ModuleSpec("lm_eval", None))
    assert harness.check(there) == "lm_eval tasks pairs, everything, ours, other"
    with pytest.raises(
        ConfigError, match=r"tasks: hellaswag not found in .*it has everything, other, ours, ours, pairs|pairs"
    ):
        harness.check(HarnessConfig(tasks=("pairs", "hellaswag"), include_path=str(folder)))
    with pytest.raises(ConfigError, match=r"include_path: no such folder"):
        harness.check(HarnessConfig(tasks=("pairs",), include_path=str(tmp_path / "none")))
    (folder / "broken.yaml").write_text("task: [", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"include_path: cannot read .*broken\.yaml"):
        harness.check(there)


def test_results_become_figures_with_their_intervals() -> None:
    results = {
        "pairs": {"alias": "pairs", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact,strict": 1, "exact_stderr,strict": "N/A"},
        "everything": {"acc,none": 0.25, "acc_stderr,none": 0.0},
    }  # fmt: skip
    found = harness.figures(results)
    assert set(found) == {"lm_eval/pairs/acc", "lm_eval/pairs/exact@strict", "lm_eval/everything/acc"}
    accuracy = found["lm_eval/pairs/acc"]
    assert (accuracy.low, accuracy.value, accuracy.high) == pytest.approx((0.5 - 0.196, 0.5, 0.5 + 0.196), abs=1e-4)
    assert str(found["lm_eval/pairs/exact@strict"]) == "1.000 [nan, nan]"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """An lm_eval that measures the model that it is given by one token's probability, and tells what it was told."""
    told: list[dict[str, Any]] = []

    def simple_evaluate(model: Any, **how: Any) -> dict[str, Any]:
        import torch

        with torch.no_grad():
            measured = model.pretrained(input_ids=torch.arange(5)[None]).logits.softmax(-1)[0, -1, 0].item()
        told.append({**vars(model), **how})
        return {
            "results": {task: {"p,none": measured, "p_stderr,none": 0.01} for task in how["tasks"] if task != "mute"}
        }

    parts = {
        "lm_eval": {"simple_evaluate": simple_evaluate, "__version__": "9.9"},
        "lm_eval.tasks": {"TaskManager": lambda **how: SimpleNamespace(**how)},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **how: SimpleNamespace(**how)},
    }
    for name, values in parts.items():
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return told


def test_every_model_is_given_to_the_harness(tmp_path: Path, tiny_model: Path, stand_in: list[dict[str, Any]]) -> None:
    task_folder(tmp_path / "tasks")
    job = work(tmp_path, tiny_model, tasks=("pairs", "mute"), limit=3, num_fewshot=2)
    found = harness.main(tmp_path, job)
    assert found.version == "9.9"
    values = [found.models[name]["lm_eval/pairs/p"].value for name in ("base", "sft")]
    assert values[0] != values[1]
    assert harness.HarnessResult.model_validate_json(found.model_dump_json()) == found
    for told in stand_in:
        assert (told["tasks"], told["limit"], told["num_fewshot"]) == (["pairs", "mute"], 3, 2)
        assert (told["batch_size"], told["max_length"], told["fewshot_random_seed"]) == (4, 128, 7)
        assert vars(told["task_manager"]) == {"include_path": job.config.include_path, "include_defaults": False}
    silent = job.model_copy(update={"config": HarnessConfig(tasks=("mute",), include_path=job.config.include_path)})
    with pytest.raises(PreferenceTuningError, match="mute gave no figure"):
        harness.main(tmp_path, silent)


def test_edited_tasks_are_other_work(tmp_path: Path, tiny_model: Path) -> None:
    folder = task_folder(tmp_path / "tasks")
    base_model = BaseModelConfig(source=str(tiny_model))
    job = harness.HarnessJob(
        config=HarnessConfig(tasks=("pairs",), include_path=str(folder)), base_model=base_model,
        source=locate(base_model), adapters={}, adapter_hashes={}, batch_size=4, seed=7, output_dir=tmp_path,
    )  # fmt: skip
    before = job.identity()
    assert job.model_copy(update={"output_dir": Path("elsewhere")}).identity() == before
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}), encoding="utf-8")
    assert job.identity() != before


def test_the_real_harness_finds_what_a_plain_forward_finds(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task_folder(tmp_path / "tasks")
    found = harness.run(work(tmp_path, tiny_model, tasks=("everything",)))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)

    def log_probability(prompt: str, answer: str) -> float:
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(f"{prompt} {answer}")["input_ids"]])
        with torch.no_grad():
            logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        return float(logps[start - 1 :].sum())

    rows = harness_rows()
    wins = [log_probability(r["prompt"], r["chosen"]) > log_probability(r["prompt"], r["rejected"]) for r in rows]
    accuracy = found.models["base"]["lm_eval/pairs/acc"]
    assert accuracy.value == pytest.approx(sum(wins) / len(wins))
    assert 0 < sum(wins) < len(wins)
    assert accuracy.low < accuracy.value < accuracy.high
    assert found.models["sft"]["lm_eval/pairs/acc"] != accuracy
