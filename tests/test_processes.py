"""Several processes for one training job: real torchrun, two gloo processes, the same losses as one."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import preference_rows, tiny_parameters, write_jsonl

from preference_tuning import fingerprint, jobs
from preference_tuning.config import BaseModelConfig, RunConfig, TrainingConfig
from preference_tuning.data import job as data_job
from preference_tuning.data import prepare
from preference_tuning.data.table import Dataset
from preference_tuning.errors import ConfigError, InterruptedJobError, PreferenceTuningError
from preference_tuning.models import devices
from preference_tuning.models.source import locate
from preference_tuning.tracking.spool import read
from preference_tuning.training import job
from preference_tuning.training.job import Trained, TrainingJob

Run = tuple[RunConfig, Dataset]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Run:
    folder = tmp_path_factory.mktemp("run")
    data = write_jsonl(folder / "rows.jsonl", preference_rows(52))
    config = RunConfig.model_validate(tiny_parameters(tiny_model, data))
    dataset = prepare.prepare(config.data, data_job.fingerprints_of(config.data), folder / "data")
    return config, dataset


def job_of(run: Run, out: Path, stage: str, processes: int, **changes: Any) -> TrainingJob:
    """Return a job whose steps see 8 rows, in two batches of 4, whatever the number of processes."""
    config, dataset = run
    settings = {
        "per_device_train_batch_size": 4 // processes,
        "per_device_eval_batch_size": 4 // processes,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "eval_steps": 0.5,
        **changes.pop("settings", {}),
    }
    section = getattr(config, stage).model_copy(update=settings)
    extra = {"lora": config.lora} if stage == "sft" else {}
    training = TrainingConfig(processes=processes, **changes.pop("training", {}))
    return job.from_artifacts(
        stage,
        config.base_model,
        locate(config.base_model),
        dataset,
        out,
        training,
        **{stage: section},
        **extra,
        **changes,
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sft(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Trained]:
    out = tmp_path_factory.mktemp("sft")
    return {processes: job.train(job_of(run, out, "sft", processes)) for processes in (1, 2)}


@pytest.fixture(scope="module")
def dpo(run: Run, sft: dict[int, Trained], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Trained]:
    out = tmp_path_factory.mktemp("dpo")
    return {processes: job.train(job_of(run, out, "dpo", processes, adapter=sft[1].adapter)) for processes in (1, 2)}


def points(trained: Trained) -> list[tuple[int, dict[str, float]]]:
    return [(point.step, point.metrics) for point in read(trained.evidence / job.METRICS)]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_two_processes_do_what_one_does(run: Run, request: pytest.FixtureRequest, stage: str) -> None:
    """Loss, gradient norm, learning rate, tokens, rewards and every metric of the evaluations, at every step."""
    trained: dict[int, Trained] = request.getfixturevalue(stage)
    one, two = trained[1].record, trained[2].record
    assert (one.processes, two.processes) == (1, 2)
    assert one.rows % 4 == 1, "the last batch has one row: a process has nothing to do in it"
    assert one.held_out_rows % 4 == 3, "shares of the last evaluated batch differ"
    assert (one.steps, one.tokens) == (two.steps, two.tokens)
    assert len(points(trained[1])) == one.steps + 2
    for (step, alone), (same, together) in zip(points(trained[1]), points(trained[2]), strict=True):
        assert step == same
        for name, value in alone.items():
            assert together[name] == pytest.approx(value, abs=1e-5, rel=1e-4), f"{name} at step {step}"
            if name.endswith("loss"):
                assert together[name] == pytest.approx(value, abs=1e-5), f"{name} at step {step}"
        assert alone.keys() == together.keys()


def test_the_number_of_processes_is_part_of_the_job_and_of_its_steps(run: Run, tmp_path: Path) -> None:
    config = run[0]
    one, two = (job_of(run, tmp_path, "sft", processes) for processes in (1, 2))
    assert (one.identity()["processes"], two.identity()["processes"]) == (1, 2)
    assert config.sft.total_steps(64, 1) == 2 * config.sft.total_steps(64, 2) == 8
    with pytest.raises(ConfigError, match=r"10 of 4 steps \(64 rows in 2 processes\) would be warm-up"):
        config.sft.model_copy(update={"warmup_steps": 10}).check_warmup("sft", 64, 2)


def test_auto_takes_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, model = TrainingConfig(), BaseModelConfig(source="x")
    sharded = TrainingConfig(fsdp="full_shard")
    for found, expected in ((0, 1), (1, 1), (4, 4)):
        monkeypatch.setattr(devices, "cuda_devices", lambda found=found: found)
        assert devices.processes_of(auto, model) == expected
        assert devices.processes_of(auto, model.model_copy(update={"device": "cpu"})) == 1
        assert devices.processes_of(auto, model.model_copy(update={"backend": "unsloth"})) == 1
    assert devices.processes_of(sharded, model) == 4
    with pytest.raises(ConfigError, match=r"training\.processes: 8 are asked for, and 4 CUDA devices are visible"):
        devices.processes_of(TrainingConfig(processes=8), model)
    monkeypatch.setattr(devices, "cuda_devices", lambda: 0)
    assert devices.processes_of(TrainingConfig(processes=8), model) == 8, "gloo processes on a CPU"
    with pytest.raises(ConfigError, match=r"training\.fsdp: one process has nothing to shard"):
        devices.processes_of(sharded, model)


def test_settings_that_contradict_each_other(run: Run) -> None:
    parameters = run[0].model_dump(mode="json")
    parameters["training"] = {"processes": 1, "fsdp": "full_shard"}
    parameters["base_model"] |= {"load_in_4bit": True, "backend": "unsloth"}
    found = [
        (path, message)
        for path, message in RunConfig.model_validate(parameters).contradictions()
        if path[0] == "training"
    ]
    assert [message.partition(";")[0] for _, message in found] == [
        "one process has nothing to shard", "unsloth trains in one process", "4-bit weights cannot be sharded"
    ]  # fmt: skip


def test_fewer_processes_than_the_job_is_for_are_an_error(run: Run, tmp_path: Path) -> None:
    """As `accelerate launch --cpu --num_processes 2` would start it: one process, and no word of it."""
    jobs.write_json(tmp_path / jobs.JOB, job_of(run, tmp_path, "sft", 2).model_dump(mode="json"))
    command = [sys.executable, "-m", job.MODULE, str(tmp_path)]
    assert subprocess.run(command, cwd=fingerprint.PACKAGE.parent).returncode == ConfigError.exit_code
    told = json.loads((tmp_path / jobs.ERROR).read_text(encoding="utf-8"))
    assert told["message"].startswith("training.processes: the job is for 2, and 1 were started")


@contextlib.contextmanager
def in_every_step(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Iterator[None]:
    """Let each process of a job run ``code`` before a training step."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, signal, sys, time\n"
        "rank = os.environ.get('RANK')\n"
        "started = {'preference_tuning.training', 'preference_tuning.jobs'}\n"
        "if started & set(sys.orig_argv) and 'torch.distributed.run' not in sys.orig_argv:\n"
        "    import transformers\n"
        "    step = transformers.Trainer.training_step\n"
        "    def patched(self, *args, **kwargs):\n"
        f"        {code}\n"
        "        return step(self, *args, **kwargs)\n"
        "    transformers.Trainer.training_step = patched\n"
    )
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield


@pytest.mark.whole
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise OSError('no space left')", "OSError: no space left"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "out of memory?"),
    ],
)
def test_a_failure_of_one_process_ends_the_others(
    run: Run, sft: dict[int, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    once = {"retries": 0}
    work, start = job_of(run, tmp_path, "dpo", 2, adapter=sft[1].adapter, training=once), time.monotonic()
    code = f"if rank == '1' and self.state.global_step == 1: {fault}"
    with in_every_step(tmp_path / "patch", monkeypatch, code), pytest.raises(PreferenceTuningError) as caught:
        job.train(work)
    assert message in str(caught.value), "what the user reads is the first error, not that the others lost it"
    assert time.monotonic() - start < 120


@pytest.mark.whole
def test_an_interrupted_job_of_two_processes_goes_on_to_the_same_losses(
    run: Run, sft: dict[int, Trained], dpo: dict[int, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = job_of(run, tmp_path, "dpo", 2, adapter=sft[1].adapter)
    folder = tmp_path / "jobs" / dpo[2].record.job
    code = (
        "import signal, sys\n"
        "from preference_tuning.errors import PreferenceTuningError\n"
        "from preference_tuning.training import job\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "try: job.train(job.TrainingJob.model_validate_json(sys.argv[1]))\n"
        "except PreferenceTuningError as error: print(error); sys.exit(error.exit_code)\n"
    )
    with in_every_step(tmp_path / "patch", monkeypatch, "time.sleep(0.4)"):
        parent = subprocess.Popen([sys.executable, "-c", code, work.model_dump_json()], cwd=fingerprint.PACKAGE.parent)
        spool, end = folder / "evidence" / job.METRICS, time.monotonic() + 120
        while not (spool.is_file() and "dpo/train/loss" in spool.read_text()):
            assert parent.poll() is None, "the job ended too soon"
            assert time.monotonic() < end
            time.sleep(0.05)
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(60) == InterruptedJobError.exit_code
    assert not (folder / jobs.RESULT).exists()
    resumed = job.train(work)
    assert resumed.record.resumed_at != []
    assert resumed.record.adapter_hash == dpo[2].record.adapter_hash
    assert points(resumed) == points(dpo[2]), "no gap, no duplicate, the same floats, tokens counted on"


def test_sharded_weights_are_what_accelerate_and_the_model_understand(run: Run, tmp_path: Path) -> None:
    """The arguments become accelerate's plugin, and the plugin finds the decoder layers inside of the adapter."""
    import torch
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    from preference_tuning.models import compute, loading
    from preference_tuning.training import arguments

    config = run[0]
    base = loading.load_base(
        config.base_model, locate(config.base_model), tmp_path, compute.choose(config.base_model, tmp_path)
    )
    model = loading.new_adapter(base, config.lora, 1)
    settings = arguments.dpo(config.dpo, base, tmp_path, "full_shard")
    plugin = FullyShardedDataParallelPlugin(**settings.fsdp_plugin_args)
    plugin.set_auto_wrap_policy(model)
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert str(plugin.state_dict_type) == "StateDictType.FULL_STATE_DICT"
    wrapped = [type(module).__name__ for module in model.modules() if wraps(module)]
    assert wrapped == ["LlamaDecoderLayer"] * 4
    assert arguments.sharding("off", base.model) == {}
    with pytest.raises(ConfigError, match=r"training\.fsdp: Linear does not say what its layers are"):
        arguments.sharding("full_shard", torch.nn.Linear(1, 1))


@pytest.mark.whole
def test_two_processes_that_share_the_weights_give_the_same_losses(
    run: Run, sft: dict[int, Trained], dpo: dict[int, Trained], tmp_path: Path
) -> None:
    """FSDP2 on a CPU: gathered layer by layer, and gathered whole into the adapter."""
    work = job_of(run, tmp_path, "dpo", 2, adapter=sft[1].adapter, training={"fsdp": "full_shard"})
    sharded = job.train(work)
    for (step, whole), (same, shared) in zip(points(dpo[2]), points(sharded), strict=True):
        assert step == same
        for name in whole.keys() & {"dpo/train/loss", "dpo/train/grad_norm", "dpo/eval/loss"}:
            assert shared[name] == pytest.approx(whole[name], abs=1e-5, rel=1e-4), f"{name} at step {step}"
    assert_adapters_are_equal(sharded.adapter, dpo[2].adapter)


def assert_adapters_are_equal(one: Path, other: Path) -> None:
    import torch
    from safetensors.torch import load_file

    weights, others = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=1e-4, rtol=1e-3)
