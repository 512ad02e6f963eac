"""What a model runs on: chosen by measurement, kept, recorded; and gradient checkpointing, which must change nothing."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from preference_tuning.config import BaseModelConfig, DPOConfig, LoraConfig, SFTConfig
from preference_tuning.errors import ConfigError
from preference_tuning.models import compute, machine
from preference_tuning.models.compute import Compute

LAYERS = {  # milliseconds of a layer by dtype, attention and threads, on three machines
    "no bfloat16 units": {("float32", "sdpa"): 50, ("bfloat16", "sdpa"): 200, ("bfloat16", "eager"): 190},
    "bfloat16 units": {("float32", "sdpa"): 60, ("bfloat16", "sdpa"): 16, ("bfloat16", "eager"): 10},
    "hardly faster": {("float32", "sdpa"): 55, ("bfloat16", "sdpa"): 50, ("bfloat16", "eager"): 49},
    "attention alike": {("float32", "sdpa"): 60, ("bfloat16", "sdpa"): 11, ("bfloat16", "eager"): 10},
}


class Probe:
    """Stands for the measurement: figures of an invented machine, and how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, layers: dict[tuple[str, str], int], threads: dict[int, float]):
        from preference_tuning.models import probe

        self.calls = 0
        self._layers, self._threads = layers, threads
        monkeypatch.setattr(probe, "layers", self._measure)

    def _measure(self, ways: Iterable[Any], _budget: float) -> tuple[dict[Any, float], dict[str, float]]:
        self.calls += 1
        seconds = {w: self._layers[w.dtype, w.attention] * self._threads[w.threads] / 1e3 for w in ways}
        return seconds, {f"{w.dtype}/{w.threads}/tflops": 1 / s for w, s in seconds.items()}


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores with two hardware threads each: torch's default is 2."""
    import torch

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(machine, "usable_cpus", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def config(**settings: Any) -> BaseModelConfig:
    return BaseModelConfig(source="model", **settings)


@pytest.mark.parametrize(
    ("cpu", "threads", "settings", "chosen"),
    [
        ("no bfloat16 units", {2: 1, 4: 1.02}, {}, ("float32", "sdpa", 2)),
        ("bfloat16 units", {2: 1, 4: 1.02}, {}, ("bfloat16", "eager", 2)),
        ("hardly faster", {2: 1, 4: 0.9}, {}, ("float32", "sdpa", 2)),
        ("attention alike", {2: 1, 4: 0.7}, {}, ("bfloat16", "sdpa", 4)),
        ("bfloat16 units", {2: 1, 4: 0.7}, {"dtype": "float32"}, ("float32", "sdpa", 4)),
        ("no bfloat16 units", {2: 1, 4: 1.1}, {"dtype": "bfloat16"}, ("bfloat16", "sdpa", 2)),
        ("bfloat16 units", {3: 1}, {"threads": 3, "attention": "sdpa"}, ("bfloat16", "sdpa", 3)),
    ],
)
@pytest.mark.usefixtures("four_cpus")
def test_only_what_is_clearly_faster_replaces_a_default(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cpu: str,
    threads: dict[int, float],
    settings: dict[str, Any],
    chosen: tuple[str, str, int],
) -> None:
    Probe(monkeypatch, LAYERS[cpu], threads)
    found = compute.choose(config(**settings), tmp_path)
    assert (found.dtype, found.attention, found.threads) == chosen
    assert found.measured[f"{found.dtype}/{found.threads}/tflops"] > 0


@pytest.mark.usefixtures("four_cpus")
def test_a_choice_is_measured_once_and_again_where_it_may_differ(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    probe = Probe(monkeypatch, LAYERS["no bfloat16 units"], {1: 2, 2: 1, 4: 1})
    first = compute.choose(config(), tmp_path)
    asked = probe.calls
    assert compute.choose(config(), tmp_path) == first
    assert probe.calls == asked
    compute.choose(config(dtype="bfloat16", threads=2), tmp_path)
    assert probe.calls == asked + 1
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert compute.choose(config(), tmp_path).threads == 1, "the user's own choice"
    assert probe.calls == asked + 2, "no measurement of threads"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert compute.choose(config(), tmp_path) == first, "several choices live side by side"
    for damage in ('{"a', "[]", '{"a": {"compute": {}}}'):
        (tmp_path / compute.FILE).write_text(damage)
        before = probe.calls
        compute.choose(config(), tmp_path)
        assert probe.calls > before, damage


@pytest.mark.usefixtures("four_cpus")
def test_a_job_keeps_what_it_began_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job"
    job.mkdir()
    Probe(monkeypatch, LAYERS["bfloat16 units"], {2: 1, 4: 1})
    began = compute.of_job(config(), tmp_path, job)
    assert began.dtype == "bfloat16"
    # The same machine measures otherwise today, and the environment changed: the job goes on as it began.
    (tmp_path / compute.FILE).unlink()
    Probe(monkeypatch, LAYERS["no bfloat16 units"], {2: 1, 4: 0.5})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert compute.of_job(config(), tmp_path, job) == began
    assert capsys.readouterr().err == ""
    # Another machine: the precision stays, the threads are its own, and that is said.
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(machine, "usable_cpus", lambda: 8)
    Probe(monkeypatch, LAYERS["no bfloat16 units"], {2: 1, 8: 0.5})
    moved = compute.of_job(config(), tmp_path, job)
    assert (moved.dtype, moved.threads) == ("bfloat16", 8)
    assert (
        "began on another machine (cpu bfloat16, 2 threads) and goes on with cpu bfloat16, 8" in capsys.readouterr().err
    )


def test_the_probe_measures_and_leaves_no_trace() -> None:
    import torch

    from preference_tuning.models import probe

    before, state = torch.get_num_threads(), torch.random.get_rng_state()
    ways = [probe.Way("float32", "sdpa", 1), probe.Way("float32", "eager", 1)]
    seconds, figures = probe.layers(ways, budget=0.0)
    assert set(figures) == {"float32/1/tflops", "float32/1/sdpa_ms", "float32/1/eager_ms"}
    for way in ways:
        product = probe.FLOPS / (figures["float32/1/tflops"] * 1e12)
        attention = figures[f"float32/1/{way.attention}_ms"] / 1e3
        assert seconds[way] == pytest.approx(probe.PRODUCTS_A_LAYER * product + attention, rel=0.05)
    assert torch.get_num_threads() == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_containers_quota_limits_the_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(machine, "CPU_QUOTA", quota)
    affine = machine.usable_cpus()
    quota.write_text("50000 100000\n")
    assert machine.usable_cpus() == 1
    quota.write_text("max 100000\n")
    assert machine.usable_cpus() == affine


@pytest.mark.parametrize(
    ("has_bfloat16", "settings", "chosen"),
    [
        (True, {}, ("bfloat16", "sdpa", "torch")),
        (False, {}, ("float16", "sdpa", "torch")),
        (True, {"attention": "flash_attention_2", "dtype": "float16"}, ("float16", "flash_attention_2", "torch")),
        (True, {"backend": "unsloth"}, ("bfloat16", "unsloth", "unsloth")),
        (True, {"liger": True}, ("bfloat16", "sdpa", "liger")),
    ],
)
def test_cuda_is_decided_by_rule(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    has_bfloat16: bool,
    settings: dict[str, Any],
    chosen: tuple[str, str, str],
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16 or including_emulation
    )
    there = {"flash_attn", "liger_kernel"} if settings.pop("liger", False) else {"flash_attn"}
    monkeypatch.setattr(machine, "has_package", lambda name: name in there)
    found = compute.choose(config(**settings), tmp_path)
    assert (found.device, found.dtype, found.attention, found.kernels) == ("cuda", *chosen)
    assert found.measured == {}


@pytest.mark.usefixtures("four_cpus")
def test_wishes_that_cannot_be_met_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flash = config(attention="flash_attention_2")
    with pytest.raises(ConfigError, match="attention: flash_attention_2 needs a CUDA GPU"):
        compute.choose(flash, tmp_path)
    with pytest.raises(ConfigError, match="dtype: float16 does not train on a CPU"):
        compute.choose(config(dtype="float16"), tmp_path)
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        compute.choose(config(device="cuda"), tmp_path)
    monkeypatch.setattr(machine, "has_package", lambda _: False)
    with pytest.raises(ConfigError, match="needs the package flash-attn"):
        compute.check_packages(flash)


def test_attention_settings_that_contradict_each_other() -> None:
    from preference_tuning.config.schema import _model_contradictions

    def messages(**settings: Any) -> list[str]:
        return [message for path, message in _model_contradictions(config(**settings)) if "attention" in path]

    assert "CUDA only" in messages(attention="flash_attention_2", device="cpu")[0]
    assert "no float32" in messages(attention="flash_attention_2", dtype="float32")[0]
    assert "its own attention" in messages(attention="sdpa", backend="unsloth")[0]
    assert messages(attention="eager", device="cpu") == []


def test_liger_comes_without_its_losses_and_only_for_models_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    from preference_tuning.models import kernels

    applied: list[dict[str, Any]] = []
    patch = SimpleNamespace(
        MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None},
        _apply_liger_kernel_to_instance=lambda **how: applied.append(how),
    )
    package = ModuleType("liger_kernel.transformers")
    package.monkey_patch = patch  # type: ignore[attr-defined]
    llama, other = (SimpleNamespace(config=SimpleNamespace(model_type=kind)) for kind in ("llama", "other"))
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    assert kernels.apply_liger(llama)
    assert not kernels.apply_liger(other)
    assert applied == [{"model": llama, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ConfigError, match="liger-kernel cannot be imported"):
        kernels.apply_liger(llama)


def load(tiny_model: Path, out: Path, **settings: Any) -> Any:
    from preference_tuning.models import loading
    from preference_tuning.models.source import locate

    base_model = BaseModelConfig(source=str(tiny_model), max_seq_length=128, **settings)
    return loading.load_base(base_model, locate(base_model), out, compute.choose(base_model, out))


def test_the_model_runs_as_chosen(tiny_model: Path, tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        base = load(tiny_model, tmp_path, dtype="bfloat16", attention="eager", threads=1, device="cpu")
        assert base.model.config._attn_implementation == "eager"
        assert base.model.dtype == base.dtype == torch.bfloat16
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_decoder_is_compiled_in_place(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the adapter, and so that its weights keep their names; a wrapper would be unwrapped and do nothing."""
    import torch

    from preference_tuning.models import kernels, loading

    model = loading.new_adapter(load(tiny_model, tmp_path, dtype="float32"), LoraConfig(rank=4), seed=0)
    compiled: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: compiled.append((module, how)))
    kernels.compile_decoder(model)
    assert compiled == [(model.get_base_model().model, {"dynamic": True})]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_gradient_checkpointing_changes_no_number(tiny_model: Path, tmp_path: Path, stage: str) -> None:
    plain, runs = _first_step(tiny_model, tmp_path / "plain", stage, checkpointing=False)
    saved, runs_again = _first_step(tiny_model, tmp_path / "saved", stage, checkpointing=True)
    assert (runs, runs_again) == (1, 2), "a layer runs again in backward"
    assert saved["loss"] == plain["loss"]
    gradients = [name for name in plain if name != "loss"]
    assert len(gradients) == 2 * 7 * 4, "every adapter matrix of four layers"
    for name in gradients:
        assert saved[name].equal(plain[name]), name


def _first_step(tiny_model: Path, out: Path, stage: str, checkpointing: bool) -> tuple[dict[str, Any], int]:
    """Return the loss and gradients of the first step, and how often the first layer's queries were computed in it."""
    import torch
    from transformers import TrainerCallback

    from preference_tuning.models import loading
    from preference_tuning.training import arguments, trainers

    base = load(tiny_model, out, dtype="float32")
    model = loading.new_adapter(base, LoraConfig(rank=4), seed=0)
    found: dict[str, Any] = {}
    runs = []
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    layer.register_forward_hook(lambda *_: runs.append(1))

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            found.update((n, p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None)

    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    section = (SFTConfig if stage == "sft" else DPOConfig)(**settings, gradient_checkpointing=checkpointing)
    args = getattr(arguments, stage)(section, base, out / "checkpoints")
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    how = {"dtype": torch.float32, "pad_id": base.tokenizer.pad_token_id, "processing_class": base.tokenizer}
    how |= {"train_dataset": _rows(), "eval_dataset": _rows(), "model": model, "args": args, "shared_prompt": True}
    trainer = (trainers.AnswerSFTTrainer if stage == "sft" else trainers.PreferenceTrainer)(**how)
    trainer.add_callback(Watch())
    trainer.train()
    found["loss"] = trainer.state.log_history[0]["loss"]
    return found, len(runs)


def _rows() -> Any:
    import datasets

    rows = [([5 + i, 6, 7], [8, 9 + i], [10, 11, 12 + i]) for i in range(4)]
    return datasets.Dataset.from_list(
        [
            {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r, "length": len(p) + len(c) + len(r)}
            | {"ref_chosen_logps": -10.0, "ref_rejected_logps": -15.0}
            for p, c, r in rows
        ]
    )


def test_the_record_and_its_report_show_what_ran() -> None:
    from preference_tuning.training import report
    from preference_tuning.training.job import TrainingRecord

    ran = Compute(
        device="cpu",
        dtype="float32",
        attention="sdpa",
        threads=2,
        measured={"float32/2/tflops": 0.213, "bfloat16/2/tflops": 0.06, "float32/4/tflops": 0.2},
        reason="dtype float32: measured against bfloat16",
    )
    record = TrainingRecord(
        stage="sft", job="sft-1", identity={"sft": {}}, adapter_hash="0", steps=1, max_steps=1, epochs=1, seconds=1, rows=1,
        held_out_rows=1, dropped_rows=0, cut_rows=0, tokens=1, train_loss=1, metrics={}, trainable_parameters=1,
        compute=ran, processes=1, engine="shared_prompt", engine_reason="", backend="transformers", template_hash="0",
        resumed_at=[], versions={},
    )  # fmt: skip
    summary = record.summary()
    assert summary["compute/dtype"] == "float32"
    assert summary["compute/threads"] == 2
    assert summary["compute/float32/2/tflops"] == 0.213
    assert "float32 0.21 TFLOP/s, bfloat16 0.06 TFLOP/s" in report.render(record, [])
    assert json.loads(record.model_dump_json())["compute"]["kernels"] == "torch"
