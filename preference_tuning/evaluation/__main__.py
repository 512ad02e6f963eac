"""The evaluation job's process: ``python -m preference_tuning.evaluation FOLDER``."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from preference_tuning import jobs
from preference_tuning.evaluation import gate, statistics
from preference_tuning.evaluation import job as jobs_of_evaluation
from preference_tuning.evaluation.job import BASE, Evaluation, EvaluationJob, Sample
from preference_tuning.progress import bar
from preference_tuning.tracking.comet import Comet
from preference_tuning.tracking.spool import Point, Spool


def main(folder: Path, job: EvaluationJob) -> Evaluation:
    """Score every model of the job, compute the figures, and write the evidence."""
    comet = Comet.start(job.comet, "evaluation")
    try:
        return _Evaluating(folder, job, comet).run()
    finally:
        comet.end()


class _Evaluating:
    def __init__(self, folder: Path, job: EvaluationJob, comet: Comet) -> None:
        from preference_tuning.models import compute, loading

        self.job, self.comet = job, comet
        self.start = time.monotonic()
        self.evidence = folder / jobs_of_evaluation.EVIDENCE
        self.evidence.mkdir(exist_ok=True)
        loading.activate_backend(job.base_model)
        chosen = compute.choose(job.base_model, job.output_dir)
        self.base: Any = loading.load_base(job.base_model, job.source, job.output_dir, chosen)
        self.model = loading.load_adapters(self.base, job.adapters)

    def run(self) -> Evaluation:
        from preference_tuning.models import chat, rows

        job = self.job
        held_out = job.data / "held_out.arrow"
        tokens = rows.tokenise(held_out, self.base.tokenizer, job.room, job.output_dir / "tokens", answers=2)
        scores = self._score(tokens.rows)
        self._write_scores(scores)
        models = self._figures(scores)
        candidate = list(job.adapters)[-1]
        verdict = gate.judge(candidate, len(tokens.rows), scores, models[candidate], job.config)
        evaluation = Evaluation(
            pairs=len(tokens.rows),
            dropped=tokens.dropped,
            data_fingerprint=job.data_fingerprint,
            base_model_fingerprint=job.source.fingerprint,
            template_hash=chat.template_hash(self.base.tokenizer),
            beta=job.beta,
            models=models,
            samples=self._samples(held_out),
            verdict=verdict,
            seconds=round(time.monotonic() - self.start, 3),
        )
        self._report(evaluation, scores)
        return evaluation

    def _as(self, name: str) -> Any:
        """Return a context in which the one set of weights is the model ``name``."""
        if name == BASE:
            return self.model.disable_adapter()
        self.model.set_adapter(name)
        return nullcontext()

    def _score(self, rows: Any) -> dict[str, statistics.Array]:
        import numpy as np
        import pyarrow.compute as pc

        from preference_tuning.models import scoring

        refusal = scoring.refuses_shared_prompt(self.model, max(rows["length"]))
        names = [BASE, *self.job.adapters]
        lengths = {side: pc.list_value_length(rows.data.column(f"{side}_ids")).to_numpy() for side in SIDES}
        scores = {f"{side}_tokens": lengths[side].astype(np.float64) for side in SIDES}
        with bar("scoring", len(names) * len(rows)) as progress:
            for name in names:
                values = np.full((len(rows), 2), np.nan)
                with self._as(name):
                    batches = scoring.pair_logps(
                        self.model,
                        rows,
                        dtype=self.base.dtype,
                        device=self.base.device,
                        pad_id=self.base.tokenizer.pad_token_id,
                        batch_size=self.job.config.batch_size,
                        shared=refusal is None,
                    )
                    for numbers, logps in batches:
                        values[numbers] = logps.numpy()
                        progress.update(len(numbers))
                scores |= {f"{name}/{side}": values[:, i] for i, side in enumerate(SIDES)}
        return scores

    def _write_scores(self, scores: dict[str, statistics.Array]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(scores), self.evidence / jobs_of_evaluation.SCORES)

    def _figures(self, scores: statistics.Scores) -> dict[str, dict[str, statistics.Figure]]:
        job, seed = self.job, self.job.config.seed
        found = {BASE: statistics.model_figures(scores, BASE, seed)}
        parent = BASE
        for name in job.adapters:
            beta = job.beta if name == "dpo" else 1.0
            rewards = statistics.reward_figures(scores, name, parent, beta, seed)
            found[name] = {**statistics.model_figures(scores, name, seed), **rewards}
            parent = name
        return found

    def _samples(self, held_out: Path) -> list[Sample]:
        from preference_tuning.models.rows import in_order

        pairs = in_order(held_out)
        count = min(self.job.config.samples, len(pairs))
        chosen = [pairs[i * len(pairs) // count] for i in range(count)]
        if not chosen:
            return []
        names = [BASE, *self.job.adapters]
        answers: dict[str, list[str]] = {}
        with bar("answering", len(names) * count) as progress:
            for name in names:
                with self._as(name):
                    answers[name] = self._answer(chosen)
                progress.update(count)
        return [
            Sample(
                prompt=row["prompt"][-1]["content"],
                chosen=row["chosen"][-1]["content"],
                answers={name: answers[name][i] for name in names},
            )
            for i, row in enumerate(chosen)
        ]

    def _answer(self, pairs: list[dict[str, Any]]) -> list[str]:
        """Return greedy answers to the prompts of a batch of pairs."""
        import torch

        from preference_tuning.models import chat

        tokenizer, device = self.base.tokenizer, self.base.device
        encoded = [
            chat.encode_prompt(tokenizer, chat.read_messages(pair["prompt"]), chat.read_tools(pair["tools"]))
            for pair in pairs
        ]
        width = max(map(len, encoded))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(e)) + e for e in encoded], device=device)
        mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded], device=device)
        low = self.base.dtype != torch.float32
        with torch.no_grad(), torch.autocast(device.type, self.base.dtype, enabled=low):
            made = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=self.job.config.max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts: list[str] = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _report(self, evaluation: Evaluation, scores: statistics.Scores) -> None:
        from preference_tuning.evaluation import report

        metrics = {
            f"evaluation/{model}/{name}": figure.value
            for model, figures in evaluation.models.items()
            for name, figure in figures.items()
        }
        spool = Spool(self.evidence / jobs_of_evaluation.METRICS)
        point = Point(step=0, metrics=metrics)
        spool.append(point)
        spool.close()
        self.comet.log(point)
        self.comet.log_others(
            {
                "verdict": evaluation.verdict.decision,
                "verdict/reason": evaluation.verdict.reason,
                "data/fingerprint": evaluation.data_fingerprint,
            }
        )
        jobs.write_json(self.evidence / jobs_of_evaluation.SUMMARY, evaluation.model_dump(mode="json"))
        jobs.write_text(self.evidence / jobs_of_evaluation.REPORT, report.render(evaluation, scores))


SIDES = ("chosen", "rejected")

if __name__ == "__main__":
    jobs.main(EvaluationJob, main)
