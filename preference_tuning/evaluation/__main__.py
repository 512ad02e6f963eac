"""The evaluation job's process: ``python -m preference_tuning.evaluation FOLDER``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from preference_tuning import fingerprint, jobs
from preference_tuning.evaluation import gate, metrics, statistics
from preference_tuning.evaluation import job as jobs_of_evaluation
from preference_tuning.evaluation.job import Evaluation, EvaluationJob, Sample
from preference_tuning.evaluation.metrics import BASE
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
        from preference_tuning.models import backend

        self.job, self.comet = job, comet
        self.start = time.monotonic()
        self.evidence = folder / jobs_of_evaluation.EVIDENCE
        self.evidence.mkdir(exist_ok=True)
        backend.activate(job.base_model)
        from preference_tuning.models import compute
        from preference_tuning.models.family import Family

        chosen = compute.choose(job.base_model, job.output_dir)
        self.family = Family(job.base_model, job.source, job.output_dir, chosen, job.adapters)
        self.base = self.family.base

    def run(self) -> Evaluation:
        from preference_tuning.models import chat, rows

        job = self.job
        held_out = job.data / "held_out.arrow"
        tokens = rows.tokenise(held_out, self.base.tokenizer, job.room, job.output_dir / "tokens", answers=2)
        self.row_key = tokens.key
        asked = self._asked(held_out)
        scores, answers = self._read(tokens.rows, asked)
        self._write_scores(scores)
        models = metrics.figures(scores, job.references, job.beta, job.config.seed)
        candidate = list(job.adapters)[-1]
        evidence = gate.Evidence(candidate, job.references[candidate], scores, models)
        verdict = gate.verdict(candidate, gate.own_rules(evidence, job.config))
        evaluation = Evaluation(
            pairs=len(tokens.rows),
            dropped=tokens.dropped,
            data_fingerprint=job.data_fingerprint,
            base_model_fingerprint=job.source.fingerprint,
            template_hash=chat.template_hash(self.base.tokenizer),
            adapter_hashes=job.adapter_hashes,
            beta=job.beta,
            models=models,
            samples=_samples(asked, answers),
            verdict=verdict,
            seconds=round(time.monotonic() - self.start, 3),
        )
        self._report(evaluation, scores)
        return evaluation

    def _read(self, rows: Any, asked: list[dict[str, Any]]) -> tuple[dict[str, statistics.Array], dict[str, list[str]]]:
        """Return the scores on the rows and the answers to what is asked, of every model in turn."""
        import numpy as np
        import pyarrow.compute as pc

        lengths = {side: pc.list_value_length(rows.data.column(f"{side}_ids")).to_numpy() for side in SIDES}
        scores = {f"{side}_tokens": lengths[side].astype(np.float64) for side in SIDES}
        scores["prompt"] = np.array([fingerprint.of_value(ids) for ids in rows["prompt_ids"]])
        answers: dict[str, list[str]] = {}
        for name in (BASE, *self.job.adapters):
            with self.family.member(None if name == BASE else name) as model:
                values = self._score(name, model, rows)
                answers[name] = [text for part in self._parts_of(asked) for text in self._answer(name, model, part)]
            scores |= {f"{name}/{side}": values[:, i] for i, side in enumerate(SIDES)}
        return scores, answers

    def _score(self, name: str, model: Any, rows: Any) -> statistics.Array:
        """Return the log-probabilities [rows, 2] of chosen and rejected."""
        import numpy as np

        from preference_tuning.models import scoring, stored

        at_once = scoring.rows_at_once(self.job.config.batch_size, self.job.parts)
        shared = scoring.refuses_shared_prompt(model, max(rows["length"])) is None
        key = stored.key_of(
            self.row_key,
            self.job.adapter_hashes.get(name, BASE),
            self.job.source.fingerprint,
            self.base.dtype,
            shared,
            at_once,
        )
        # DPO's reference on these pairs, for instance: the same rows, weights and batches.
        known = stored.read(stored.place(self.job.output_dir, key), key)
        if known is not None:
            return known.double().numpy()
        values = np.full((len(rows), 2), np.nan)
        with bar(f"scoring {name}", len(rows)) as progress:
            batches = scoring.pair_logps(
                model,
                rows,
                dtype=self.base.dtype,
                device=self.base.device,
                pad_id=self.base.tokenizer.pad_token_id,
                batch_size=at_once,
                shared=shared,
            )
            for numbers, logps in batches:
                values[numbers] = logps.numpy()
                progress.update(len(numbers))
        return values

    def _write_scores(self, scores: dict[str, statistics.Array]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(scores), self.evidence / jobs_of_evaluation.SCORES)

    def _asked(self, held_out: Path) -> list[dict[str, Any]]:
        """Return the held-out pairs whose prompts every model answers, spread over the set."""
        from preference_tuning.models.rows import in_order

        pairs = in_order(held_out)
        count = min(self.job.config.samples, len(pairs))
        return [pairs[i * len(pairs) // count] for i in range(count)]

    def _parts_of(self, asked: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Return what is asked at once: everything, or less of it where memory ran out."""
        size = -(-len(asked) // self.job.parts) or 1
        return [asked[start : start + size] for start in range(0, len(asked), size)]

    def _answer(self, name: str, model: Any, pairs: list[dict[str, Any]]) -> list[str]:
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
        autocast = torch.autocast(device.type, self.base.dtype, enabled=low)
        with bar(f"answering {name}", len(pairs)) as progress, torch.no_grad(), autocast:
            made = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=self.job.config.max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            progress.update(len(pairs))
        texts: list[str] = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _report(self, evaluation: Evaluation, scores: metrics.Scores) -> None:
        from preference_tuning.evaluation import report

        points = {
            f"evaluation/{model}/{name}": figure.value
            for model, figures in evaluation.models.items()
            for name, figure in figures.items()
        }
        # A spool keeps what lies before its start, and a killed evaluation left this very point.
        spool = Spool(self.evidence / jobs_of_evaluation.METRICS, resume_at=-1)
        point = Point(step=0, metrics=points)
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


def _samples(asked: list[dict[str, Any]], answers: dict[str, list[str]]) -> list[Sample]:
    return [
        Sample(
            prompt=row["prompt"][-1]["content"],
            chosen=row["chosen"][-1]["content"],
            answers={name: given[i] for name, given in answers.items()},
        )
        for i, row in enumerate(asked)
    ]


SIDES = ("chosen", "rejected")

if __name__ == "__main__":
    jobs.main(EvaluationJob, main)
