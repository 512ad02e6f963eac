"""The same work is the same wherever it lies, and no key in a config gets further than the message that refuses it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, preference_rows, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from test_unfinished import job

from preference_tuning import config, events, fingerprint
from preference_tuning.config import (
    BaseModelConfig,
    DataConfig,
    EvaluationConfig,
    HarnessConfig,
    RunConfig,
    place,
    secrecy,
)
from preference_tuning.config.place import portable, portable_text
from preference_tuning.data import job as data_job
from preference_tuning.data.__main__ import main as prepare
from preference_tuning.errors import ConfigError
from preference_tuning.evaluation.job import EvaluationJob
from preference_tuning.models.source import ModelSource
from preference_tuning.reports import Interval, forest, line_chart
from preference_tuning.reports.markdown import code, plain


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ("/home/me/models/tiny", "tiny"),
        ("/home/me/rows.jsonl", "rows.jsonl"),
        ("~/rows.jsonl", "rows.jsonl"),
        ("~me", "~"),
        ("data/rows.jsonl", "data/rows.jsonl"),
        ("org/model", "org/model"),
        ("package:llm/model.gguf", "package:llm/model.gguf"),
        ("https://me:pw@host/rows.jsonl?sig=s#f", "https://host/rows.jsonl"),
        ("s3://bucket/registry", "s3://bucket/registry"),
        ("sqlite:////home/me/runs.db", "sqlite:///runs.db"),
        ("file:///home/me/runs", "file:///runs"),
    ],
)
def test_a_place_without_its_machine(given_: str, told: str) -> None:
    assert portable(given_) == told
    assert portable(told) == told


def test_every_place_of_a_config_is_portable() -> None:
    """A field that gets a path and is no place would publish it."""
    home = "/home/me"
    run = RunConfig.model_validate(
        {
            "output_dir": f"{home}/out",
            "base_model": {"source": f"{home}/model", "chat_template": f"{home}/t.jinja"},
            "data": {
                "sources": [{"source": f"{home}/a.jsonl"}, {"source": "~/b"}],
                "sft_source": {"source": f"{home}/s"},
            },
            "evaluation": {"general": f"{home}/g.txt", "lm_eval": {"tasks": ["t"], "include_path": f"{home}/tasks"}},
            "registry": {"folder": f"{home}/reg", "push": [{"to": "mlflow", "tracking_uri": f"sqlite:///{home}/m.db"}]},
        }
    )
    published = run.portable()
    assert home not in published.model_dump_json()
    assert "~" not in published.model_dump_json()
    assert published.base_model == BaseModelConfig(source="model", chat_template="t.jinja")
    assert run.model_dump_json().count(home) == 9, "where the work is done the whole path is known"
    assert published.portable() == published
    assert published.model_fields_set == run.model_fields_set


def data_of(folder: Path, template: str, rows: int = 40) -> data_job.DataJob:
    """The data job of one of several places with the same work in it."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        write_jsonl(folder / name / "rows.jsonl", preference_rows(rows, seed=1 if name == "a" else 2 + len(template)))
    (folder / "t.jinja").write_text(template)
    return data_job.DataJob(
        config=DataConfig(sources=[{"source": str(folder / name / "rows.jsonl")} for name in ("a", "b")]),
        fingerprints=[fingerprint.of_file(folder / name / "rows.jsonl") for name in ("a", "b")],
        tokens=data_job.Tokens(
            base_model=BaseModelConfig(source=str(folder / "model"), chat_template=str(folder / "t.jinja")),
            source=ModelSource(kind="directory", location=str(folder / "model"), fingerprint="f"),
            max_length=64, sft_length=64,
        ),
        output_dir=folder,
    )  # fmt: skip


def test_the_same_work_elsewhere_is_the_same_job(tmp_path: Path) -> None:
    """Jobs of data, training and evaluation; another template is other work, although its file has the same name."""
    found: list[list[str]] = []
    for place_, template in (("one", "{{ 1 }}"), ("two", "{{ 1 }}"), ("three", "{{ 2 }}")):
        folder = tmp_path / place_
        data = data_of(folder, template)
        assert data.tokens is not None
        (folder / "tasks").mkdir()
        training = job(folder, base_model=data.tokens.base_model, source=data.tokens.source)
        evaluation = EvaluationJob(
            base_model=data.tokens.base_model, source=data.tokens.source, data=folder, data_fingerprint="d",
            config=EvaluationConfig(lm_eval=HarnessConfig(tasks=("t",), include_path=str(folder / "tasks"))),
            adapters={"sft": folder}, adapter_hashes={"sft": "h"}, beta=0.1, max_length=64, max_prompt_length=None,
            keep_end=False, output_dir=folder,
        )  # fmt: skip
        assert str(tmp_path) not in json.dumps([training.identity(), evaluation.identity(), data.identity()])
        assert str(tmp_path) not in evaluation.terms.model_dump_json()
        found.append([fingerprint.of_value(work.identity()) for work in (data, training, evaluation)])
    assert found[0] == found[1]
    assert all(one != other for one, other in zip(found[0], found[2], strict=True))


def test_sources_of_one_name_are_told_apart_without_their_folders(tmp_path: Path) -> None:
    work = data_of(tmp_path / "here", "")
    manifest = prepare(tmp_path, work.model_copy(update={"tokens": None}))
    assert [source.name for source in manifest.sources] == ["rows.jsonl (1)", "rows.jsonl (2)"]
    for path in (tmp_path / data_job.DATASET).iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_events_tell_nothing_of_the_machine(tmp_path: Path) -> None:
    folder = tmp_path / "jobs of mine" / "sft-1"
    folder.mkdir(parents=True)
    message = f"the job in {folder} failed: [Errno 28] No space left on device: '{tmp_path}/x.tmp'"
    events.add(folder, "retried", message, cause=["https://me:pw@host/x?sig=1", {"at": "/home/me/cache"}], attempt=2)
    (event,) = events.read(folder)
    assert event.message == "the job in sft-1 failed: [Errno 28] No space left on device: 'x.tmp'"
    assert event.facts == {"cause": ["https://host/x", {"at": "cache"}], "attempt": 2}
    assert portable_text("3 of 50 rows and/or 1/2, see docs/training.md") == (
        "3 of 50 rows and/or 1/2, see docs/training.md"
    )


# --- keys in a config -----------------------------------------------------------------------------------------------

KEY = "canaryKeyThatNobodyMaySee"
TOKEN = "hf_" + KEY * 2
MINIMAL = "parameters:\n  base_model: {source: org/model}\n  data: {source: rows.jsonl}\n"


def refusal(folder: Path, text: str, *overrides: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        config.load(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        f"environment: {{COMET_API_KEY: {KEY}}}\n",
        f"environment: {{DB_PASS: {KEY}}}\n",
        "environment: {HF_TOKEN: '${HF_TOKEN}'}\n",
        "extra: {owner: '${HF_TOKEN}'}\n",
        f"extra: {{owner: {TOKEN}}}\n",
        f"tags: [{TOKEN}]\n",
        f"settings: {{docker: {{environment: {{WANDB_KEY: {KEY}}}}}}}\n",
        f"settings: {{orchestrator: {{apiToken: {KEY}}}}}\n",
        f"settings: {{orchestrator: {{pod_settings: {{env: [{{name: HF_TOKEN, value: {KEY}}}]}}}}}}\n",
        f"settings: {{docker: {{parent_image: 'https://me:{KEY}@registry.example/image'}}}}\n",
        f"steps: {{train_sft: {{environment: {{AWS_SECRET_ACCESS_KEY: {KEY}}}}}}}\n",
        f"init_hook_kwargs: {{password: {KEY}}}\n",
    ],
)
def test_a_key_in_zenmls_part_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    told = refusal(tmp_path, text + MINIMAL)
    assert "stored in ZenML's database" in told
    assert "secrets: [NAME]" in told
    assert KEY not in told


def test_a_key_in_an_override_is_refused(tmp_path: Path) -> None:
    told = refusal(tmp_path, MINIMAL, f"environment.HF_TOKEN={KEY}")
    assert "--set: environment.HF_TOKEN: by its name this is a key" in told
    assert KEY not in told


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("data", {"source": f"https://me:{KEY}@host/rows.jsonl"}, "write env:ROWS_URL here"),
        ("data", {"source": f"https://host/rows.jsonl?sig={KEY}"}, "write env:ROWS_URL here"),
        ("data", {"source": f"env:{KEY}"}, "the name of an environment variable, in capitals"),
        (
            "data",
            {"source": "a.jsonl", "sft_source": {"source": f"https://h/a.jsonl?{KEY}"}},
            "write env:ROWS_URL here",
        ),
        ("base_model", {"source": f"https://me:{KEY}@host/model"}, "must be an address alone"),
        ("registry", {"folder": f"s3://me:{KEY}@bucket/x"}, "must be an address alone"),
        (
            "registry",
            {"push": [{"to": "mlflow", "tracking_uri": f"https://me:{KEY}@host"}]},
            "must be an address alone",
        ),
        (
            "registry",
            {"push": [{"to": "huggingface", "repo_id": "a/b", "token_env": TOKEN}]},
            "looks like a Hugging Face",
        ),
        ("tracking", {"mode": TOKEN}, "(not shown)"),
    ],
)
def test_a_key_in_our_part_is_refused_and_not_repeated(
    tmp_path: Path, section: str, values: dict[str, Any], told: str
) -> None:
    document = yaml.safe_load(MINIMAL)
    document["parameters"].setdefault(section, {}).update(values)
    message = refusal(tmp_path, yaml.safe_dump(document))
    assert told in message
    assert KEY not in message


def test_what_is_no_key_is_let_through() -> None:
    kubernetes = {
        "service_account_name": "trainer", "image_pull_secrets": ["registry"],
        "pod_settings": {
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}],
            "affinity": {"topologyKey": "kubernetes.io/hostname"},
        },
    }  # fmt: skip
    document = {
        "environment": {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": 4, "HF_TOKEN": None, "MONKEY": "yes"},
        "secrets": ["hub_token"],
        "settings": {
            "orchestrator": kubernetes,
            "docker": {"requirements": ["x"], "environment": {"LOG": "${HOME}/log"}},
        },
        "extra": {"ticket": "https://tracker.example/issues?id=7", "max_tokens": 7},
        "parameters": {"evaluation": {"judge": {"max_tokens": 64, "api_key_env": "OPENAI_API_KEY"}}},
    }
    assert list(secrecy.problems(document)) == []
    for path in (ROOT / "configs").glob("*.yaml"):
        assert list(secrecy.problems(yaml.safe_load(path.read_text(encoding="utf-8")))) == [], path.name


@given(st.text(st.characters(exclude_characters="/?#")))
def test_no_address_keeps_a_secret(text: str) -> None:
    for address in (f"https://{text}@host/x", f"https://host/x?{text}"):
        assert place.holds_secret(address)


# --- words of others in a card --------------------------------------------------------------------------------------

EVIL = "x`|\n# <script>alert(1)</script> [a](http://evil) ![b](http://evil) **b**"


def test_words_of_others_stay_words_in_markdown_and_svg() -> None:
    assert code(EVIL).count("`") == 2
    assert "\n" not in code(EVIL) + plain(EVIL)
    assert "<" not in plain(EVIL).replace("\\<", "")
    assert "http://" not in plain(EVIL)
    for chart in (
        line_chart(EVIL, {EVIL: [(0, 1), (1, 2)], "b\x00": [(0, 2), (1, 1)]}, x_label=EVIL),
        forest(EVIL, [Interval(EVIL, -1, 0, 1, EVIL, "good")], EVIL),
    ):
        import xml.etree.ElementTree as ET

        root = ET.fromstring(chart.alone)
        assert {tag.tag.rpartition("}")[2] for tag in root.iter()} <= {
            "svg", "style", "rect", "text", "g", "line", "polyline", "circle",
        }  # fmt: skip
