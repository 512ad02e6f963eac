"""Published models: loaded again they compute what was measured; in other forms they are still the same model."""

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import preference_rows, tiny_parameters
from in_process import Lab
from safetensors.torch import load_file, save_file
from test_verdicts import command, mend, rewrite

from preference_tuning.config import RegistryConfig, RunConfig
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.evaluation import probes as probes_of
from preference_tuning.models import merging
from preference_tuning.registry import export, roundtrip
from preference_tuning.registry.export import llama_cpp, ollama, placing, reading
from preference_tuning.registry.folder import FolderRegistry

PRECISIONS = ("float32", "bfloat16")
WEIGHTS, PROBES = "adapter_model.safetensors", "evidence/evaluation/probes.json"
STAND_IN = Path(__file__).with_name("converter.py")


class Published:
    """A registry with one version, and the lab that made it."""

    def __init__(self, lab: Lab, dtype: str, **changes: Any) -> None:
        rows = lab.rows("rows", [{**row, "topic": None} for row in preference_rows(48)])
        self.lab = lab
        self.changes = {"data": {"source": rows}, "base_model": {"dtype": dtype}, **changes}
        self.registered = lab.run(**self.changes)[1]
        self.outputs = lab.folder / "outputs"

    @property
    def id(self) -> str:
        return self.registered.version.id

    @property
    def config(self) -> RunConfig:
        """The config that says where the base model is."""
        return self.lab.config(**self.changes)

    def copy(self, folder: Path) -> tuple[FolderRegistry, Path]:
        """Return a copy of the registry, and the folder of its version."""
        shutil.copytree(self.lab.registry.root, folder / "registry")
        registry = FolderRegistry(RegistryConfig(folder=str(folder / "registry")))
        return registry, registry.path(self.id)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[dict[str, Published]]:
    """One version trained and measured in each precision, and one of which every weight was trained."""
    parameters = tiny_parameters(tiny_model, Path("none"))
    parameters["finetuning_type"] = "sft"
    parameters["base_model"] |= {"threads": 1, "device": "cpu"}
    parameters["data"] = {"held_out": 0.25}
    parameters["evaluation"]["samples"] = 0
    with pytest.MonkeyPatch.context() as patch:
        made = {dtype: Published(Lab(tmp_path_factory.mktemp(dtype), parameters, patch), dtype) for dtype in PRECISIONS}
        made["full"] = Published(Lab(tmp_path_factory.mktemp("full"), parameters, patch), "float32", lora=None)
        yield made


# --- the round trip -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [*PRECISIONS, "full"])
def test_what_was_published_computes_what_was_measured(published: dict[str, Published], which: str) -> None:
    made = published[which]
    found = roundtrip.verify(made.lab.registry, made.id[:6], made.config, made.outputs)
    assert str(found).splitlines()[-1] == "holds", str(found)
    assert [name for name, _ in found.checks][-2:] == [roundtrip.TEXT, roundtrip.NUMBERS]
    assert len(found.checks) == 12, "the ten of the verdict as well"
    probes = probes_of.read(found.evaluation / "probes.json")
    assert (len(probes.probes), probes.dtype) == (4, "bfloat16" if which == "bfloat16" else "float32")
    tokens = sum(len(ids) for probe in probes.probes for ids in probe.answers)
    assert found.notes[-1].endswith(f"now in {probes.dtype} on cpu"), found.notes
    assert f"over {tokens} tokens" in found.notes[-1]


def one_weight(version: Path) -> None:
    path = version / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] += 1e-2
    save_file(weights, path, {"format": "pt"})


def a_matrix(version: Path) -> None:
    path = version / "model" / WEIGHTS
    weights = load_file(path)
    save_file({name: w + 3e-2 if "lora_B" in name else w for name, w in weights.items()}, path, {"format": "pt"})


def another_template(version: Path) -> None:
    path = version / "model" / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "helper"))


def another_tokenizer(version: Path) -> None:
    """Digits by themselves: the same text, other tokens."""

    def change(document: dict[str, Any]) -> None:
        digits = {"type": "Digits", "individual_digits": True}
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, document["pre_tokenizer"]]}
        document["model"]["merges"] = document["model"]["merges"][:40]

    rewrite(version / "model" / "tokenizer.json", change)


FORGED: list[tuple[str, Callable[[Path], None], str]] = [
    ("full", one_weight, f"changed  {roundtrip.NUMBERS}: largest difference"),
    ("bfloat16", a_matrix, f"changed  {roundtrip.NUMBERS}: largest difference"),
    ("float32", another_template, f"changed  {roundtrip.TEXT}: the chat template is another one"),
    ("float32", another_template, "its prompt is rendered as another text, from character"),
    ("float32", another_tokenizer, f"changed  {roundtrip.TEXT}: pair"),
]


@pytest.mark.parametrize(("which", "change", "told"), FORGED, ids=lambda value: getattr(value, "__name__", None))
def test_what_was_forged_with_its_manifest_is_named(
    published: dict[str, Published], tmp_path: Path, which: str, change: Callable[[Path], None], told: str
) -> None:
    registry, version = published[which].copy(tmp_path)
    change(version)
    mend(version)
    found = roundtrip.verify(registry, "champion", published[which].config, tmp_path)
    assert found.checks[0] == ("files of the version", []), "the forger was careful"
    assert told in str(found), str(found)
    assert found.problems


def test_changed_probes_are_not_what_was_decided_on(published: dict[str, Published], tmp_path: Path) -> None:
    """A forger who also measures the probes anew meets the bonds of the verdict."""
    registry, version = published["float32"].copy(tmp_path)
    rewrite(version / PROBES, lambda probes: probes["probes"][0]["chosen_logps"].__setitem__(0, float("-1.5")))
    mend(version)
    told = str(roundtrip.verify(registry, "champion", published["float32"].config, tmp_path))
    assert "changed  what was measured: probes.json is not what was decided on" in told
    assert f"changed  {roundtrip.NUMBERS}" in told


def test_the_base_model_is_found_where_the_config_says_and_must_be_the_same(
    published: dict[str, Published], tmp_path: Path, tiny_model: Path
) -> None:
    made = published["float32"]
    registry, version = made.copy(tmp_path)
    rewrite(version / "manifest.json", lambda m: m["config"]["base_model"].update(source="./tiny-model"))
    mend(version)
    lost = roundtrip.verify(registry, "champion", None, tmp_path)
    (problem,) = lost.checks[-1][1]
    assert problem.startswith("not compared: base_model.source: no such file"), problem
    assert "--config CONFIG" in problem

    def at(folder: Path) -> Any:
        config = made.lab.config(base_model={"source": str(folder)})
        return roundtrip.verify(registry, "champion", config, tmp_path)

    moved = Path(shutil.copytree(tiny_model, tmp_path / "moved"))
    assert at(moved).checks[-1] == (roundtrip.NUMBERS, [])
    weights = load_file(moved / "model.safetensors")
    save_file({name: w * 1.01 for name, w in weights.items()}, moved / "model.safetensors", {"format": "pt"})
    assert "is not the base model of" in str(at(moved).checks[-1][1])
    # Even a fingerprint that was forged everywhere does not help: the numbers are others.
    true = roundtrip.locate(made.lab.config(base_model={"source": str(moved)}).base_model).fingerprint
    rewrite(version / "manifest.json", lambda m: m["base_model"].update(fingerprint=true))
    assert at(moved).checks[-1][1][0].startswith("largest difference"), at(moved)


def test_a_version_from_before_probes_is_no_failure(published: dict[str, Published], tmp_path: Path) -> None:
    registry, version = published["float32"].copy(tmp_path)
    (version / PROBES).unlink()
    mend(version)
    found = roundtrip.verify(registry, "champion", None, tmp_path)
    assert "without probes" in found.notes[-1]
    assert [name for name, problems in found.checks if problems] == ["what was measured"], "the bonds know of them"


def test_the_command(
    published: dict[str, Published],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = published["float32"]
    registry, version = made.copy(tmp_path)
    document = made.lab.config(**made.changes, registry={"folder": str(registry.root)}).model_dump(mode="json")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"parameters": document}), encoding="utf-8")

    def registry_command(*words: str) -> tuple[int, str]:
        return command(monkeypatch, capsys, *words, verb="registry")

    code, told = registry_command("verify", "--config", str(config))
    assert (code, told.splitlines()[-1]) == (0, "holds")
    a_matrix(version)
    code, told = registry_command("verify", "champion", "--json", "--config", str(config))
    found = json.loads(told[told.index("{") :])
    assert (code, found["holds"], found["version"]) == (1, False, made.id)
    assert {check["name"] for check in found["checks"] if check["problems"]} >= {
        "files of the version",
        roundtrip.NUMBERS,
    }
    for words, status, message in (
        (["verify", "nothing"], 2, "no version 'nothing'"),
        (["export", "nothing", "--as", "merged", "--to", "x"], 2, "no version 'nothing'"),
        (["export", made.id, "--as", "merged", "--to", "x"], 1, "is not what was published: model/adapter_model"),
        (["export", made.id, "--as", "merged", "--to", "x", "--template", "y"], 2, "--template belongs to"),
        (["export", made.id, "--as", "merged", "--to", "x", "--llama-cpp", "y"], 2, "--llama-cpp belongs to"),
        (["export", made.id, "--as", "gguf", "--to", "x"], 2, "name its folder with --llama-cpp or LLAMA_CPP_DIR"),
    ):
        code, told = registry_command(*words, "--config", str(config))
        assert (code, message in told) == (status, True), told


# --- the merged model -----------------------------------------------------------------------------------------------


def test_a_merged_model_is_the_version_in_16_bits(published: dict[str, Published], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = published["float32"]
    version = made.lab.registry.path(made.id)
    folder = export.merged(version, made.config.base_model, tmp_path / "merged", made.outputs)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert tokenizer.eos_token_id in torch.tensor([model.generation_config.eos_token_id]).flatten()
    # Plain transformers, the arithmetic of nobody else: the probes are what they were, within 16 bits.
    model.float().eval()
    for probe in probes_of.read(version / PROBES).probes:
        assert list(tokenizer(probe.text, add_special_tokens=False)["input_ids"]) == probe.text_ids
        ids, start = torch.tensor([probe.prompt_ids + probe.chosen_ids]), len(probe.prompt_ids)
        with torch.no_grad():
            logps = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        found = logps.gather(1, ids[0, start:, None])[:, 0]
        assert (found - torch.tensor(probe.chosen_logps)).abs().max() < 0.05
    record = placing.Record.model_validate_json((folder / "export.json").read_text())
    assert record.made["compared"]["largest"] < 0.05
    assert str(tmp_path) not in (folder / "export.json").read_text() + (folder / "README.md").read_text()
    assert "base_model_relation: finetune" in (folder / "README.md").read_text()
    # The same again is found finished, and something else is not overwritten.
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert export.merged(version, made.config.base_model, folder, made.outputs) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="holds something else"):
        export.merged(version, made.config.base_model, folder, made.outputs, "f32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_a_model_trained_whole_is_only_rounded(published: dict[str, Published], tmp_path: Path) -> None:
    made = published["full"]
    version = made.lab.registry.path(made.id)
    folder = export.merged(version, made.config.base_model, tmp_path / "whole", made.outputs)
    before, after = (load_file(place / "model.safetensors") for place in (version / "model", folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(weight.bfloat16(), after[name]) for name, weight in before.items())


def test_a_merged_model_that_computes_something_else_is_not_put_in_place(
    published: dict[str, Published], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = published["float32"]
    version = made.lab.registry.path(made.id)

    def forget(model: Any, config: Any) -> Any:
        return model.unload()

    with monkeypatch.context() as patch:
        patch.setattr(merging, "_whole", forget)
        with pytest.raises(PreferenceTuningError, match=r"the merged model is not the version: largest difference"):
            export.merged(version, made.config.base_model, tmp_path / "merged", made.outputs)
    with monkeypatch.context() as patch:
        patch.setattr(merging.machine_memory, "of_machine", lambda: 1_000_000)
        with pytest.raises(PreferenceTuningError, match=r"merging needs 0\.0 GB of memory"):
            export.merged(version, made.config.base_model, tmp_path / "merged", made.outputs)
    assert list(tmp_path.iterdir()) == []


# --- GGUF and Ollama ------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path_factory: pytest.TempPathFactory) -> llama_cpp.LlamaCpp:
    folder = tmp_path_factory.mktemp("llama.cpp")
    shutil.copyfile(STAND_IN, folder / llama_cpp.CONVERTER)
    return llama_cpp.LlamaCpp(folder)


def run_export(made: Published, form: Any, folder: Path, llama: llama_cpp.LlamaCpp, **how: Any) -> Path:
    return export.export(
        made.lab.registry, made.id, form, folder, made.config, made.outputs, llama_cpp=llama.folder, **how
    )


def test_a_gguf_file_with_a_modelfile(
    published: dict[str, Published], tmp_path: Path, llama: llama_cpp.LlamaCpp
) -> None:
    from gguf import GGUFReader

    made = published["float32"]
    folder = run_export(made, "ollama", tmp_path / "o", llama)
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "README.md", "export.json", "model.gguf"]
    reader = GGUFReader(folder / "model.gguf")
    assert reader.get_field("general.architecture").contents() == "llama"
    assert reader.get_field(reading.ADD_BOS).contents() is False, "whatever the converter thought"
    text = (folder / "Modelfile").read_text()
    assert '\nFROM ./model.gguf\nTEMPLATE """{{ range .Messages }}' in text
    assert text.endswith('<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"\n')
    assert "ollama create preference-tuned -f Modelfile" in (folder / "README.md").read_text()


def test_a_go_template_of_the_users_own_is_taken_as_it_is(published: dict[str, Published], tmp_path: Path) -> None:
    registered = published["float32"].registered
    template = tmp_path / "own.gotmpl"
    template.write_text("{{ range .Messages }}{{ .Content }}{{ end }}")
    prepared = ollama.prepare(registered.folder / "model", template)
    assert (prepared.bos, prepared.stops) == (None, ["<|im_end|>"])
    text = ollama.render(registered.version, prepared, ['a "b"', "</s>"], "model.gguf")
    assert f'TEMPLATE """{template.read_text()}"""\nPARAMETER stop "a \\"b\\""\nPARAMETER stop "</s>"' in text
    template.write_text("hello")
    with pytest.raises(ConfigError, match=r"is no Go template for Ollama"):
        ollama.prepare(registered.folder / "model", template)


def test_smaller_types_go_through_the_quantiser(
    published: dict[str, Published], tmp_path: Path, llama: llama_cpp.LlamaCpp
) -> None:
    made = published["full"]
    with pytest.raises(ConfigError, match=r"q4_k_m is made by llama-quantize, which is not in"):
        run_export(made, "gguf", tmp_path / "g", llama, outtype="q4_k_m")
    with pytest.raises(ConfigError, match=r"unknown type 'int4'"):
        run_export(made, "gguf", tmp_path / "g", llama, outtype="int4")
    quantiser = llama.folder / "build" / "bin" / "llama-quantize"
    quantiser.parent.mkdir(parents=True)
    quantiser.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] && cp "$1" "$2"\n')
    quantiser.chmod(0o755)
    folder = run_export(made, "gguf", tmp_path / "g", llama, outtype="q4_k_m")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "export.json", "model.gguf"]
    assert "base_model_relation: quantized" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "NotImplementedError: BPE pre-tokenizer was not recognized - update",
            "how the tokenizer of this model splits",
        ),
        ("ModuleNotFoundError: No module named 'sentencepiece'", "its Python has no sentencepiece; install it there"),
        ("ERROR:hf-to-gguf:Model StrangeForCausalLM is not supported", "the architecture StrangeForCausalLM"),
        ("Traceback:\n  x\nsomething else\n", "something else (all of it is in"),
    ],
)
def test_a_converter_that_fails_is_explained(
    tmp_path: Path, llama: llama_cpp.LlamaCpp, monkeypatch: pytest.MonkeyPatch, said: str, told: str
) -> None:
    monkeypatch.setenv("SAYS", said)
    with pytest.raises(PreferenceTuningError, match=re.escape(f"{llama_cpp.CONVERTER} failed: ")) as caught:
        llama.convert(tmp_path, tmp_path / "model.gguf", "f16", 1, tmp_path / "jobs" / "log")
    assert told in str(caught.value)


def test_a_file_that_is_not_the_model_is_not_put_in_place(
    published: dict[str, Published], tmp_path: Path, llama: llama_cpp.LlamaCpp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOSES_A_TOKEN", "1")
    with pytest.raises(PreferenceTuningError, match=r"is not the model: it has (\d+) tokens, and the model \d+$"):
        run_export(published["full"], "gguf", tmp_path / "g", llama)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif("LLAMA_CPP_DIR" not in os.environ, reason="LLAMA_CPP_DIR names no llama.cpp")
def test_the_real_converter_does_not_know_a_tokenizer_made_here(
    published: dict[str, Published], tmp_path: Path
) -> None:
    llama = llama_cpp.LlamaCpp(None)
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(PreferenceTuningError, match="how the tokenizer"):
        run_export(published["full"], "gguf", tmp_path / "g", llama)
