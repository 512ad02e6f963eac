"""Training jobs that run in the test's own process, with a watch beside the training loop."""

import math
from pathlib import Path
from typing import Any

import yaml
from conftest import preference_rows, write_jsonl

from preference_tuning import config
from preference_tuning.config import RunConfig
from preference_tuning.data import job as data_job
from preference_tuning.data import prepare
from preference_tuning.data.table import Dataset
from preference_tuning.models.source import locate
from preference_tuning.tracking.spool import read
from preference_tuning.training import job

TRAIN = 32
"""Rows that are trained on."""


def watch_beside(trainer: Any, run: "Watched") -> Any:
    """Return a callback that writes into ``run`` what the training loop does."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.substeps = 0

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.substeps += 1

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
            inner = optimizer.optimizer
            trainable = [p for p in trainer.model.parameters() if p.requires_grad]
            run.rates.append(inner.param_groups[0]["lr"])
            run.norms.append(sum(p.grad.norm().item() ** 2 for p in trainable if p.grad is not None) ** 0.5)
            run.optimizer = type(inner).__name__, bool(inner.param_groups[0].get("fused"))
            groups = [group["weight_decay"] for group in inner.param_groups if len(group["params"]) == len(trainable)]
            (run.decay_of_all,) = groups

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.batches_a_step, run.substeps = run.substeps + 1, 0
            run.steps, run.epochs = state.global_step, state.epoch

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.evaluated.append(state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.saved.append(state.global_step)

    return Watch()


class Watched:
    """A training job that ran in this process, and what was seen of it."""

    def __init__(self, folder: Path, work: job.TrainingJob) -> None:
        from preference_tuning.training.stage import Stage

        self.rates: list[float] = []
        self.norms: list[float] = []
        self.evaluated: list[int] = []
        self.saved: list[int] = []
        self.batches: dict[str, list[int]] = {"train": [], "held_out": []}
        self.batches_a_step = self.steps = self.substeps = self.forwards = 0
        self.epochs = self.decay_of_all = math.nan
        self.optimizer = ("", False)
        folder.mkdir(parents=True)
        self.training = Stage(folder, work)
        self._build = self.training._trainer
        self.training._trainer = self._watched_trainer  # type: ignore[method-assign]
        self.record = self.training.run()
        self.adapter = folder / job.ADAPTER
        points = list(read(folder / job.EVIDENCE / job.METRICS))
        self.names = {name.removeprefix(f"{work.stage}/") for point in points for name in point.metrics}
        self.logged = [point.step for point in points if f"{work.stage}/train/loss" in point.metrics]

    @property
    def forwards_a_batch(self) -> float:
        return self.forwards / (self.steps * self.batches_a_step)

    def _watched_trainer(self, model: Any, train: Any, held_out: Any) -> Any:
        trainer = self._build(model, train, held_out)
        trainer.add_callback(watch_beside(trainer, self))
        kept = {tuple(row["prompt_ids"]) for row in held_out}
        collate = trainer.data_collator

        def collator(examples: list[dict[str, Any]]) -> Any:
            side = "held_out" if tuple(examples[0]["prompt_ids"]) in kept else "train"
            self.batches[side].append(len(examples))
            return collate(examples)

        trainer.data_collator = collator
        layer = next(m for m in trainer.model.modules() if type(m).__name__.endswith("DecoderLayer"))
        # Before the layer: checkpointing leaves its second pass as soon as it has what it needs.
        layer.register_forward_pre_hook(lambda module, *_: setattr(self, "forwards", self.forwards + module.training))
        return trainer


class Workplace:
    """Rows, a tiny model, and jobs on them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        sides = ["train"] * TRAIN + ["test"] * 11
        rows = [{**row, "split": side} for row, side in zip(preference_rows(TRAIN + 11), sides, strict=True)]
        self.rows = write_jsonl(folder / "rows.jsonl", rows)
        data = self.config().data
        self.dataset: Dataset = prepare.prepare(data, data_job.fingerprints_of(data), folder / "data")
        assert self.dataset.manifest.train == TRAIN
        self.count = 0

    def config(self, **changes: dict[str, Any]) -> RunConfig:
        """Return the config that a YAML file with ``changes`` to its sections gives."""
        parameters: dict[str, Any] = {
            "base_model": {"source": str(self.model), "max_seq_length": 128, "dtype": "float32", "device": "cpu"},
            "lora": {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]},
            "data": {"source": str(self.rows)},
            "sft": {"warmup_steps": 0.1},
            "dpo": {"warmup_steps": 0.1, "max_length": 128},
        }
        for section, values in changes.items():
            parameters[section] |= values
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump({"parameters": parameters}), encoding="utf-8")
        return config.load(path).config

    def job(self, run: RunConfig, stage: str, adapter: Path | None = None) -> job.TrainingJob:
        own = {"lora": run.lora} if stage == "sft" else {"adapter": adapter}
        out = self.folder / "outputs"
        return job.from_artifacts(
            stage, run.base_model, locate(run.base_model), self.dataset, out, run.training, **{stage: getattr(run, stage)}, **own
        )  # type: ignore[arg-type]  # fmt: skip

    def run(self, stage: str, settings: dict[str, Any], adapter: Path | None = None) -> Watched:
        """Run a stage in this process."""
        self.count += 1
        work = self.job(self.config(**{stage: settings}), stage, adapter)
        return Watched(self.folder / f"job-{self.count}", work)
