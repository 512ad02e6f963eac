"""A stage of training from its job to its record, in each of the job's processes."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
import sys
from pathlib import Path
from typing import Any

from preference_tuning import events, fingerprint, jobs
from preference_tuning.errors import ConfigError, DivergedError, InterruptedJobError, PreferenceTuningError
from preference_tuning.jobs import stopping
from preference_tuning.models import chat, compute, kernels, loading, rows, scoring, weights
from preference_tuning.models.source import pinned
from preference_tuning.tracking.spool import Spool, read
from preference_tuning.training import arguments, callbacks, checkpoints, disk, processes, reference, report, trainers
from preference_tuning.training import job as jobs_of_training
from preference_tuning.training.job import ReferenceProof, TrainingJob, TrainingRecord

VERSIONS = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


class Stage:
    """One stage: load, tokenise, build the trainer, resume, train, save. What is written, the first process writes."""

    def __init__(self, folder: Path, job: TrainingJob) -> None:
        """Load the base model for ``job`` in its ``folder``."""
        self.folder, self.job, self.first = folder, job, processes.rank() == 0
        self.evidence = folder / jobs_of_training.EVIDENCE
        self.evidence.mkdir(exist_ok=True)
        if job.adapter is not None and fingerprint.of_directory(job.adapter) != job.adapter_hash:
            raise DivergedError(f"the SFT result in {job.adapter} changed since SFT wrote it; start the run anew")
        with processes.first_then_others():
            chosen = compute.of_job(job.base_model, job.output_dir, folder)
            loading.model_folder(job.source, job.output_dir)
        full = job.stage == "sft" and job.lora is None
        self.base = loading.load_base(job.base_model, job.source, job.output_dir, chosen, full=full, tuned=job.adapter)
        self.engine, self.engine_reason = "", ""
        self.reference: ReferenceProof | None = None
        self.identity = job.identity()
        self.checkpoints = folder / checkpoints.FOLDER
        self.checkpoint_size = 0

    def run(self) -> TrainingRecord | None:
        """Train, save and return the record; other processes than the first return None."""
        try:
            return self._run()
        except Exception as error:
            if not disk.is_full(error, self.checkpoints, self.checkpoint_size):
                raise
            checkpoints.clean(self.checkpoints)
            intact, _ = checkpoints.newest_good(self.checkpoints)
            raise disk.full(self.checkpoints, self.checkpoint_size, intact) from error
        finally:
            disk.release(self.checkpoints)

    def _run(self) -> TrainingRecord | None:
        job = self.job
        checkpoint = self._checkpoint()
        model = self._model()
        answers = 2 if job.stage == "dpo" else 1
        train, held_out = self._rows(job.split, answers), self._rows("held_out", answers)
        self._check_disk(model, job.settings.total_steps(len(train.rows), job.processes))
        trainer = self._trainer(model, train.rows, held_out.rows)
        processes.draw_apart(job.settings.seed)
        seconds = self._train(trainer, checkpoint)
        if trainer.state.global_step < trainer.state.max_steps:
            raise InterruptedJobError(
                f"{job.stage.upper()} was stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, "
                "after a checkpoint; the same command continues it"
            )

        # Every process has a share of sharded weights, so every process takes part in gathering them.
        gathered = trainer.accelerator.get_state_dict(trainer.model) if job.fsdp != "off" else None
        if not self.first:
            return None
        adapter = self._save(trainer, gathered)
        record = self._record(trainer, train, held_out, adapter, seconds)
        self._write_evidence(record)
        stopping.finish()
        return record

    def _checkpoint(self) -> Path | None:
        """Return the checkpoint that training continues from, or None if it begins."""
        if self.first:
            checkpoints.clean(self.checkpoints)
        checkpoint, rejected = checkpoints.newest_good(self.checkpoints)
        stage = self.job.stage.upper()
        if rejected and checkpoint is None and self.job.strict_resume:
            raise PreferenceTuningError(
                f"{stage}: no checkpoint in {self.checkpoints} is intact ({'; '.join(rejected)}), and "
                "training.strict_resume keeps the stage from starting over. Restore one of them, or remove the folder"
            )
        for line in rejected:
            name, _, reason = line.partition(": ")
            warning = f"warning: {line}; not resumed from"
            self._happened("checkpoint_rejected", warning, checkpoint=name, reason=reason)
        if checkpoint is not None:
            step = checkpoints.step_of(checkpoint)
            checkpoints.check(checkpoint, self.identity, forced=self.job.forced is not None)
            self._happened("resumed", f"{stage}: continues at step {step}", step=step)
        elif rejected:
            self._happened("started_over", "warning: no checkpoint is intact; the stage starts over")
        return checkpoint

    def _check_disk(self, model: Any, steps: int) -> None:
        parameters, tokenizer = list(model.parameters()), self.base.tokenizer
        optimizer = arguments.optimizer(self.job.settings.optim, self.base.device.type == "cpu")
        sharded = self.job.fsdp != "off"
        self.checkpoint_size = disk.checkpoint_size(parameters, tokenizer, optimizer, steps, sharded)
        disk.check(self.checkpoints, self.checkpoint_size, disk.weights_size(parameters, tokenizer))
        if self.first:
            disk.reserve(self.checkpoints)

    def _train(self, trainer: Any, checkpoint: Path | None) -> float:
        """Run the trainer from ``checkpoint`` on and return the seconds of training, those of earlier legs included."""
        totals = checkpoints.totals_of(checkpoint)
        path = self.evidence / jobs_of_training.METRICS
        spool = Spool(path, resume_at=checkpoints.step_of(checkpoint) if checkpoint else 0) if self.first else None
        clock = callbacks.Clock(totals.seconds)
        trainer._total_train_tokens = totals.tokens  # TRL would count anew

        def publish(step: int) -> None:
            if spool is not None:
                spool.sync()  # a checkpoint must not be newer than the metrics before it
            done = checkpoints.Totals(seconds=clock.seconds, tokens=trainer._total_train_tokens)
            checkpoints.publish(self.checkpoints, step, done, self.identity)

        trainer.publish = publish
        callbacks.watch(trainer, self.job.stage, self.job.settings, spool, self.job.save_every_minutes)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return clock.seconds

    def _happened(self, kind: events.Kind, text: str, **facts: Any) -> None:
        self._say(text)
        if self.first:
            events.add(self.folder, kind, text, **facts)

    def _say(self, text: str) -> None:
        if self.first:
            print(f"  {text}", file=sys.stderr)

    def _save(self, trainer: Any, gathered: dict[str, Any] | None) -> Path:
        folder = self.folder / jobs_of_training.ADAPTER
        base_model = pinned(self.job.base_model, self.job.source.fingerprint)
        weights.save(trainer.model, self.base.tokenizer, folder, base_model, gathered)
        if problem := weights.problem(folder):
            shutil.rmtree(folder)
            stage = self.job.stage.upper()
            raise DivergedError(f"{stage} made weights that are not healthy: {problem}; nothing is kept")
        return folder

    def _model(self) -> Any:
        model = self._with_adapter()
        if self.job.settings.torch_compile:
            kernels.compile_decoder(model)
        return model

    def _with_adapter(self) -> Any:
        if self.job.stage == "sft":
            return loading.new_policy(self.base, self.job.lora, self.job.settings.seed)
        return loading.load_policy(self.base, trainable=True)

    def _rows(self, split: str, answers: int) -> Any:
        table = self.job.data / f"{split}.arrow"
        with processes.first_then_others():
            return rows.tokenise(table, self.base.tokenizer, self.job.room, self.job.output_dir / "tokens", answers)

    def _trainer(self, model: Any, train: Any, held_out: Any) -> Any:
        how: dict[str, Any] = {
            "model": model,
            "processing_class": self.base.tokenizer,
            "dtype": self.base.dtype,
            "pad_id": self.base.tokenizer.pad_token_id,
            "parts": self.job.parts,
        }
        if self.job.sft:
            self.job.sft.check_warmup("sft", len(train), self.job.processes)
            settings = arguments.sft(self.job.sft, self.base, self.checkpoints, self.job.fsdp)
            shared = self._choose_engine(model, train, "auto", otherwise="plain")
            return trainers.AnswerSFTTrainer(
                args=settings, train_dataset=train, eval_dataset=held_out, shared_prompt=shared, **how
            )
        assert self.job.dpo is not None
        self.job.dpo.check_warmup("dpo", len(train), self.job.processes)
        if self.job.processes > 1 and (coupled := jobs_of_training.COUPLED & set(self.job.dpo.loss_type)):
            self._say(f"DPO: {', '.join(sorted(coupled))} is computed in each process, over its share of a batch")
        shared = self._choose_engine(model, train, self.job.dpo.engine, otherwise="trl")
        settings = arguments.dpo(self.job.dpo, self.base, self.checkpoints, self.job.fsdp)
        train, held_out = self._with_reference(model, train, held_out, shared)
        trainer = trainers.PreferenceTrainer(
            args=settings, train_dataset=train, eval_dataset=held_out, shared_prompt=shared, **how
        )
        self._prove_reference(trainer, shared)
        return trainer

    def _choose_engine(self, model: Any, train: Any, wanted: str, otherwise: str) -> bool:
        """Return whether the prompts of a batch are shared, and keep the reason."""
        refusal = None
        if wanted != "trl":
            refusal = scoring.refuses_tree(model, train, self.base.dtype)
        if wanted == "shared_prompt" and refusal:
            raise ConfigError(f"dpo.engine: shared_prompt cannot run this model: {refusal}; use auto or trl")
        shared = wanted != "trl" and refusal is None
        self.engine = "shared_prompt" if shared else otherwise
        self.engine_reason = refusal or (
            "chosen in the config" if wanted != "auto" else "the model's attention takes it"
        )
        if refusal:
            self._say(f"{self.job.stage.upper()}: the prompt is not shared, because {refusal}")
        return shared

    def _with_reference(self, model: Any, train: Any, held_out: Any, shared: bool) -> tuple[Any, Any]:
        assert self.job.dpo is not None
        visited = trainers.first_rows(train, self.job.dpo, self.job.dpo.total_steps(len(train), self.job.processes))
        key = fingerprint.of_value([self.identity, self._template(), str(self.base.dtype), shared])
        size = scoring.rows_at_once(self.job.settings.per_device_eval_batch_size, self.job.parts)
        common = {"model": model, "batch_size": size, **self._how(shared)}
        rows_of = {
            split: reference.add_reference(
                rows,
                self.folder / f"reference-{split}.safetensors",
                key,
                title=f"reference, {split}",
                only=only,
                **common,
            )
            for split, rows, only in (("train", train, visited), ("held_out", held_out, None))
        }
        return rows_of["train"], rows_of["held_out"]

    def _how(self, shared: bool) -> dict[str, Any]:
        return {
            "dtype": self.base.dtype,
            "device": self.base.device,
            "pad_id": self.base.tokenizer.pad_token_id,
            "shared": shared,
        }

    def _prove_reference(self, trainer: Any, shared: bool) -> None:
        assert self.job.dpo is not None
        assert self.job.adapter_hash is not None
        dpo = self.job.dpo
        tolerance = scoring.TOLERANCE[self.base.dtype]
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
        return chat.template_hash(self.base.tokenizer)

    def _record(self, trainer: Any, train: Any, held_out: Any, adapter: Path, seconds: float) -> TrainingRecord:
        job, state = self.job, trainer.state
        points = list(read(self.evidence / jobs_of_training.METRICS))
        # Of every step, whatever logging_steps is; it travels in the checkpoint.
        losses = [logged["loss"] for logged in state.log_history if "loss" in logged]
        happened = events.read(self.folder)
        prefix = f"{job.stage}/eval/"
        evaluations = [p.metrics for p in points if f"{prefix}loss" in p.metrics]
        return TrainingRecord(
            stage=job.stage,
            job=self.folder.name,
            identity=self.identity,
            adapter_hash=fingerprint.of_directory(adapter),
            steps=state.global_step,
            max_steps=state.max_steps,
            epochs=round(state.epoch or 0.0, 4),
            seconds=round(seconds, 3),
            rows=len(train.rows),
            held_out_rows=len(held_out.rows),
            dropped_rows=train.dropped + held_out.dropped,
            cut_rows=train.cut + held_out.cut,
            tokens=int(trainer._total_train_tokens),
            train_loss=math.fsum(losses) / len(losses),
            metrics={k.removeprefix(prefix): v for k, v in evaluations[-1].items()} if evaluations else {},
            trainable_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            compute=self.base.compute,
            processes=job.processes,
            parts=job.parts,
            micro_batch=scoring.rows_at_once(job.settings.per_device_train_batch_size, job.parts),
            engine=self.engine,
            engine_reason=self.engine_reason,
            backend=job.base_model.backend,
            template_hash=self._template(),
            resumed_at=[event.facts["step"] for event in happened if event.kind == "resumed"],
            forced=job.forced,
            events=happened,
            reference=self.reference,
            versions={name: importlib.metadata.version(name) for name in VERSIONS},
        )

    def _write_evidence(self, record: TrainingRecord) -> None:
        jobs.write_json(self.evidence / jobs_of_training.RECORD, record.model_dump(mode="json"))
        points = list(read(self.evidence / jobs_of_training.METRICS))
        jobs.write_text(self.evidence / jobs_of_training.REPORT, report.render(record, points))
