"""TRL's SFT and DPO trainers with our forward pass: arguments, loop, losses, metric names and checkpoints are TRL's.

What is replaced: batches of similar length, one row a pair, and a head that sees answer tokens only. Written against
trl 1.14.2: ``DPOTrainer`` has a branch that takes per-token log-probabilities instead of logits (made for the Liger
kernel), and that branch calls the method overridden here, so that every loss type works on our forward as it stands.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from trl import DPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from preference_tuning.config import StageConfig
from preference_tuning.models import scoring, weights
from preference_tuning.models.chat import PairTokens
from preference_tuning.training import callbacks, checkpoints, memory, processes, sharing

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")

SORTED_BATCHES = 8
"""Batches sorted together by length: enough to keep padding low, few enough to keep the order random."""


class LengthBatches(Sampler[int]):
    """Rows in an order that the seed and the epoch decide, with neighbours of similar length."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; called by the training loop."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        window = self._batch_size * SORTED_BATCHES
        batches = [
            batch
            for start in range(0, len(order), window)
            for batch in self._cut(sorted(order[start : start + window], key=self._lengths.__getitem__))
        ]
        # Only the last batch may be short, wherever it falls: shuffle the full ones.
        full = [batch for batch in batches if len(batch) == self._batch_size]
        short = [batch for batch in batches if len(batch) < self._batch_size]
        for i in torch.randperm(len(full), generator=generator).tolist():
            yield from full[i]
        for batch in short:
            yield from batch

    def _cut(self, rows: list[int]) -> list[list[int]]:
        return [rows[i : i + self._batch_size] for i in range(0, len(rows), self._batch_size)]


def first_rows(rows: datasets.Dataset, config: StageConfig, steps: int) -> list[int]:
    """Return the rows that ``steps`` optimizer steps of all processes reach, without repetition."""
    batch_size = config.per_device_train_batch_size * processes.count()
    sampler = LengthBatches(list(rows["length"]), batch_size, config.seed)
    wanted = steps * batch_size * config.gradient_accumulation_steps
    return list(itertools.islice(sampler, wanted)) if wanted < len(rows) else list(range(len(rows)))


class Counts(NamedTuple):
    """What a piece of a batch has, over all processes; metrics are means over one or the other."""

    rows: float
    chosen: float
    """Tokens of the chosen answers."""
    rejected: float

    def of(self, metric: str) -> float:
        """Return the weight of a piece in the mean that ``metric`` is."""
        tokens = {
            "entropy": self.chosen + self.rejected,
            "mean_token_accuracy": self.chosen,
            "logits/chosen": self.chosen,
            "logits/rejected": self.rejected,
        }
        return tokens.get(metric, self.rows)


class _ByLength:
    """For a trainer whose rows have a ``length`` column, and whose batches can be run in pieces."""

    parts = 1
    """Into how many pieces a batch is cut; a smaller one has a piece for each row."""
    args: Any
    train_dataset: Any
    _metrics: Any
    model: Any
    accelerator: Any
    data_collator: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any
    control: Any
    _total_train_tokens: int
    publish: Callable[[int], None]
    """Puts the checkpoint of a step in place when all processes have written theirs of it; the first one calls it."""

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> LengthBatches:
        rows = self.train_dataset if train_dataset is None else train_dataset
        return LengthBatches(list(rows["length"]), self.args.train_batch_size * processes.count(), self.args.seed)

    def _get_dataloader(
        self, dataset: datasets.Dataset, description: str, batch_size: int, sampler_fn: Any = None, **_: Any
    ) -> Any:
        """Return the shares of this process in the batches of all (accelerate would repeat rows to fill the last)."""
        rows = self._remove_unused_columns(dataset, description=description)  # type: ignore[attr-defined]
        sampler = (sampler_fn and sampler_fn(rows)) or SequentialSampler(rows)
        batches = sharing.ShareOfBatches(sampler, batch_size * processes.count())
        loader: DataLoader[Any] = DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=self.collator(batch_size),
            pin_memory=self.args.dataloader_pin_memory,
        )
        here = self.accelerator.device
        return prepare_data_loader(loader, here, num_processes=1, process_index=0, put_on_device=True)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: a checkpoint is for this job only."""

    def _get_output_dir(self, trial: Any) -> str:
        """Return where a checkpoint is written; it is put in place when it is complete."""
        return str(checkpoints.aside(Path(self.args.output_dir)))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        processes.wait()  # for the files of the others: each writes its random state
        if self.state.is_world_process_zero:
            self.publish(self.state.global_step)

    def collator(self, batch_size: int) -> sharing.Cut:
        """Return what lays out a batch of ``batch_size`` rows in this process."""
        return sharing.Cut(self.data_collator, min(self.parts, batch_size))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        def run(piece: dict[str, Any], last: bool, _: float | None) -> Tensor:
            # Gradients are exchanged once, after the last piece; whether at all, the loop has decided.
            with nullcontext() if last else self.accelerator.no_sync(model), self._held(piece, "training"):
                return super(_ByLength, self).training_step(model, piece, num_items_in_batch)  # type: ignore[misc,no-any-return]

        return self._sum(inputs, "train", run)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        return processes.total(self.loss_of(model, inputs)) / processes.count(), None, None

    def loss_of(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Return the loss of a batch, without gradients: this process's term of the mean over all."""

        def run(piece: dict[str, Any], _: bool, tokens: float | None) -> Tensor:
            with self._held(piece, "evaluation"), torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
                return self.compute_loss(model, piece, num_items_in_batch=tokens).detach()  # type: ignore[attr-defined,no-any-return]

        return self._sum(self._prepare_inputs(inputs), "eval", run)  # type: ignore[attr-defined]

    def _held(self, piece: dict[str, Any], work: memory.Work) -> AbstractContextManager[None]:
        return memory.holding(max(piece[sharing.ROWS], 1), piece[sharing.LONGEST], work)

    def _sum(
        self, inputs: dict[str, Any], mode: str, run: Callable[[dict[str, Any], bool, float | None], Tensor]
    ) -> Tensor:
        """Return the loss of a batch from that of its pieces, and log each metric once.

        Args:
            inputs: the batch.
            mode: train or eval.
            run: gives the loss of a piece, weighed by its part in the batch; told are the piece, whether it is the last
                one, and the answer tokens of the batch over all processes (None if it is not cut).
        """
        if sharing.PIECES not in inputs:
            return run(inputs, True, None)
        counts = [self._counts(piece) for piece in inputs[sharing.PIECES]]
        found = zip(inputs[sharing.PIECES], processes.total(torch.tensor(counts)).tolist(), strict=True)
        pieces = [(piece, Counts(*numbers)) for piece, numbers in found if numbers[0]]
        whole = Counts(*(sum(numbers) for numbers in zip(*(count for _, count in pieces), strict=True)))
        kept, losses = self._metrics[mode], []
        merged: dict[str, float] = defaultdict(float)
        for i, (piece, count) in enumerate(pieces):
            self._metrics[mode] = defaultdict(list)
            piece[sharing.WEIGHT] = count.rows / whole.rows
            losses.append(run(piece, i == len(pieces) - 1, whole.chosen))
            for name, (value,) in self._metrics[mode].items():
                merged[name] += value * count.of(name) / whole.of(name)
        for name, value in merged.items():
            kept[name].append(value)
        kept["num_tokens"] = [self._total_train_tokens]
        self._metrics[mode] = kept
        return torch.stack(losses).sum()

    def _counts(self, piece: dict[str, Any]) -> Counts:
        """Return what this process has of a piece."""
        raise NotImplementedError

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            return super().evaluate(*args, **kwargs)  # type: ignore[misc,no-any-return]
        except callbacks.EvaluationStopped:
            self._metrics["eval"].clear()
            return {}

    def _run_epoch(self, **how: Any) -> None:
        # The last epoch may be cut short, and transformers would go on in it for a step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**how)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if weights.is_adapter(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        else:
            weights.restore(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore what was learned and the step; rates, decay and schedule are those of the job.

        A checkpoint brings its own. They differ only where a job is forced to go on with other settings, which
        transformers would then ignore.
        """
        wanted = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        schedule.base_lrs = [settings["initial_lr"] for settings in wanted]
        shares = [share(schedule.last_epoch) for share in schedule.lr_lambdas]
        schedule._last_lr = [rate * share for rate, share in zip(schedule.base_lrs, shares, strict=True)]
        for group, settings, rate in zip(self.optimizer.param_groups, wanted, schedule._last_lr, strict=True):
            group.update({**settings, "lr": rate})


def score_in_forward(model: Any, dtype: torch.dtype) -> None:
    """Let ``model(rows=...)`` return the scores of the answer tokens.

    What is wrapped around a model (DistributedDataParallel, FSDP) does its part in the calls of ``forward`` alone: past
    it, no gradient would be exchanged.
    """
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, rows: scoring.Rows | None = None, **kwargs: Any) -> Any:
        return plain(*args, **kwargs) if rows is None else scoring.token_scores(model, rows, dtype)

    model.forward = forward


class AnswerSFTTrainer(_ByLength, SFTTrainer):  # type: ignore[misc]
    """SFT on the chosen answers: the mean negative log-probability of their tokens; prompts are not trained on."""

    def __init__(
        self, *args: Any, dtype: torch.dtype, pad_id: int, shared_prompt: bool, parts: int = 1, **kwargs: Any
    ) -> None:
        """Take TRL's arguments, the precision of the matrix products, the padding token, the engine and the parts."""
        self.parts = parts
        stand_in = {"prompt_ids": [pad_id], "chosen_ids": [pad_id]}
        collator = sharing.Counted(_SFTCollator(pad_id, shared_prompt), stand_in)
        super().__init__(*args, data_collator=collator, **kwargs)
        self.model_accepts_loss_kwargs = True
        score_in_forward(self.model, dtype)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "chosen_ids", "length"]

    def _counts(self, piece: dict[str, Any]) -> Counts:
        return Counts(piece[sharing.ROWS], len(piece["labels"]), 0)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        mode = "train" if self.model.training else "eval"
        rows: scoring.Rows = inputs["rows"].to(self.accelerator.device)
        real = min(inputs[sharing.ROWS], 1)
        scores = model(rows=rows)
        sums = torch.stack(
            [
                scores.entropies.sum(),
                scores.correct.sum(),
                *torch.tensor([len(rows.targets), rows.tokens], device=rows.targets.device),
            ]
        )
        entropy, hits, tokens, all_tokens = processes.total(sums.double() * real).tolist()
        self._total_train_tokens += int(all_tokens) if mode == "train" else 0
        self._metrics[mode]["entropy"].append(entropy / tokens)
        self._metrics[mode]["mean_token_accuracy"].append(hits / tokens)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        # The mean over the processes, which is what is taken of gradients and losses, is then the mean over all tokens.
        loss: Tensor = -scores.logps.sum() * (real * processes.count())
        return loss / (tokens if num_items_in_batch is None else num_items_in_batch)


class _SFTCollator:
    def __init__(self, pad_id: int, shared: bool) -> None:
        self._pad_id, self._shared = pad_id, shared

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        prompts, answers = ([e[name] for e in examples] for name in ("prompt_ids", "chosen_ids"))
        laid = scoring.layout(prompts, answers, self._shared, self._pad_id)
        # The loop counts trained tokens in `shift_labels`, to weigh accumulated batches by their tokens.
        return {"rows": laid, "labels": laid.targets, "shift_labels": laid.targets}


class PreferenceTrainer(_ByLength, DPOTrainer):  # type: ignore[misc]
    """DPO whose reference is two columns of the rows: ``ref_chosen_logps`` and ``ref_rejected_logps``."""

    def __init__(
        self,
        *args: Any,
        dtype: torch.dtype,
        pad_id: int,
        shared_prompt: bool,
        eval_dataset: datasets.Dataset,
        parts: int = 1,
        **kwargs: Any,
    ) -> None:
        """Take TRL's arguments, the precision of the matrix products, the padding token, the engine and the parts."""
        self.parts = parts
        collator = _PairCollator(pad_id) if shared_prompt else DataCollatorForPreference(pad_token_id=pad_id)
        # Without a reference model TRL makes one: a second adapter, with which transformers 5.17 resumes from the wrong
        # weights without a word, or for a full model the base model's files once more. Ours are numbers in the rows.
        nothing = torch.nn.Identity()
        stand_in = {key: [pad_id] for key in PairTokens.__annotations__} | dict.fromkeys(REFERENCE, 0.0)
        counted = sharing.Counted(collator, stand_in)
        super().__init__(*args, ref_model=nothing, data_collator=counted, eval_dataset=eval_dataset, **kwargs)
        self.ref_model = None
        self.precompute_ref_logps = True
        self.use_liger_kernel = shared_prompt
        score_in_forward(self.model, dtype)

    def _prepare_dataset(self, dataset: datasets.Dataset, *_: Any) -> datasets.Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: list[str] = [*self._signature_columns, "length"]

    def _counts(self, piece: dict[str, Any]) -> Counts:
        rows = piece[sharing.ROWS]
        chosen, rejected = piece["completion_mask"][:, 1:].sum(1).chunk(2)
        return Counts(rows, int(chosen[:rows].sum()), int(rejected[:rows].sum()))

    def _get_per_token_logps_and_entropies(
        self, model: Any, model_kwargs: dict[str, Any], input_ids: Tensor, completion_mask: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        """Return per-token values [2B, L - 1] in TRL's layout, from one shared row a pair."""
        rows = model_kwargs["rows"].to(self.accelerator.device)
        scores = model(rows=rows)
        mask = completion_mask[:, 1:].bool()
        # TRL lists all chosen answers, then all rejected ones; here the two of a pair are neighbours.
        order = torch.argsort(rows.answer, stable=True)
        empty = scores.logps.new_zeros(mask.shape)
        logps = empty.masked_scatter(mask, scores.logps[order])
        entropies = empty.masked_scatter(mask, scores.entropies[order])
        chosen = rows.answer < len(input_ids) // 2
        self._log_means(scores, chosen, "train" if self.model.training else "eval")
        return logps, entropies, None

    def _log_means(self, scores: scoring.TokenScores, chosen: Tensor, mode: str) -> None:
        """Log what is a mean over the answer tokens of all processes."""
        parts = {
            "mean_token_accuracy": scores.correct[chosen],
            "logits/chosen": scores.mean_logits[chosen],
            "logits/rejected": scores.mean_logits[~chosen],
        }
        for name, values in parts.items():
            total, count = (
                self.accelerator.gather(number).sum().item()
                for number in (values.sum().float(), torch.tensor(float(len(values)), device=values.device))
            )
            self._metrics[mode][name].append(total / count)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        kept = {name: value for name, value in inputs.items() if name not in sharing.NOTES}
        shares = sharing.Shares.of(inputs[sharing.ROWS])
        with shares.gathered(self.accelerator):
            # Not `super().compute_loss`: it would take the wrapper off the model.
            loss: Tensor = self._compute_loss(model, kept, False)
        weight: float = shares.weight * inputs.get(sharing.WEIGHT, 1.0)
        return loss * weight


class _PairCollator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's batch of 2B sequences, for its masks and token counts, and beside it the B shared rows that are run."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        pairs = [PairTokens(**{key: example[key] for key in PairTokens.__annotations__}) for example in examples]  # type: ignore[typeddict-item]
        batch["rows"] = scoring.pair_rows(pairs, shared=True, pad_id=self.pad_token_id)
        return batch
