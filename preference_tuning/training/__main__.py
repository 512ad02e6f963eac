"""The training job's process: ``python -m preference_tuning.training FOLDER``."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from pathlib import Path
from typing import Any

from preference_tuning import fingerprint, jobs
from preference_tuning.errors import ConfigError, DivergedError, InterruptedJobError
from preference_tuning.tracking.comet import Comet
from preference_tuning.tracking.spool import Spool, read
from preference_tuning.training import job as jobs_of_training
from preference_tuning.training.job import ReferenceProof, TrainingJob, TrainingRecord

VERSIONS = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


def main(folder: Path, job: TrainingJob) -> TrainingRecord:
    """Train the stage in ``folder`` and return its record."""
    # Comet must start before anything seeds the global random state (see tracking.comet).
    comet = Comet.start(job.comet, job.stage)
    try:
        return _Training(folder, job, comet).run()
    finally:
        comet.end()


class _Training:
    """One stage: load, tokenise, build the trainer, resume, train, save."""

    def __init__(self, folder: Path, job: TrainingJob, comet: Comet) -> None:
        from preference_tuning.models import compute, loading

        self.folder, self.job, self.comet = folder, job, comet
        self.evidence = folder / jobs_of_training.EVIDENCE
        self.evidence.mkdir(exist_ok=True)
        loading.activate_backend(job.base_model)
        if job.adapter is not None and fingerprint.of_directory(job.adapter) != job.adapter_hash:
            raise DivergedError(f"the SFT result in {job.adapter} changed since SFT wrote it; start the run anew")
        chosen = compute.of_job(job.base_model, job.output_dir, folder)
        full = job.stage == "sft" and job.lora is None
        self.base = loading.load_base(job.base_model, job.source, job.output_dir, chosen, full=full, tuned=job.adapter)
        self.engine, self.engine_reason = "", ""
        self.reference: ReferenceProof | None = None

    def run(self) -> TrainingRecord:
        from transformers import PrinterCallback

        from preference_tuning.models import weights
        from preference_tuning.training import callbacks, checkpoints

        job = self.job
        model = self._model()
        answers = 2 if job.stage == "dpo" else 1
        train, held_out = self._rows(job.split, answers), self._rows("held_out", answers)
        self.comet.log_parameters(job.stage, job.settings.model_dump(mode="json"))
        trainer = self._trainer(model, train.rows, held_out.rows)
        checkpoint, rejected = checkpoints.newest_good(self.folder / "checkpoints")
        for line in rejected:
            print(f"  warning: {line}; not resumed from", file=sys.stderr)
        resumed_at = checkpoints.step_of(checkpoint) if checkpoint else 0
        if checkpoint:
            print(f"  {job.stage.upper()}: continues at step {resumed_at}", file=sys.stderr)
        elif rejected:
            print("  warning: no checkpoint is intact; the stage starts over", file=sys.stderr)

        spool = Spool(self.evidence / jobs_of_training.METRICS, resume_at=resumed_at)
        if checkpoint:
            self.comet.replay(self.evidence / jobs_of_training.METRICS)
        metrics = callbacks.Metrics(job.stage, spool, self.comet, job.settings.logging_steps)
        clock, stop = callbacks.Clock.resumed(checkpoint), callbacks.Stop()
        shares = callbacks.Shares(job.settings.eval_steps, job.settings.save_steps)
        trainer.remove_callback(PrinterCallback)
        for callback in (callbacks.Health(), metrics, callbacks.Progress(job.stage), clock, stop, shares):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        spool.close()
        if trainer.state.global_step < trainer.state.max_steps:
            raise InterruptedJobError(
                f"{job.stage.upper()} was stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, "
                "after a checkpoint; the same command continues it"
            )

        adapter = self.folder / jobs_of_training.ADAPTER
        weights.save(trainer.model, self.base.tokenizer, adapter, job.base_model)
        if problem := weights.problem(adapter):
            shutil.rmtree(adapter)
            raise DivergedError(f"{job.stage.upper()} made weights that are not healthy: {problem}; nothing is kept")
        record = self._record(trainer, train, held_out, adapter, clock.seconds, [resumed_at] if resumed_at else [])
        self._write_evidence(record)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        return record

    def _model(self) -> Any:
        from preference_tuning.models import kernels

        model = self._with_adapter()
        if self.job.settings.torch_compile:
            kernels.compile_decoder(model)
        return model

    def _with_adapter(self) -> Any:
        from preference_tuning.models import loading

        if self.job.stage == "sft":
            return loading.new_policy(self.base, self.job.lora, self.job.settings.seed)
        return loading.load_policy(self.base, trainable=True)

    def _rows(self, split: str, answers: int) -> Any:
        from preference_tuning.models import rows

        table = self.job.data / f"{split}.arrow"
        return rows.tokenise(table, self.base.tokenizer, self.job.room, self.job.output_dir / "tokens", answers)

    def _trainer(self, model: Any, train: Any, held_out: Any) -> Any:
        from preference_tuning.training import arguments, trainers

        how: dict[str, Any] = {
            "model": model,
            "processing_class": self.base.tokenizer,
            "dtype": self.base.dtype,
            "pad_id": self.base.tokenizer.pad_token_id,
        }
        checkpoints = self.folder / "checkpoints"
        if self.job.sft:
            self.job.sft.check_warmup("sft", len(train))
            settings = arguments.sft(self.job.sft, self.base, checkpoints)
            shared = self._choose_engine(model, train, "auto", otherwise="plain")
            return trainers.AnswerSFTTrainer(
                args=settings, train_dataset=train, eval_dataset=held_out, shared_prompt=shared, **how
            )
        assert self.job.dpo is not None
        self.job.dpo.check_warmup("dpo", len(train))
        shared = self._choose_engine(model, train, self.job.dpo.engine, otherwise="trl")
        settings = arguments.dpo(self.job.dpo, self.base, checkpoints)
        train, held_out = self._with_reference(model, train, held_out, shared)
        trainer = trainers.PreferenceTrainer(
            args=settings, train_dataset=train, eval_dataset=held_out, shared_prompt=shared, **how
        )
        self._prove_reference(trainer, shared)
        return trainer

    def _choose_engine(self, model: Any, train: Any, wanted: str, otherwise: str) -> bool:
        """Return whether the prompts of a batch are shared, and keep the reason."""
        from preference_tuning.models import scoring

        refusal = scoring.refuses_shared_prompt(model, max(train["length"]))
        if wanted == "shared_prompt" and refusal:
            raise ConfigError(f"dpo.engine: shared_prompt cannot run this model: {refusal}; use auto or trl")
        shared = wanted != "trl" and refusal is None
        self.engine = "shared_prompt" if shared else otherwise
        self.engine_reason = refusal or (
            "chosen in the config" if wanted != "auto" else "the model's attention takes it"
        )
        if refusal:
            print(f"  {self.job.stage.upper()}: the prompt is not shared, because {refusal}", file=sys.stderr)
        return shared

    def _with_reference(self, model: Any, train: Any, held_out: Any, shared: bool) -> tuple[Any, Any]:
        from preference_tuning.training import reference, trainers

        assert self.job.dpo is not None
        visited = trainers.first_rows(train, self.job.dpo, self.job.dpo.total_steps(len(train)))
        key = fingerprint.of_value([self.job.identity(), self._template(), str(self.base.dtype), shared])
        size = self.job.settings.per_device_eval_batch_size
        common = {"key": key, "model": model, "batch_size": size, **self._how(shared)}
        stored = {split: self.folder / f"reference-{split}.safetensors" for split in ("train", "held_out")}
        return (
            reference.add_reference(train, stored["train"], title="reference", only=visited, **common),
            reference.add_reference(held_out, stored["held_out"], title="reference, held out", **common),
        )

    def _how(self, shared: bool) -> dict[str, Any]:
        return {
            "dtype": self.base.dtype,
            "device": self.base.device,
            "pad_id": self.base.tokenizer.pad_token_id,
            "shared": shared,
        }

    def _prove_reference(self, trainer: Any, shared: bool) -> None:
        from preference_tuning.training import reference

        assert self.job.dpo is not None
        assert self.job.adapter_hash is not None
        dpo = self.job.dpo
        tolerance = reference.TOLERANCE[self.base.dtype]
        loss, difference, pairs = reference.measure(trainer, **self._how(shared))
        expected = reference.check(loss, difference, dpo.beta, dpo.loss_type, tolerance, dpo.loss_weights)
        self.reference = ReferenceProof(
            sft_adapter_hash=self.job.adapter_hash,
            data_fingerprint=self.job.data_fingerprint,
            template_hash=self._template(),
            pairs=pairs,
            loss=loss,
            expected_loss=expected,
            largest_difference=difference,
            tolerance=tolerance,
        )

    def _template(self) -> str:
        from preference_tuning.models import chat

        return chat.template_hash(self.base.tokenizer)

    def _record(
        self, trainer: Any, train: Any, held_out: Any, adapter: Path, seconds: float, resumed_at: list[int]
    ) -> TrainingRecord:
        job, state = self.job, trainer.state
        points = list(read(self.evidence / jobs_of_training.METRICS))
        losses = [p.metrics[f"{job.stage}/train/loss"] for p in points if f"{job.stage}/train/loss" in p.metrics]
        last = losses[-max(1, len(losses) // 10) :]
        prefix = f"{job.stage}/eval/"
        evaluations = [p.metrics for p in points if f"{prefix}loss" in p.metrics]
        return TrainingRecord(
            stage=job.stage,
            job=self.folder.name,
            identity=job.identity(),
            adapter_hash=fingerprint.of_directory(adapter),
            steps=state.global_step,
            epochs=round(state.epoch or 0.0, 4),
            seconds=round(seconds, 3),
            rows=len(train.rows),
            held_out_rows=len(held_out.rows),
            dropped_rows=train.dropped + held_out.dropped,
            cut_rows=train.cut + held_out.cut,
            tokens=int(trainer._total_train_tokens),
            train_loss=sum(last) / len(last),
            metrics={k.removeprefix(prefix): v for k, v in evaluations[-1].items()} if evaluations else {},
            trainable_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            compute=self.base.compute,
            engine=self.engine,
            engine_reason=self.engine_reason,
            backend=job.base_model.backend,
            template_hash=self._template(),
            resumed_at=resumed_at,
            reference=self.reference,
            versions={name: importlib.metadata.version(name) for name in VERSIONS},
        )

    def _write_evidence(self, record: TrainingRecord) -> None:
        from preference_tuning.training import report

        jobs.write_json(self.evidence / jobs_of_training.RECORD, record.model_dump(mode="json"))
        points = list(read(self.evidence / jobs_of_training.METRICS))
        jobs.write_text(self.evidence / jobs_of_training.REPORT, report.render(record, points))


if __name__ == "__main__":
    jobs.main(TrainingJob, main)
