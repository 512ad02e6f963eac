"""What a published version holds, and what it must not: secrets, places on a machine, files that run when loaded."""

import getpass
import json
import pickle
import re
import socket
import struct
import subprocess
import tempfile
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import CANARIES, Finished
from safetensors.numpy import save_file

from preference_tuning.config import BaseModelConfig, RegistryConfig
from preference_tuning.data.table import Manifest
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.evaluation.gate import Rule, Verdict
from preference_tuning.evaluation.job import load_summary
from preference_tuning.models.description import describe
from preference_tuning.models.source import ModelSource
from preference_tuning.registry import card, contents, provenance
from preference_tuning.registry.evidence import records
from preference_tuning.registry.folder import FolderRegistry, Version, version_id


def registry_of(finished: Finished) -> FolderRegistry:
    return FolderRegistry(RegistryConfig(folder=str(finished.project.folder / "outputs" / "registry")))


@pytest.fixture
def published(finished: Finished) -> Path:
    """The folder of the version that the finished run published."""
    # Other tests register more versions in the same project.
    return registry_of(finished).path(finished.run["steps"]["register"]["metadata"]["version"])


@pytest.fixture
def version(finished: Finished, published: Path) -> Version:
    return registry_of(finished).version(published.name)


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield every file as text: of tables the cells, of weights what is written before them."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            yield name, f"{table.to_pydict()} {table.schema} {table.schema.metadata}"
        elif path.suffix == ".safetensors":
            content = path.read_bytes()
            yield name, content[8 : 8 + struct.unpack("<Q", content[:8])[0]].decode()
        elif path.is_file():
            yield name, path.read_text(encoding="utf-8")


# --- what it must not hold ------------------------------------------------------------------------------------------


def test_a_version_tells_nothing_of_the_machine_that_made_it(
    finished: Finished, published: Path, tiny_model: Path
) -> None:
    """Base model and data of the run are named by absolute paths, and the project lies in a folder like any user's."""
    home = finished.project.folder.parent
    places = [str(place) for place in (home, tiny_model, tiny_model.parent, Path.home(), tempfile.gettempdir())]
    names = [re.escape(name) for name in (socket.gethostname(), f"/{getpass.getuser()}") if name]
    files = dict(texts(published))
    assert {name.partition("/")[0] for name in files} == {"model", "evidence", "manifest.json"}
    for name, text in files.items():
        assert not [place for place in places if place in text], name
        assert not re.search(rf"(?<!\w)({'|'.join(names)})(?!\w)", text), name
    assert all(name in files["manifest.json"] for name in (tiny_model.name, "rows.jsonl")), "by their last names"


def test_no_secret_is_written_down(finished: Finished, published: Path) -> None:
    """Neither in what is published, nor in ZenML's database and store, nor among the jobs and their logs."""
    everything = finished.project.folder.parent
    own = {finished.project.folder / ".git" / "config"}
    found = []
    for path in everything.rglob("*"):
        if path.is_file() and path not in own:
            content = path.read_bytes()
            found += [(path, name) for name, secret in CANARIES.items() if secret.encode() in content]
    assert found == []
    assert (everything / "zenml" / "local_stores" / "default_zen_store" / "zenml.db").is_file()
    table = "".join(text for name, text in texts(published) if name.endswith(".parquet"))
    assert not [name for name, secret in CANARIES.items() if secret in table]


FACTS: dict[str, Any] = {
    "finetuning_type": "sft", "base_model": {}, "data": {}, "config": {}, "code": "", "metrics": {}, "run": {},
    "verdict": Verdict(decision="hold", candidate="sft", rules=[]),
}  # fmt: skip


def weights(folder: Path) -> Path:
    folder.mkdir()
    save_file({"w": np.zeros(2, np.float32)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("Do as you like.\n")
    return folder


def test_only_what_is_listed_is_published(tmp_path: Path) -> None:
    model, evidence = weights(tmp_path / "model"), tmp_path / "evidence"
    evidence.mkdir()
    assert contents.problems(model, {"dpo": evidence}) == []
    (model / "training_args.bin").write_bytes(pickle.dumps({}))
    (model / "tokenizer.model").write_bytes(b"\x0a\x07")
    (model / "renamed.safetensors").write_bytes(pickle.dumps(list(range(99))))
    (model / "cut.safetensors").write_bytes((model / "adapter_model.safetensors").read_bytes()[:-1])
    with zipfile.ZipFile(model / "archive.txt", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({}))
    (model / "broken.json").write_text('{"a": ')
    (model / "notes.txt").write_bytes(pickle.dumps([1]))
    (model / "more").symlink_to("/etc")
    (evidence / "code.py").touch()
    (evidence / "scores.parquet").write_text("no table")
    (evidence / "metrics.jsonl").write_text("{}\n{\n")
    registry = FolderRegistry(RegistryConfig(folder=str(tmp_path / "registry")))
    with pytest.raises(PreferenceTuningError, match="nothing is published") as caught:
        registry.publish(model, {"dpo": evidence}, {}, FACTS)
    told = str(caught.value).partition("nothing is published: ")[2].split("; ")
    assert sorted(line.split()[0] for line in told) == [
        "dpo/code.py", "dpo/metrics.jsonl", "dpo/scores.parquet", "model/archive.txt", "model/broken.json",
        "model/cut.safetensors", "model/more", "model/notes.txt", "model/renamed.safetensors", "model/tokenizer.model",
        "model/training_args.bin",
    ]  # fmt: skip
    assert not registry.folder.exists()


# --- what it holds --------------------------------------------------------------------------------------------------


def test_a_version_says_what_made_it_and_where_more_is(
    finished: Finished, published: Path, version: Version, tiny_model: Path
) -> None:
    asked = ["git", "-C", str(finished.project.folder), "rev-parse", "HEAD"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    assert (version.software["commit"], version.software["modified"]) == (commit, False)
    assert {"preference_tuning", "python", "torch", "transformers", "trl", "peft"} <= set(version.software)
    assert version.base_model["source"] == tiny_model.name
    assert (version.base_model["kind"], version.base_model["commit"]) == ("directory", None)
    assert version.links["ZenML run"] == finished.run["name"]
    assert version.links["Comet experiment"] == finished.run["id"]
    assert version.licence is None
    assert "Not known: the base model does not say" in (published / "model" / "README.md").read_text(encoding="utf-8")
    adapter = json.loads((published / "model" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["base_model_name_or_path"] == tiny_model.name


def test_a_version_from_before_is_still_read(published: Path) -> None:
    document = json.loads((published / "manifest.json").read_text(encoding="utf-8"))
    for name in ("licence", "software", "links"):
        del document[name]
    read = Version.model_validate(document)
    assert (read.licence, read.software, read.links) == (None, {}, {})


def test_what_is_read_of_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit of the project's own files and nothing else; nothing where there is no git, or not theirs."""
    package = tmp_path / provenance.fingerprint.PACKAGE.name
    package.mkdir()
    (package / "__init__.py").write_text("one = 1\n")
    monkeypatch.setattr(provenance.fingerprint, "PACKAGE", package)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def git(*command: str) -> None:
        me = ("-c", "user.name=me", "-c", "user.email=me@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *me, *command], check=True, capture_output=True)

    def told() -> tuple[object, object]:
        software = provenance.software()
        return software["commit"], software["modified"]

    assert told() == (None, None)
    git("init")
    git("commit", "--allow-empty", "-m", "another project's")
    assert told() == (None, None), "installed into somebody's repository"
    git("add", ".")
    git("commit", "-m", "ours")
    commit, modified = told()
    assert re.fullmatch("[0-9a-f]{40}", str(commit))
    assert modified is False
    (package / "__init__.py").write_text("one = 2\n")
    assert told() == (commit, True)
    monkeypatch.setenv("PATH", "")
    assert told() == (None, None)


def test_links_are_for_readers_elsewhere() -> None:
    run = {"zenml_run": "training-1", "zenml_url": "http://127.0.0.1:8237/runs/1", "comet_url": "https://comet.com/a/b"}
    assert provenance.links(run) == {"ZenML run": "training-1", "the experiment in Comet": "https://comet.com/a/b"}


def test_the_licence_is_the_configs_or_the_base_models(tmp_path: Path) -> None:
    base = ModelSource(kind="directory", location=str(tmp_path), fingerprint="0" * 64)
    assert provenance.licence(RegistryConfig(), base) is None
    (tmp_path / "README.md").write_text("---\nlicense: llama3.2\n---\n# A model\n")
    assert provenance.licence(RegistryConfig(), base) == "llama3.2"
    assert provenance.licence(RegistryConfig(license="Apache-2.0"), base) == "apache-2.0"


@pytest.mark.parametrize(
    ("files", "licence", "languages"),
    [
        ({"README.md": "---\nlicense: mit\nlanguage: [en, de]\ntags: [x]\n---\ntext\n---\n"}, "mit", ["en", "de"]),
        (
            {"README.md": "---\nlanguage: fr\n---\n", "LICENSE": "   Apache License\n   Version 2.0, "},
            "apache-2.0",
            ["fr"],
        ),
        ({"README.md": "---\nlicense: [\n---\n", "LICENSE.txt": "MIT License\n\nCopyright"}, "mit", []),
        ({"README.md": "no metadata", "LICENSE": "Terms of Use of Us"}, "other", []),
        ({"README.md": "---\nlicense: [mit, gpl]\n---\n"}, None, []),
        ({}, None, []),
    ],
)
def test_what_a_base_model_says_of_itself(
    tmp_path: Path, files: dict[str, str], licence: str | None, languages: list[str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = describe(ModelSource(kind="directory", location=str(tmp_path), fingerprint=""))
    assert (found.licence, found.languages) == (licence, languages)


def test_what_a_gguf_file_says_of_itself(tmp_path: Path) -> None:
    """Read up to the vocabulary, which is cut off here."""

    def text(words: str) -> bytes:
        return struct.pack("<Q", len(words)) + words.encode()

    values = [
        text("general.license") + struct.pack("<I", 8) + text("apache-2.0"),
        text("llama.context_length") + struct.pack("<II", 4, 2048),
        text("general.languages") + struct.pack("<IIQ", 9, 8, 1) + text("en"),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 49152),
    ]
    path = tmp_path / "model.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(values)) + b"".join(values))
    found = describe(ModelSource(kind="gguf", location=str(path), fingerprint=""))
    assert (found.licence, found.languages) == ("apache-2.0", ["en"])


# --- the model card -------------------------------------------------------------------------------------------------


def test_the_card_is_what_hubs_read(published: Path, version: Version) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(published / "model" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert card.data.tags == ["lora", "preference-tuning", "sft", "dpo"]
    # Neither the base model nor the data is one of a hub.
    assert (card.data.base_model, card.data.datasets, card.data.license) == (None, None, None)
    told = {result.metric_type: result.metric_value for result in card.data.eval_results}
    figures = version.metrics["models"]["dpo"]
    assert told["rewards/accuracies"] == pytest.approx(figures["rewards/accuracies"]["value"])
    assert told["nll/chosen"] == pytest.approx(figures["nll/chosen"]["value"], rel=1e-5)
    low, high = figures["nll/chosen"]["low"], figures["nll/chosen"]["high"]
    for words in (f"\\[{low:.3f}, {high:.3f}\\]", "all 9 rules passed", version.data["fingerprint"], "trl 1."):
        assert words in card.text


def test_the_charts_are_drawn_from_the_spool_and_are_no_part_of_the_id(published: Path, version: Version) -> None:
    model = published / "model"
    text = (model / "README.md").read_text(encoding="utf-8")
    charts = sorted(path.relative_to(model).as_posix() for path in model.glob("charts/*"))
    assert {"charts/sft-loss.svg", "charts/dpo-loss.svg", "charts/dpo-rewards.svg", "charts/dpo-accuracy.svg"} < {
        *charts
    }
    assert {*re.findall(r"!\[[\w-]+\]\((\S+)\)", text)} == {*charts}
    assert any(name.startswith("charts/evaluation-") for name in charts)
    for name in charts:
        drawn = ET.parse(model / name).getroot()
        assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
        assert drawn.findall(".//{http://www.w3.org/2000/svg}text")
    steps = (published / "evidence" / "sft" / "metrics.jsonl").read_text(encoding="utf-8").count("sft/train/loss")
    loss = ET.parse(model / "charts" / "sft-loss.svg")
    longest = max(line.get("points", "").count(",") for line in loss.iter("{http://www.w3.org/2000/svg}polyline"))
    assert longest == steps
    assert version_id(model) == version.id == published.name


def test_the_code_of_the_card_runs(
    published: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (published / "model" / "README.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    assert f'BASE = "{tiny_model.name}"' in code
    monkeypatch.chdir(published / "model")
    found: dict[str, Any] = {}
    exec(code.replace(f'"{tiny_model.name}"', repr(str(tiny_model))), found)
    assert type(found["model"]).__name__ == "PeftModelForCausalLM"
    assert (
        capsys.readouterr().out.strip()
        == found["tokenizer"]
        .decode(found["answer"][0, found["prompt"]["input_ids"].shape[1] :], skip_special_tokens=True)
        .strip()
    )


EVIL = "a`b|c\n---\n# <script>alert(1)</script> [d](http://evil)"


def card_of(published: Path, base: ModelSource, config: BaseModelConfig, **changes: Any) -> card.Card:
    """A card with the evidence of the finished run, for another base model."""
    evidence = published / "evidence"
    manifest = Manifest.model_validate_json((evidence / "data" / "manifest.json").read_text(encoding="utf-8"))
    evaluation = load_summary(evidence / "evaluation")
    told = {
        "name": "mine", "adapter": True, "base_model": config, "source": base, "licence": "mit", "languages": ["en"],
        "datasets": ["org/pairs"], "manifest": manifest, "evaluation": evaluation, "verdict": evaluation.verdict,
        "records": records({stage: evidence / stage for stage in ("sft", "dpo")}), "software": {}, "links": {},
        "charts": ["charts/sft-loss.svg"],
    }  # fmt: skip
    return card.Card(**{**told, **changes})


def test_the_card_of_a_model_on_a_hub(published: Path) -> None:
    from huggingface_hub import ModelCard

    base = ModelSource(kind="hub", location="org/base", fingerprint="c" * 40)
    config = BaseModelConfig(source="org/base", revision="c" * 40)
    text = card.render(card_of(published, base, config))
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == ("org/base", "adapter")
    assert (data.datasets, data.license, data.language) == (["org/pairs"], "mit", ["en"])
    assert f'from_pretrained("org/base", revision="{"c" * 40}", dtype="auto")' in text
    full = card.render(card_of(published, base, config, adapter=False))
    assert ModelCard(full).data.base_model_relation == "finetune"
    assert 'AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")' in full
    assert "peft" not in full.partition("```python")[2].partition("```")[0]


def test_the_card_of_a_model_in_a_file(published: Path) -> None:
    base = ModelSource(kind="gguf", location="/home/me/m.gguf", fingerprint="f" * 64)
    text = card.render(card_of(published, base, BaseModelConfig(source="package:llm/m.gguf")))
    assert 'BASE = Path("m.gguf")  # the file of the Python package llm\n' in text
    assert "gguf_file=BASE.name" in text
    assert "quantised GGUF file" in text
    assert "/home/me" not in text


def test_words_of_others_are_no_markup_in_a_card(published: Path) -> None:
    from huggingface_hub import ModelCard

    base = ModelSource(kind="directory", location="/m", fingerprint="f" * 64)
    told = card_of(published, base, BaseModelConfig(source="m"))
    named = [source.model_copy(update={"name": EVIL}) for source in told.manifest.sources]
    verdict = Verdict(
        decision="hold", candidate="dpo", rules=[Rule(name=EVIL, measured="1", wanted="2", outcome="failed")]
    )
    changes = {
        "manifest": told.manifest.model_copy(update={"sources": named}),
        "verdict": verdict,
        "links": {"run": EVIL},
    }
    text = card.render(replace(told, **changes))
    read = ModelCard(text)
    assert {result.dataset_name for result in read.data.eval_results} == {f"held-out pairs of {EVIL}"}
    assert read.text.strip().startswith("# mine\n")
    outside = re.sub(r"`[^`\n]*`", "", read.text.partition("```python")[0] + read.text.rpartition("```\n")[2])
    assert not re.search(r"(?<!\\)<script|(?<!\\)\[d|^# <", outside, re.MULTILINE)
