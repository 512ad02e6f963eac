"""Settings of the model, the adapter, the evaluation and the registry: each arrives where it acts."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import preference_rows, write_jsonl

from preference_tuning import config, hub, preflight
from preference_tuning.config import RunConfig
from preference_tuning.data import job as data_job
from preference_tuning.data import prepare
from preference_tuning.errors import ConfigError, TransientError
from preference_tuning.evaluation import deciding, statistics
from preference_tuning.evaluation import job as evaluation_job
from preference_tuning.evaluation import scores as scores_of
from preference_tuning.models import backend, chat, compute, loading, scoring, weights
from preference_tuning.models.source import locate
from preference_tuning.registry.folder import FolderRegistry


def configured(folder: Path, model: Path | str, **changes: Any) -> RunConfig:
    """Return the config that a YAML file with ``changes`` to its sections gives."""
    parameters: dict[str, Any] = {"base_model": {"source": str(model)}, "data": {"source": "rows.jsonl"}}
    for section, values in changes.items():
        parameters[section] = {**parameters.get(section, {}), **values} if isinstance(values, dict) else values
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"parameters": parameters}), encoding="utf-8")
    return config.load(path).config


def loaded(run: RunConfig, folder: Path) -> loading.Base:
    return loading.load_base(run.base_model, locate(run.base_model), folder, compute.choose(run.base_model, folder))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


# --- base model -----------------------------------------------------------------------------------------------------


def test_the_revision_of_a_hub_model_is_what_is_loaded(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = {None: "a" * 40, "v2": "b" * 40}
    asked: list[tuple[str, str]] = []

    def download(repo: str, commit: str) -> Path:
        asked.append((repo, commit))
        return tiny_model

    monkeypatch.setattr(hub, "resolve_commit", lambda repo, revision, kind: commits[revision])
    monkeypatch.setattr(hub, "download_model", download)
    monkeypatch.setattr(hub, "download_tokenizer", download)
    for source, settings in (("org/one", {}), ("org/two", {"revision": "v2"})):
        base = loaded(configured(tmp_path, source, base_model=settings), tmp_path)
        assert set(asked) == {(source, commits[settings.get("revision")])}
        asked.clear()
        model = loading.new_adapter(base, config.LoraConfig(target_modules=("q_proj",)), 1)
        weights.save(model, base.tokenizer, tmp_path / source, base.config)
        saved = yaml.safe_load((tmp_path / source / "adapter_config.json").read_text())
        assert (saved["base_model_name_or_path"], saved["revision"]) == (source, settings.get("revision"))
    local = locate(configured(tmp_path, tiny_model).base_model)
    assert (local.kind, local.location) == ("directory", str(tiny_model))


def test_device(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("a machine with a GPU")
    with pytest.raises(ConfigError, match=r"base_model\.device: cuda is asked for, and torch sees no CUDA device"):
        loaded(configured(tmp_path, tiny_model, base_model={"device": "cuda"}), tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    picked = {
        name: compute.device_of(configured(tmp_path, tiny_model, base_model={"device": name}).base_model)
        for name in ("auto", "cpu", "cuda")
    }
    monkeypatch.undo()
    assert picked == {"auto": "cuda", "cpu": "cpu", "cuda": "cuda"}
    base = loaded(configured(tmp_path, tiny_model, base_model={"device": "cpu", "dtype": "float32"}), tmp_path)
    assert {p.device.type for p in base.model.parameters()} == {"cpu"}


def test_dtype(tmp_path: Path, tiny_model: Path) -> None:
    from preference_tuning.training import arguments

    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        run = configured(tmp_path, tiny_model, base_model={"device": "cpu", "dtype": name})
        base = loaded(run, tmp_path)
        assert {p.dtype for p in base.model.parameters()} == {dtype}
        assert arguments.sft(run.sft, base, tmp_path).bf16 == (name == "bfloat16")
    with pytest.raises(ConfigError, match="float16 does not train on a CPU"):
        loaded(configured(tmp_path, tiny_model, base_model={"dtype": "float16"}), tmp_path)


def test_unsloth_is_loaded_with_the_settings(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, cuda: None
) -> None:
    from transformers import AutoModelForCausalLM

    told: list[dict[str, Any]] = []

    def from_pretrained(**how: Any) -> tuple[Any, None]:
        told.append(how)
        return AutoModelForCausalLM.from_pretrained(how["model_name"]), None

    def get_peft_model(model: Any, **how: Any) -> Any:
        told.append(how)
        return model

    stand_in = ModuleType("unsloth")
    stand_in.FastLanguageModel = SimpleNamespace(from_pretrained=from_pretrained, get_peft_model=get_peft_model)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth", stand_in)
    settings = {"backend": "unsloth", "max_seq_length": 300, "load_in_4bit": True, "dtype": "float16"}
    run = configured(tmp_path, tiny_model, base_model=settings, lora={"rank": 3, "alpha": 5, "dropout": 0.1})
    backend.activate(run.base_model)
    loading.new_adapter(loaded(run, tmp_path), run.lora, seed=9)
    loader, adapter = told
    assert (loader["max_seq_length"], loader["dtype"], loader["load_in_4bit"]) == (300, torch.float16, True)
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"], adapter["random_state"]) == (3, 5, 0.1, 9)
    assert adapter["target_modules"] == list(run.lora.target_modules)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"base_model\.backend: unsloth needs a CUDA GPU"):
        backend.activate(run.base_model)


def test_four_bits(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, cuda: None) -> None:
    from transformers import AutoModelForCausalLM

    told: list[dict[str, Any]] = []

    def from_pretrained(folder: Path, **how: Any) -> Any:
        told.append(how)
        return torch.nn.Linear(2, 2)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_: module)
    run = configured(tmp_path, tiny_model, base_model={"load_in_4bit": True, "dtype": "float16"})
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"base_model\.load_in_4bit: needs bitsandbytes, which is missing"):
        loaded(run, tmp_path)
    monkeypatch.setattr(loading, "find_spec", lambda name: object())
    loaded(run, tmp_path)
    loaded(configured(tmp_path, tiny_model, base_model={"dtype": "float16"}), tmp_path)
    quantised, plain = told
    how = quantised["quantization_config"]
    assert (how.load_in_4bit, how.bnb_4bit_quant_type, how.bnb_4bit_compute_dtype) == (True, "nf4", torch.float16)
    assert "quantization_config" not in plain


@pytest.mark.parametrize("optim", ["auto", "adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_optimizers(optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from preference_tuning.training import arguments

    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="8bit needs bitsandbytes, which is not installed"):
        arguments.optimizer(optim, on_cpu=False)
    monkeypatch.setattr(arguments, "find_spec", lambda name: object())
    assert arguments.optimizer(optim, on_cpu=False) == optim.replace("auto", "adamw_8bit")
    assert arguments.optimizer("auto", on_cpu=True) == "adamw_torch_fused"


def test_the_chat_template_makes_the_tokens(tmp_path: Path, tiny_model: Path) -> None:
    jinja = tmp_path / "template.jinja"
    jinja.write_text("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}")
    asked, said = [{"role": "user", "content": "Why?"}], [{"role": "assistant", "content": "So."}]
    texts = []
    for template in ("chatml", str(jinja)):
        base = loaded(configured(tmp_path, tiny_model, base_model={"chat_template": template}), tmp_path)
        (row,) = chat.encode(base.tokenizer, [chat.Conversation(asked, [said])], chat.Room(64))
        assert isinstance(row, chat.Encoded)
        texts.append(base.tokenizer.decode(row.prompt_ids + row.answer_ids[0]))
    turns = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    assert texts == [turns, "[user] Why?<|im_end|>[assistant] So.<|im_end|>"]


# --- the adapter ----------------------------------------------------------------------------------------------------


def test_the_adapter_is_the_one_asked_for(tmp_path: Path, tiny_model: Path) -> None:
    for settings in (
        {"rank": 2, "alpha": 8, "dropout": 0.0, "target_modules": ["v_proj", "q_proj"]},
        {"rank": 5, "alpha": 5, "dropout": 0.25, "target_modules": ["down_proj"]},
    ):
        run = configured(tmp_path, tiny_model, base_model={"device": "cpu"}, lora=settings)
        model = loading.new_adapter(loaded(run, tmp_path), run.lora, seed=1)
        layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_dropout")}
        assert {name.rpartition(".")[2] for name in layers} == set(settings["target_modules"])  # type: ignore[arg-type]
        for layer in layers.values():
            assert layer.lora_A["default"].weight.shape[0] == settings["rank"]
            assert layer.scaling["default"] == settings["alpha"] / settings["rank"]  # type: ignore[operator]
            assert getattr(layer.lora_dropout["default"], "p", 0.0) == settings["dropout"]


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_an_evaluation_is_the_one_asked_for(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModelForCausalLM

    from preference_tuning.evaluation.__main__ import main

    source = write_jsonl(tmp_path / "rows.jsonl", preference_rows(40))
    text = tmp_path / "general.txt"
    text.write_text("An oak is old.\n\nThe moon is plain, and so is bread.")
    seen: dict[str, set[int]] = {}
    batches, generate = scoring.batches, PeftModelForCausalLM.generate

    def watched_scoring(pairs: Any, batch_size: int) -> Any:
        for numbers in batches(pairs, batch_size):
            seen.setdefault("scored", set()).add(len(numbers))
            yield numbers

    def watched_generation(self: Any, **how: Any) -> Any:
        made = generate(self, **how)
        seen.setdefault("new_tokens", set()).add(made.shape[1] - how["input_ids"].shape[1])
        return made

    monkeypatch.setattr(scoring, "batches", watched_scoring)
    monkeypatch.setattr(PeftModelForCausalLM, "generate", watched_generation)
    for settings in (
        {"batch_size": 4, "samples": 2, "max_new_tokens": 3, "seed": 1},
        {"batch_size": 8, "samples": 0, "max_new_tokens": 3, "seed": 2},
        {"batch_size": 8, "samples": 5, "max_new_tokens": 6, "seed": 2, "general": str(text)},
    ):
        seen.clear()
        run = configured(
            tmp_path, tiny_model, base_model={"device": "cpu", "dtype": "float32"}, evaluation=settings,
            data={"source": str(source), "held_out": 0.4}, lora={"rank": 2}, tracking={"mode": "off"},
        )  # fmt: skip
        dataset = prepare.prepare(run.data, data_job.fingerprints_of(run.data), tmp_path / "data")
        adapter = tmp_path / "adapter"
        base = loaded(run, tmp_path)
        weights.save(loading.new_adapter(base, run.lora, 1), base.tokenizer, adapter, run.base_model)
        work = evaluation_job.from_artifacts(
            run.base_model, locate(run.base_model), dataset, {"sft": adapter}, run.evaluation, tmp_path,
            beta=0.3, max_length=100,
        )  # fmt: skip
        found = main(tmp_path, work)
        assert max(seen["scored"]) == settings["batch_size"]
        assert seen.get("new_tokens", {0}) == ({settings["max_new_tokens"]} if settings["samples"] else {0})
        assert len(found.samples) == settings["samples"]
        assert ("general/nll" in found.models["sft"]) == ("general" in settings)
        scores = scores_of.read(tmp_path / evaluation_job.EVIDENCE / deciding.SCORES)
        nll = -scores["base/chosen"] / scores["chosen_tokens"]
        by_hand = [statistics.mean(nll, scores["prompt"], seed).low for seed in (1, 2)]
        assert by_hand[0] != by_hand[1]
        assert found.models["base"]["nll/chosen"].low == pytest.approx(by_hand[settings["seed"] - 1])


def test_the_judges_key_may_be_a_zenml_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    from preference_tuning.evaluation import judge
    from steps import context

    key = "sk-canary-4f1d9b"
    kept = {"judge": {"api_key": key}, "other": {"user": "x"}}

    def get_secret(name: str, **how: bool) -> SimpleNamespace:
        assert how == {"allow_partial_name_match": False}
        return SimpleNamespace(secret_values=kept[name])

    monkeypatch.setattr(context, "Client", lambda: SimpleNamespace(get_secret=get_secret))
    monkeypatch.setenv("OPENAI_API_KEY", "")  # so that what the test sets is taken back
    monkeypatch.delenv("OPENAI_API_KEY")
    asked = {"url": "http://localhost/v1", "model": "m"}
    assert judge.check(config.JudgeConfig(**asked)).endswith("no key, OPENAI_API_KEY is not set")
    named = config.JudgeConfig(**asked, api_key_secret="judge")
    assert judge.check(named) == "judge m at http://localhost/v1, key in a ZenML secret"
    context.give_secrets(None, named)
    assert os.environ["OPENAI_API_KEY"] == key
    for name in ("other", key):
        wrong = config.JudgeConfig(**asked, api_key_secret=name)
        with pytest.raises(ConfigError, match="ZenML has no secret of that name with a value `api_key`") as caught:
            context.give_secrets(wrong)
        assert key not in str(caught.value)


# --- places and tracking --------------------------------------------------------------------------------------------


def test_where_things_go(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steps.context import Run

    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", preference_rows(4))
    for out, folder, name in (("outputs", "outputs/registry", "preference-tuned"), ("else/where", "kept", "m")):
        run = configured(tmp_path, tiny_model, output_dir=out, registry={"folder": folder, "name": name})
        assert data_job.of_run(run, None).output_dir == tmp_path / out
        step = Run(id="a" * 32, name="r", config=run, fresh=False)
        assert step.output_dir.absolute() == tmp_path / out
        assert step.tracking.run.path == tmp_path / out / "tracking" / step.id
        assert FolderRegistry(run.registry).folder == tmp_path / folder / name
    assert configured(tmp_path, tiny_model).output_dir == "outputs"


def test_a_hub_out_of_reach_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection is an error of httpx, which is no OSError."""
    import huggingface_hub.constants
    from huggingface_hub import HfApi

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi.__init__, "__defaults__", ("http://127.0.0.1:9", *HfApi.__init__.__defaults__[1:]))
    with pytest.raises(TransientError, match="cannot reach the hub to find the model 'a/b'"):
        hub.resolve_commit("a/b", None, "model")
    (found,) = preflight.look(configured(tmp_path, "a/b"), only=["model"])
    assert (found.area, found.level, found.exit_code) == ("model", "error", 1), "nothing in the config is wrong"
