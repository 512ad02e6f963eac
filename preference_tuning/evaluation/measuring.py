"""An evaluation from its job to its evidence: every model on the same pairs, its answers, the judge, the verdict."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from preference_tuning import jobs
from preference_tuning.config import JudgeConfig
from preference_tuning.data import sides
from preference_tuning.data.table import SPLIT
from preference_tuning.evaluation import (
    deciding,
    differences,
    general,
    generation,
    harness,
    judge,
    probes,
    report,
    scores,
)
from preference_tuning.evaluation import job as jobs_of_evaluation
from preference_tuning.evaluation.deciding import Judgement, Measured
from preference_tuning.evaluation.generation import Answer
from preference_tuning.evaluation.job import Evaluation, EvaluationJob, Sample
from preference_tuning.evaluation.metrics import BASE, CHAMPION, Figures
from preference_tuning.models import chat, compute, rows, scoring
from preference_tuning.models.comparing import Comparison
from preference_tuning.models.family import Family
from preference_tuning.progress import bar
from preference_tuning.tracking.spool import Point, Spool

SIDES = scores.SIDES


class Measuring:
    """One evaluation: measure, write what was measured, and decide from what was written."""

    def __init__(self, folder: Path, job: EvaluationJob) -> None:
        """Load the models of ``job``; its evidence goes into its ``folder``."""
        self.job = job
        self.start = time.monotonic()
        self.evidence = folder / jobs_of_evaluation.EVIDENCE
        self.evidence.mkdir(exist_ok=True)
        sides.check_overlap(job.data / SPLIT)
        chosen = compute.choose(job.base_model, job.output_dir)
        self.family = Family(job.base_model, job.source, job.output_dir, chosen, job.tuned)
        self.base = self.family.base
        self.names = (BASE, *job.tuned)
        # A spool keeps what lies before its start, and a killed evaluation left points of step 0.
        self.spool = Spool(self.evidence / jobs_of_evaluation.METRICS, resume_at=-1)

    def run(self) -> Evaluation:
        """Return the evaluation; its evidence folder then holds everything that it says."""
        job, held_out = self.job, self.job.data / "held_out.arrow"
        tokens = rows.tokenise(held_out, self.base.tokenizer, job.room, job.output_dir / "tokens", answers=2)
        self._score(tokens.rows)
        for figures_of, measure in (
            (deciding.of_scores, None),
            (deciding.of_answers, self._answer),
            (deciding.of_general, self._read_general),
            (deciding.of_judge, self._ask_judge),
            (deciding.of_tasks, self._run_tasks),
        ):
            if measure:
                measure()
            self._note(figures_of(Measured.read(self.evidence), job.terms))
        self.spool.close()
        measured = Measured.read(self.evidence)
        figures, verdict = deciding.decide(measured, job.terms)
        split = sides.fingerprint_of(job.data / SPLIT)
        bonds = deciding.bound(self.evidence, job.terms, {**job.identity(), "split": split})
        judgement = measured.judgement
        evaluation = Evaluation(
            pairs=len(tokens.rows),
            dropped=tokens.dropped,
            data_fingerprint=job.data_fingerprint,
            base_model_fingerprint=job.source.fingerprint,
            template_hash=chat.template_hash(self.base.tokenizer),
            adapter_hashes=job.adapter_hashes,
            terms=job.terms,
            models=figures,
            worse=differences.worse(figures, job.terms),
            samples=self._samples(measured.answers),
            verdict=verdict,
            notes=[judgement.calibration.reason] if judgement else [],
            bonds=bonds,
            seal=deciding.seal(bonds, figures, verdict),
            seconds=round(time.monotonic() - self.start, 3),
        )
        self._publish(evaluation, measured)
        return evaluation

    def _note(self, figures: Mapping[str, Figures]) -> None:
        """Write figures to the spool, as they come."""
        metrics = {
            f"evaluation/{model}/{name}": figure.value
            for model, found in figures.items()
            if model in self.names
            for name, figure in found.items()
        }
        if metrics:
            self.spool.append(Point(step=0, metrics=metrics))

    def _score(self, pairs: Any) -> None:
        """Write the score table."""
        size = scoring.rows_at_once(self.job.config.batch_size, self.job.parts)
        with self.family.member(None) as model:
            shared = scoring.refuses_tree(model, pairs, self.base.dtype) is None
        comparison = Comparison(self.family, self.job.references, pairs, size, shared)
        lengths = (pc.list_value_length(pairs.data.column(f"{side}_ids")).to_numpy() for side in SIDES)
        collector = scores.Collector(*lengths)
        with bar("scoring " + ", ".join(self.names), len(pairs) * len(self.names)) as progress:
            for batch in comparison.run(self.names):
                found = {name: logps.cpu().numpy() for name, logps in batch.logps.items()}
                divergences = {name: values.cpu().numpy() for name, values in batch.divergences.items()}
                collector.add(batch.numbers, batch.answer.cpu().numpy(), found, divergences)
                progress.update(len(batch.numbers) * len(found))
        table = collector.table(pairs["content"], pairs["group"], self.job.references)
        if self.job.scored_champion is not None:
            unseen = sides.new_to(self.job.scored_champion.split, pairs["group"])
            table = table.append_column(deciding.UNSEEN, [unseen])
        scores.write(table, self.evidence / deciding.SCORES)
        self._keep_probes(pairs, table)

    def _keep_probes(self, tokens: Any, table: Any) -> None:
        """Write the pairs by which the candidate is known again, wherever it is loaded."""
        pairs = rows.in_order(self.job.data / "held_out.arrow")
        base = self.base
        kept = probes.pick(tokens, pairs, table, self.job.terms.candidate, base.tokenizer, base.compute)
        jobs.write_json(self.evidence / deciding.PROBES, kept.model_dump(mode="json"))

    @cached_property
    def _asked(self) -> list[dict[str, Any]]:
        """The held-out pairs whose prompts every model answers: one a prompt, spread over the set."""
        config = self.job.config
        count = max(config.samples, config.judge.prompts if config.judge else 0)
        pairs = rows.in_order(self.job.data / "held_out.arrow")
        first = {group: number for number, group in reversed(list(enumerate(pairs["group"])))}
        return [pairs[number] for number in judge.spread(sorted(first.values()), count)] if count else []

    def _answer(self) -> None:
        """Write every model's answers, greedy and sampled."""
        if not self._asked:
            return
        tokenizer = self.base.tokenizer
        prompts = [
            chat.encode_prompt(tokenizer, chat.read_messages(pair["prompt"]), chat.read_tools(pair["tools"]))
            for pair in self._asked
        ]
        size = -(-min(len(prompts), 4 * self.job.config.batch_size) // self.job.parts)
        answers: list[Answer] = []
        with bar("answering " + ", ".join(self.names), len(prompts) * len(self.names)) as progress:
            # The last that was scored is the one in memory, where only one of them has room.
            for name in reversed(self.names):
                with self.family.member(None if name == BASE else name) as model:
                    for start in range(0, len(prompts), size):
                        answers += self._some_answers(name, model, prompts, start, size)
                        progress.update(len(prompts[start : start + size]))
        generation.write(answers, self.evidence / deciding.ANSWERS)

    def _some_answers(self, name: str, model: Any, prompts: Sequence[list[int]], start: int, size: int) -> list[Answer]:
        config = self.job.config
        part, limit, seed = prompts[start : start + size], config.max_new_tokens, config.seed + start
        found = generation.answer(model, name, self.base.tokenizer, part, limit, seed, self.base.dtype)
        return [answer.model_copy(update={"prompt": answer.prompt + start}) for answer in found]

    def _read_general(self) -> None:
        """Write what every model makes of the general text, where there is some."""
        config = self.job.config
        if config.general is None:
            return
        texts = general.texts(Path(config.general))
        ids = general.encode(texts, self.base.tokenizer, self.job.base_model.max_seq_length)
        size = scoring.rows_at_once(config.batch_size, self.job.parts)
        columns: dict[str, Any] = {general.TOKENS: [len(row) - 1 for row in ids]}
        with bar("reading general text", len(ids) * len(self.names)) as progress:
            for name in self.names:
                with self.family.member(None if name == BASE else name) as model:
                    columns[name] = general.score(model, ids, size, self.base, progress.update)
        general.write(columns, self.evidence / deciding.GENERAL)

    def _ask_judge(self) -> None:
        """Write what the judge says, where there is one."""
        config = self.job.config.judge
        if config is None:
            return
        folder, seed = self.job.output_dir / "judge", self.job.config.seed
        folder.mkdir(parents=True, exist_ok=True)
        key = judge.key_of(config)
        calibration = judge.calibrate(self._labelled(config), config, folder, key, seed)
        terms = self.job.terms
        parent = self._duels(terms.candidate, terms.references[terms.candidate])
        against_parent = judge.compare(parent, config, folder, key, seed, spent=calibration.cost)
        against_champion = None
        if self.job.scored_champion is not None:
            cost = judge.Cost.sum([calibration.cost, against_parent.cost])
            duels = self._duels(terms.candidate, CHAMPION)
            against_champion = judge.compare(duels, config, folder, key, seed, spent=cost)
        judgement = Judgement(calibration=calibration, against_parent=against_parent, against_champion=against_champion)
        jobs.write_json(self.evidence / deciding.JUDGED, judgement.model_dump(mode="json"))

    def _labelled(self, config: JudgeConfig) -> list[judge.Comparison]:
        """Return held-out pairs as comparisons whose better answer is known."""
        pairs = rows.in_order(self.job.data / "held_out.arrow")
        chosen = judge.spread(range(len(pairs)), config.calibration_pairs)
        return [_labelled(pairs[number]) for number in chosen]

    def _duels(self, candidate: str, other: str) -> list[judge.Comparison]:
        """Return the greedy answers of two models to the same prompts."""
        answers = generation.read(self.evidence / deciding.ANSWERS)
        given = {(answer.model, answer.prompt): answer for answer in answers if answer.kind == "greedy"}
        return [
            judge.Comparison(
                prompt=judge.conversation(pair["prompt"]),
                candidate=given[candidate, number].text,
                parent=given[other, number].text,
                candidate_length=len(given[candidate, number].tokens),
                parent_length=len(given[other, number].tokens),
                group=pair["group"],
            )
            for number, pair in enumerate(self._asked)
        ]

    def _run_tasks(self) -> None:
        """Write the figures of lm-evaluation-harness, where tasks are configured."""
        config = self.job.config.lm_eval
        if config is None:
            return
        job = self.job
        found = harness.run(
            harness.HarnessJob(
                config=config,
                base_model=job.base_model,
                source=job.source,
                adapters=job.tuned,
                adapter_hashes=job.tuned_hashes,
                batch_size=job.config.batch_size,
                seed=job.config.seed,
                output_dir=job.output_dir,
            )
        )
        told = {model: {name: f.model_dump() for name, f in figures.items()} for model, figures in found.models.items()}
        jobs.write_text(self.evidence / deciding.TASKS, json.dumps(told, indent=2) + "\n")

    def _samples(self, answers: list[Answer]) -> list[Sample]:
        """Return the answers side by side, as many as the config asks to show."""
        given = {(answer.kind, answer.model, answer.prompt): answer.text for answer in answers}
        shown = judge.spread(list(enumerate(self._asked)), self.job.config.samples) if self.job.config.samples else []
        return [
            Sample(
                prompt=pair["prompt"][-1]["content"],
                chosen=pair["chosen"][-1]["content"],
                answers={name: given["greedy", name, number] for name in self.names},
                sampled={name: given["sampled", name, number] for name in self.names},
            )
            for number, pair in shown
        ]

    def _publish(self, evaluation: Evaluation, measured: Measured) -> None:
        """Write summary and report."""
        jobs.write_json(self.evidence / jobs_of_evaluation.SUMMARY, evaluation.model_dump(mode="json"))
        jobs.write_text(self.evidence / jobs_of_evaluation.REPORT, report.render(evaluation, measured))


def _labelled(pair: dict[str, Any]) -> judge.Comparison:
    chosen, rejected = (pair[side][-1]["content"] for side in SIDES)
    prompt = judge.conversation(pair["prompt"])
    return judge.Comparison(prompt, chosen, rejected, len(chosen), len(rejected), pair["group"])
