"""TRL's SFT and DPO trainers with our forward pass: arguments, loop, losses, metric names and checkpoints are TRL's.

What is replaced: batches of similar length, one row a pair, and a head that sees answer tokens only. Written against
trl 1.14.2: ``DPOTrainer`` has a branch that takes per-token log-probabilities instead of logits (made for the Liger
kernel), and that branch calls the method overridden here, so that every loss type works on our forward as it stands.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Sampler
from trl import DPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from preference_tuning.config import StageConfig
from preference_tuning.models import scoring, weights
from preference_tuning.models.chat import PairTokens

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
    """Return the rows that ``steps`` optimizer steps of one process reach, without repetition."""
    sampler = LengthBatches(list(rows["length"]), config.per_device_train_batch_size, config.seed)
    wanted = steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
    return list(itertools.islice(sampler, wanted)) if wanted < len(rows) else list(range(len(rows)))


class _ByLength:
    """For a trainer whose rows have a ``length`` column."""

    args: Any
    train_dataset: Any
    _metrics: Any
    model: Any
    accelerator: Any
    _total_train_tokens: int

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> LengthBatches:
        rows = self.train_dataset if train_dataset is None else train_dataset
        return LengthBatches(list(rows["length"]), self.args.train_batch_size, self.args.seed)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if weights.is_adapter(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        else:
            weights.restore(self.model, Path(resume_from_checkpoint))

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        prepared = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        with torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
            return self.compute_loss(model, prepared).detach(), None, None  # type: ignore[attr-defined]


class AnswerSFTTrainer(_ByLength, SFTTrainer):  # type: ignore[misc]
    """SFT on the chosen answers: the mean negative log-probability of their tokens; prompts are not trained on."""

    def __init__(self, *args: Any, dtype: torch.dtype, pad_id: int, shared_prompt: bool, **kwargs: Any) -> None:
        """Take TRL's arguments, the precision of the matrix products, the padding token and the engine."""
        super().__init__(*args, data_collator=_SFTCollator(pad_id, shared_prompt), **kwargs)
        _score_in_forward(self.model, dtype)
        self.model_accepts_loss_kwargs = True

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "chosen_ids", "length"]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        mode = "train" if self.model.training else "eval"
        rows = inputs["rows"].to(self.accelerator.device)
        scores = model(rows=rows)
        tokens = len(rows.targets)
        loss: Tensor = -scores.logps.sum() / (tokens if num_items_in_batch is None else num_items_in_batch)
        if mode == "train":
            self._total_train_tokens += rows.tokens
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        self._metrics[mode]["entropy"].append(scores.entropies.mean().item())
        self._metrics[mode]["mean_token_accuracy"].append(scores.correct.float().mean().item())
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return loss


def _score_in_forward(model: Any, dtype: torch.dtype) -> None:
    """Let ``model(rows=...)`` return the scores of answer tokens.

    The forward of a wrapper (several processes, compilation) must be what runs, or it could not do its part.
    """
    plain = model.forward

    def forward(*args: Any, rows: scoring.Rows | None = None, **kwargs: Any) -> Any:
        return plain(*args, **kwargs) if rows is None else scoring.token_scores(model, rows, dtype)

    model.forward = forward


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
        **kwargs: Any,
    ) -> None:
        """Take TRL's arguments, the precision of the matrix products, the padding token and the engine."""
        collator = _PairCollator(pad_id) if shared_prompt else DataCollatorForPreference(pad_token_id=pad_id)
        # Without a reference model TRL makes one: a second adapter, with which transformers 5.17 resumes from the wrong
        # weights without a word, or for a full model the base model's files once more. Ours are numbers in the rows.
        stand_in = torch.nn.Identity()
        super().__init__(*args, ref_model=stand_in, data_collator=collator, eval_dataset=eval_dataset, **kwargs)
        self.ref_model = None
        self.precompute_ref_logps = True
        self.use_liger_kernel = shared_prompt
        if shared_prompt:
            _score_in_forward(self.model, dtype)

    def _prepare_dataset(self, dataset: datasets.Dataset, *_: Any) -> datasets.Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: list[str] = [*self._signature_columns, "length"]

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
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["mean_token_accuracy"].append(scores.correct[chosen].float().mean().item())
        self._metrics[mode]["logits/chosen"].append(scores.mean_logits[chosen].mean().item())
        self._metrics[mode]["logits/rejected"].append(scores.mean_logits[~chosen].mean().item())
        return logps, entropies, None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        loss: Tensor = super().compute_loss(model, inputs, False, num_items_in_batch)
        return loss


class _PairCollator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's batch of 2B sequences, for its masks and token counts, and beside it the B shared rows that are run."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        pairs = [PairTokens(**{key: example[key] for key in PairTokens.__annotations__}) for example in examples]  # type: ignore[typeddict-item]
        batch["rows"] = scoring.pair_rows(pairs, shared=True, pad_id=self.pad_token_id)
        return batch
