"""Full fine-tuning (`lora: null`): every weight trains, through the same stages, proofs and registry."""

import functools
import json
from pathlib import Path
from typing import Any

import faulty
import pytest
import torch
import yaml
from conftest import Project, make_project
from test_scoring import sft_of_both, tiny, trainer, word_level

from preference_tuning import config, jobs, preflight
from preference_tuning.config import BaseModelConfig
from preference_tuning.data.table import Dataset
from preference_tuning.errors import ConfigError
from preference_tuning.evaluation import deciding
from preference_tuning.evaluation import scores as scores_of
from preference_tuning.models import chat, compute, loading, weights
from preference_tuning.models.rows import tokenise
from preference_tuning.models.source import locate
from preference_tuning.registry.folder import Version
from preference_tuning.training import job
from preference_tuning.training.job import TrainingRecord


def model_of(tied: bool) -> Any:
    model = tiny("Llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


def assert_alike(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor], tied: bool) -> None:
    """Each gradient by itself: embeddings, norms and head are small beside all the others together."""
    assert ours.keys() == stock.keys()
    assert ("lm_head.weight" in ours) is not tied
    for name, gradient in stock.items():
        assert (ours[name] - gradient).norm() / gradient.norm() < 1e-4, name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("loss_type", [["sigmoid"], ["ipo"], ["sigmoid", "sft"]], ids=str)
def test_dpo_of_every_weight_equals_stock_trl(tmp_path: Path, tied: bool, loss_type: list[str]) -> None:
    found = []
    for shared in (True, False):
        engine = trainer(tmp_path, model_of(tied), shared, loss_type)
        assert engine.ref_model is None, "no second model in memory"
        engine.model.train()
        loss = engine.compute_loss(engine.model, engine.data_collator([dict(row) for row in engine.train_dataset]))
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in engine.model.named_parameters()}))
    (ours, our_gradients), (stock, stock_gradients) = found
    assert ours == pytest.approx(stock, abs=1e-5, rel=1e-5)
    assert_alike(our_gradients, stock_gradients, tied)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_sft_of_every_weight_equals_stock_trl(tmp_path: Path, tied: bool) -> None:
    (our_loss, ours), (stock_loss, stock) = sft_of_both(tmp_path, model_of(tied))
    assert our_loss == pytest.approx(stock_loss, abs=1e-5)
    assert_alike(ours, stock, tied)


@pytest.mark.parametrize("kind", ["tied", "sharded", "experts"])
def test_saved_weights_are_restored_exactly(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts lie in the file under other names than in memory: transformers' own resume skips them silently."""
    from transformers import MixtralConfig, MixtralForCausalLM

    monkeypatch.setattr(weights, "SHARD_SIZE", "20KB" if kind == "sharded" else "5GB")
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "pad_token_id": 0}
    model, other = (
        MixtralForCausalLM(MixtralConfig(**sizes, **heads)) if kind == "experts" else model_of(kind == "tied")
        for _ in range(2)
    )
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    for name in ("one", "two"):
        weights.save(model, word_level(), tmp_path / name, BaseModelConfig(source="x"))
    assert weights.problem(tmp_path / "one") is None
    assert len(weights.files(tmp_path / "one")) == (1 if kind != "sharded" else len(list(tmp_path.glob("one/model*"))))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    weights.restore(other, tmp_path / "one")
    for mine, its in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, its)
    (tmp_path / "one" / weights.files(tmp_path / "one")[-1]).unlink()
    assert str(weights.problem(tmp_path / "one")).endswith("is missing")


def test_what_cannot_train_whole_is_told(tmp_path: Path) -> None:
    text = """\
parameters:
  base_model: {source: org/model, load_in_4bit: true, backend: unsloth}
  lora:
  data: {source: rows.jsonl}
  dpo: {beta: -1}
"""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as told:
        config.load(path)
    for line in (
        "run.yaml:2: parameters.base_model.load_in_4bit: 4-bit weights do not train",
        "run.yaml:2: parameters.base_model.backend: unsloth trains adapters here",
        "run.yaml:3: parameters.lora: is empty; write null to train every weight",
        "run.yaml:5: parameters.dpo.beta",
    ):
        assert line in str(told.value)
    path.write_text("parameters:\n  base_model: {source: org/model}\n  lora: null\n  data: {source: rows.jsonl}\n")
    assert config.load(path).config.lora is None
    with pytest.raises(ConfigError, match="lora: is empty"):
        config.load(path, ["lora="])


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Project:
    """A project in which one full run is done."""
    made = make_project(tmp_path_factory.mktemp("full"), tiny_model)
    made.configure(lambda parameters: parameters.update(lora=None))
    made.train()
    return made


@pytest.fixture(scope="module")
def version(project: Project) -> Path:
    (folder,) = (project.folder / "outputs" / "registry").glob("*/versions/*")
    return folder


def record(version: Path, stage: str) -> TrainingRecord:
    return TrainingRecord.model_validate_json((version / "evidence" / stage / job.RECORD).read_text(encoding="utf-8"))


@pytest.mark.whole
def test_a_full_run_trains_every_weight_from_the_sft_policy(version: Path) -> None:
    from transformers import AutoModelForCausalLM

    sft, dpo = record(version, "sft"), record(version, "dpo")
    model = AutoModelForCausalLM.from_pretrained(version / "model")
    assert sft.trainable_parameters == dpo.trainable_parameters == sum(p.numel() for p in model.parameters())
    proof = dpo.reference
    assert proof is not None
    assert proof.loss == pytest.approx(0.693147, abs=1e-5)
    assert proof.largest_difference < 1e-3
    assert proof.sft_adapter_hash == sft.adapter_hash
    assert dpo.metrics["loss"] < 0.6


@pytest.mark.whole
def test_a_published_full_model_is_loaded_as_any_model(project: Project, version: Path) -> None:
    """By plain transformers, to the log-probabilities of the evaluation, pair by pair; so are base and SFT model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manifest = Version.model_validate_json((version / "manifest.json").read_text(encoding="utf-8"))
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= set(manifest.model_files)
    assert manifest.verdict.decision == "promote"
    settings = json.loads((version / "model" / "config.json").read_text(encoding="utf-8"))
    assert (settings["use_cache"], settings["dtype"]) == (True, "float32")
    card = (version / "model" / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card
    assert "AutoModelForCausalLM.from_pretrained(FOLDER" in card
    scores = scores_of.read(version / "evidence" / "evaluation" / deciding.SCORES)
    (sft,) = project.folder.glob("outputs/jobs/sft-*/adapter")
    tokenizer = AutoTokenizer.from_pretrained(version / "model")
    table = Dataset(next(project.folder.glob("outputs/data/*/dataset"))).path("held_out")
    rows = tokenise(table, tokenizer, chat.Room(128), project.folder / "again", answers=2).rows
    document = yaml.safe_load((project.folder / "run.yaml").read_text(encoding="utf-8"))
    folders = {"base": Path(document["parameters"]["base_model"]["source"]), "sft": sft, "dpo": version / "model"}
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        for i, row in enumerate(rows):
            ids, start = torch.tensor([row["prompt_ids"] + row["chosen_ids"]]), len(row["prompt_ids"])
            with torch.no_grad():
                logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[start - 1 :]
            assert logps.sum().item() == pytest.approx(scores[f"{name}/chosen"][i], abs=1e-3), name


@pytest.mark.whole
def test_check_warns_of_an_adapters_learning_rate(project: Project) -> None:
    run = config.load(project.folder / "run.yaml", ["dpo.learning_rate=1e-6"]).config
    run = run.model_copy(update={"output_dir": str(project.folder / "outputs")})
    first, second, *_ = preflight.check(run).splitlines()
    assert first.endswith("every weight is trained")
    assert second.strip() == "warning: sft.learning_rate 0.003 is a rate for adapters; usual here is 2e-05"


@pytest.mark.whole
def test_a_killed_full_job_goes_on_to_the_same_weights(project: Project, version: Path, tmp_path: Path) -> None:
    run = config.load(project.folder / "run.yaml").config
    dataset = Dataset(next(project.folder.glob("outputs/data/*/dataset")))
    (sft,) = project.folder.glob("outputs/jobs/sft-*/adapter")
    work = job.from_artifacts(
        "dpo", run.base_model, locate(run.base_model), dataset, tmp_path, dpo=run.dpo, adapter=sft
    )
    folder = faulty.place(work)
    assert faulty.run(folder, functools.partial(faulty.kill_at_step, 4)) == faulty.KILLED
    assert faulty.run(folder) == 0
    resumed = TrainingRecord.model_validate_json((folder / jobs.RESULT).read_text(encoding="utf-8"))
    assert resumed.resumed_at != []
    assert resumed.adapter_hash == record(version, "dpo").adapter_hash


def test_weights_that_are_quantised_do_not_train(tmp_path: Path, tiny_model: Path) -> None:
    settings = BaseModelConfig(source=str(tiny_model), dtype="float32")
    base = loading.load_base(settings, locate(settings), tmp_path, compute.choose(settings, tmp_path), full=True)
    base.model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ConfigError, match="quantised"):
        loading.new_policy(base, None, seed=0)
