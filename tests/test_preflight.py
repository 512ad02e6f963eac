"""`run.py check`: everything that can be known before a run, all of it at once, and every finding by a real cause."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import ROOT, preference_rows, tiny_parameters, write_jsonl
from in_process import run_here

from preference_tuning import jobs, preflight
from preference_tuning.config import RunConfig
from preference_tuning.errors import ConfigError, DataError
from preference_tuning.jobs import machine_memory
from preference_tuning.preflight import batches, disk, findings, fit, memory, packages
from preference_tuning.preflight.batches import Row
from preference_tuning.preflight.findings import Area, Finding
from preference_tuning.preflight.world import World


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs that all checks here share: what was asked of torch once is not asked again."""
    return tmp_path_factory.mktemp("checks")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What is asked of torch is asked here, where it is loaded already; whole runs have their own processes."""
    if not request.node.get_closest_marker("whole"):
        monkeypatch.setattr(jobs, "run", run_here)


@pytest.fixture
def run(place: Path, tiny_model: Path) -> Callable[..., RunConfig]:
    def build(**changes: Any) -> RunConfig:
        parameters = tiny_parameters(tiny_model, write_jsonl(place / "rows.jsonl", preference_rows(64)))
        parameters |= {"output_dir": str(place / "outputs"), "registry": {"folder": str(place / "registry")}}
        for name, values in changes.items():
            parameters[name] = {**(parameters.get(name) or {}), **values} if isinstance(values, dict) else values
        return RunConfig.model_validate(parameters)

    return build


def told(found: list[Finding], level: str) -> list[str]:
    return [f"{f.area}: {f.text} -> {f.todo}" for f in found if f.level == level]


def test_a_good_config_has_findings_of_every_area(run: Callable[..., RunConfig]) -> None:
    found = preflight.look(run())
    assert told(found, "error") == []
    assert list(dict.fromkeys(f.area for f in found)) == [name for name, _ in preflight.AREAS]
    texts = {f.area: f.text for f in found if f.level == "ok"}
    assert texts["steps"].startswith("DPO: 12 optimizer steps of 8 rows (2 epochs of 46)")
    assert "warm-up 2 (17%), 5 evaluations, 5 checkpoints" in texts["steps"]
    assert "parameters, of which" in texts["shapes"]
    # A run shows the same, an area a line.
    lines = preflight.check(run()).splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [name for name, _ in preflight.AREAS]


def test_all_errors_are_told_once_and_the_config_outranks_the_data(run: Callable[..., RunConfig]) -> None:
    found = preflight.look(run(data={"source": "nowhere.jsonl"}, base_model={"source": "no/where/at/all"}))
    assert [f.area for f in found if f.level == "error"] == ["model", "data"]
    assert len({f.text for f in found if f.level == "error"}) == len([f for f in found if f.level == "error"])
    assert {"steps: not looked at: see data -> ", "memory: not looked at: see model -> "} <= set(told(found, "warning"))
    assert isinstance(findings.failure(found), ConfigError)
    assert json.loads(findings.as_json(found))["exit_code"] == 2
    only_data = preflight.look(run(data={"source": "nowhere.jsonl"}), only=("data",))
    assert isinstance(findings.failure(only_data), DataError)
    with pytest.raises(ConfigError, match="no such file"):
        preflight.check(run(data={"source": "nowhere.jsonl"}, base_model={"source": "no/where/at/all"}))


@pytest.mark.parametrize(
    ("changes", "area", "level", "message"),
    [
        ({"lora": {"target_modules": ["q_proj", "z_proj"]}}, "shapes", "error", "lora.target_modules: the model has no z_proj"),
        ({"dpo": {"max_length": 30}}, "lengths", "warning", "are longer than dpo.max_length 30"),
        ({"base_model": {"max_seq_length": 1024}}, "shapes", "warning", "rows may have 1,024 tokens, and the model was made for 512"),
        ({"sft": {"warmup_steps": 500}}, "data", "error", "sft.warmup_steps: 500 of 6 steps"),
        ({"sft": {"warmup_steps": 5}}, "data", "warning", "SFT spends 5 of 6 steps on warm-up"),
        ({"base_model": {"device": "cuda"}}, "device", "error", "base_model.device: cuda is asked for"),
        ({"base_model": {"load_in_4bit": True}}, "device", "error", "base_model.load_in_4bit: 4-bit training needs CUDA"),
        ({"base_model": {"backend": "unsloth"}}, "versions", "error", "base_model.backend: unsloth needs unsloth: unsloth is not"),
        ({"sft": {"optim": "adamw_8bit"}}, "versions", "error", "sft.optim: adamw_8bit needs bitsandbytes"),
        ({"tracking": {"mode": "online"}}, "tracking", "error", "needs COMET_API_KEY"),
        ({"base_model": {"chat_template": "nowhere.jinja"}}, "template", "error", "no such file"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_findings(run: Callable[..., RunConfig], changes: dict[str, Any], area: str, level: str, message: str) -> None:
    found = preflight.look(run(**changes), only=(area,))
    assert any(message in line for line in told(found, level)), found


def test_an_adapters_learning_rate_is_none_for_all_weights(run: Callable[..., RunConfig]) -> None:
    found = preflight.look(run().model_copy(update={"lora": None}), only=("model",))
    assert "sft.learning_rate 0.003 is a rate for adapters; usual here is 2e-05" in told(found, "warning")[0]


def test_templates_that_ask_in_another_form_than_they_teach(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    from preference_tuning.preflight.__main__ import _template

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    good = _template(tokenizer)
    assert (good.same, good.closes, good.pad, good.eos) == (True, True, "<|endoftext|>", "<|im_end|>")
    plain = str(tokenizer.chat_template)
    tokenizer.chat_template = plain.replace("<|im_start|>assistant", "<|im_start|>bot")
    assert not _template(tokenizer).same
    tokenizer.chat_template = plain.replace("<|im_end|>", "")
    assert not _template(tokenizer).closes
    tokenizer.chat_template, tokenizer.pad_token = plain, tokenizer.eos_token
    assert _template(tokenizer).pad == "<|im_end|>"


def test_shapes_and_sizes_are_those_of_the_real_model(run: Callable[..., RunConfig], tiny_model: Path) -> None:
    from transformers import LlamaForCausalLM

    from preference_tuning.models import compute, loading
    from preference_tuning.models.source import locate
    from preference_tuning.training.disk import checkpoint_size

    world = World(run())
    real = LlamaForCausalLM.from_pretrained(tiny_model)
    shapes = world.shapes
    assert (shapes.parameters, shapes.vocabulary, shapes.tied) == (real.num_parameters(), real.vocab_size, False)
    config = world.config
    source, out = locate(config.base_model), Path(config.output_dir)
    base = loading.load_base(config.base_model, source, out, compute.choose(config.base_model, out))
    policy = loading.new_adapter(base, config.lora, seed=0)
    assert shapes.trained(config.lora) == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert disk._checkpoint(world, "dpo") == checkpoint_size(
        policy.parameters(), base.tokenizer, "adamw_torch_fused", world.steps("dpo"), sharded=False
    )


def test_batches_are_counted_as_the_engine_lays_them_out() -> None:
    from preference_tuning.models import scoring

    rng = random.Random(3)
    for _ in range(20):
        rows = [Row(rng.randint(1, 40), (rng.randint(1, 30), rng.randint(1, 30))) for _ in range(rng.randint(1, 5))]
        fresh = iter(range(10_000))  # no two rows begin alike
        pairs = [
            {
                "prompt_ids": [next(fresh) for _ in range(row.prompt)],
                "chosen_ids": [next(fresh) for _ in range(row.answers[0])],
                "rejected_ids": [next(fresh) for _ in range(row.answers[1])],
            }
            for row in rows
        ]
        for shared in (True, False):
            laid, counted = scoring.pair_rows(pairs, shared, pad_id=0), batches.lay_out(rows, shared)  # type: ignore[arg-type]
            assert (counted.tokens, counted.answers) == (laid.input_ids.numel(), len(laid.targets))
            if laid.tree is not None:
                blocks = [(*block.queries.shape, block.keys.shape[1]) for block in laid.tree.blocks]
                assert list(counted.attention) == blocks


def test_a_model_that_does_not_fit_is_told_with_the_smallest_change_that_does(
    run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run(sft={"per_device_train_batch_size": 16}, dpo={"per_device_train_batch_size": 16})
    needs = fit.of_stage(World(config), "dpo").total

    def room(size: int) -> list[Finding]:
        monkeypatch.setattr(machine_memory, "of_machine", lambda: size)
        monkeypatch.setattr(machine_memory, "available", lambda: size)
        return [f for f in preflight.look(config, only=("memory",)) if f.text.startswith("DPO")]

    (fits,) = room(needs)
    assert (fits.level, fits.todo) == ("ok", "")
    (tight,) = room(needs - 1_000_000)
    assert tight.level == "warning"
    assert tight.todo.startswith("dpo.per_device_train_batch_size: 8 with gradient_accumulation_steps: 2 (0.")
    # The advice is what the same formula says of such a config.
    smaller = run(dpo={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2})
    assert fit.of_stage(World(smaller), "dpo").total <= needs - 1_000_000
    (never,) = room(memory.PROCESS["cpu"] // 2)
    assert never.level == "error"
    assert "not even with one row at a time" in never.text
    assert "no change is enough" in never.todo
    assert "gradient_checkpointing: true" in never.todo


def test_advice_for_full_fine_tuning_on_cuda_ends_in_an_adapter(run: Callable[..., RunConfig]) -> None:
    world = World(run())
    setup = fit.setup_of(world, "sft")
    full = fit.replace(setup, device="cuda", lora=None)
    kinds = [change.kind for change in fit._changes(world, "sft", full)]
    assert list(dict.fromkeys(kinds)) == ["batch", "checkpointing", "optimizer", "adapter"]
    adapted = [change.kind for change in fit._changes(world, "sft", fit.replace(setup, device="cuda"))]
    assert adapted[-1] == "bits"
    totals = [memory.needed(change.setup).total for change in fit._changes(world, "sft", full)]
    assert totals == sorted(totals, reverse=True), "every change needs less than the one before it"


def test_a_full_disk_is_told_before_anything_is_written(
    run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    found = [f for f in preflight.look(run()) if f.area == "disk"]
    assert [f.level for f in found] == ["error"]
    assert "set output_dir and registry.folder to another disk" in found[0].todo


def installed(folder: Path, **versions: str) -> list[str]:
    """Return a place in which packages of these versions are installed, the supported ones of all others."""
    required, _ = packages._supported()
    lowest = {r.name: s.version for r in required for s in r.specifier if s.operator in (">=", "==")}
    there = lowest | {name.replace("_", "-"): version for name, version in versions.items()}
    there["torch"] = versions.get("torch", "2.13.0+cpu")
    for name, version in there.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    return [str(folder)]


@pytest.mark.parametrize(
    ("versions", "wanted", "message"),
    [
        ({"trl": "1.15.0"}, {}, "trl 1.15.0 (supported: ==1.14.2)"),
        ({"torchvision": "0.28.0"}, {}, "torchvision 0.28.0 was built for another torch than the installed 2.13.0+cpu"),
        ({}, {"flash-attn": "base_model.attention"}, "base_model.attention needs flash-attn: flash-attn is not installed"),
        ({"bitsandbytes": "0.40.0"}, {"bitsandbytes": "dpo.optim"}, "bitsandbytes 0.40.0 (supported: <0.51,>=0.50)"),
    ],
)  # fmt: skip
def test_versions(tmp_path: Path, versions: dict[str, str], wanted: dict[str, str], message: str) -> None:
    errors = [f for f in packages.look(installed(tmp_path, **versions), wanted) if f.level == "error"]
    assert [message in error.text for error in errors] == [True]
    assert errors[0].todo.startswith("pip ")
    assert "extra ==" not in errors[0].todo, "pip would not install it"


def test_matching_versions_are_no_error(tmp_path: Path) -> None:
    found = list(packages.look(installed(tmp_path, torchvision="0.28.0+cpu", liger_kernel="0.6"), {}))
    assert {f.level for f in found} == {"ok"}


class Hub(BaseHTTPRequestHandler):
    """What a hub says of a gated model."""

    def do_GET(self) -> None:
        gated = self.path.endswith("/auth-check")
        granted = self.headers.get("Authorization") == "Bearer hf_granted"
        about = {
            "id": "org/gated",
            "sha": "a" * 40,
            "gated": "manual",
            "cardData": {"license": "llama3.1"},
            "siblings": [],
        }
        body = json.dumps({} if gated else about).encode()
        self.send_response(403 if gated and not granted else 200)
        if gated and not granted:
            self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_gated_model_is_told_with_where_to_ask(hub: str, tmp_path: Path) -> None:
    code = """
import json, os
from preference_tuning import jobs, preflight
from preference_tuning.config import RunConfig
config = RunConfig.model_validate({"base_model": {"source": "org/gated"}, "data": {"source": "x.jsonl"}})
for token in ("", "hf_wrong", "hf_granted"):
    os.environ["HF_TOKEN"] = token
    print(json.dumps([finding.model_dump() for finding in preflight.look(config, only=("model",))]))
"""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    without, wrong, granted = map(json.loads, done.stdout.splitlines())
    for answer, reason in ((without, "HF_TOKEN is not set"), (wrong, "the token in HF_TOKEN has no access")):
        error = answer[-1]
        assert (error["level"], error["exit_code"]) == ("error", 2)
        assert reason in error["text"]
        assert f"ask for access at {hub}/org/gated" in error["text"]
        assert "hf_" not in error["text"]
    assert "licence llama3.1, gated (manual), access granted" in [finding["text"] for finding in granted]
    assert any("base_model.revision: " + "a" * 40 in finding["todo"] for finding in granted)


def test_a_plain_look_becomes_findings(run: Callable[..., RunConfig]) -> None:
    """Other areas are one function of the config: a text, lines of warnings, or an error."""
    looks: dict[str, Callable[[RunConfig], str]] = {
        "plain": lambda config: f"to one place\n          warning: {config.finetuning_type} is slow",
        "broken": lambda config: (_ for _ in ()).throw(DataError("no such row")),
    }
    more = [
        (name, lambda world, n=name, look=look: findings.of_look(n, look, world.config)) for name, look in looks.items()
    ]
    found = preflight.look(run(), only=("plain", "broken"), more=more)
    assert [(f.area, f.level, f.text) for f in found] == [
        ("plain", "ok", "to one place"),
        ("plain", "warning", "dpo is slow"),
        ("broken", "error", "no such row"),
    ]
    assert findings.lines(found[:2]) == "plain     ok: to one place\n          warning: dpo is slow"


def test_the_table_says_what_to_do() -> None:
    area = Area("memory")
    found = [
        area.ok("fits"),
        area.warning("tight " * 30, "less " * 20),
        area.error(ConfigError("too much"), "buy more"),
    ]
    lines = findings.table(found).splitlines()
    assert max(map(len, lines)) <= 121
    assert lines[1].split() == ["memory", "ok", "fits"]
    assert lines[-1] == "1 error and 1 warning"
    assert next(line for line in lines if "buy more" in line).split()[:2] == ["memory", "error"]


def check(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "run.py"), "check", *words]
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


def test_a_config_that_cannot_be_read_is_a_finding_too(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("parameters:\n  base_model: {source: a}\n  data: {source: b}\n  betta: 1\n")
    done = check(tmp_path, "run.yaml", "--json")
    assert done.returncode == 2
    (found,) = json.loads(done.stdout)["findings"]
    assert (found["area"], found["level"]) == ("config", "error")
    assert "betta" in found["text"]


@pytest.mark.whole
def test_a_probe_runs_a_few_rows_and_leaves_nothing(run: Callable[..., RunConfig]) -> None:
    config = run()
    found = preflight.look(config, probed=True)
    assert told(found, "error") == []
    (time,) = [f.text for f in found if f.area == "time"]
    assert all(name in time for name in ("SFT", "DPO", "evaluation", "measured on few rows"))
    assert len([f for f in found if f.area == "memory"]) == 4
    assert not list(Path(config.output_dir).glob("checks/probe-*"))
    assert not list(Path(config.output_dir).glob("jobs/*")), "no job of a run was begun"


@pytest.mark.whole
def test_the_estimate_is_near_the_measured_peak() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "20M"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].startswith("result: cases=4 within_25_percent=4 ")


@pytest.mark.whole
def test_ten_thousand_rows_are_checked_in_fifteen_seconds(tmp_path: Path, tiny_model: Path) -> None:
    """Counted in CPU time, which on two CPUs that do nothing else is what the clock says: one may be busy here."""
    import resource

    def seconds() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    parameters = tiny_parameters(tiny_model, write_jsonl(tmp_path / "rows.jsonl", preference_rows(10_000)))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"parameters": parameters}), encoding="utf-8")
    before = seconds()
    done = check(tmp_path, "run.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert seconds() - before < 15
    shutil.rmtree(tmp_path / "outputs")
