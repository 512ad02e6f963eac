"""The DPO reference: the SFT policy's own log-probabilities, taken before the first update, and the proof of it."""

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from preference_tuning.errors import DivergedError
from preference_tuning.models import scoring
from preference_tuning.progress import bar
from preference_tuning.training import memory, processes, sharing

CHECKED_BATCHES = 1


def add_reference(
    rows: datasets.Dataset,
    path: Path,
    key: str,
    model: Any,
    title: str,
    batch_size: int,
    only: Sequence[int] | None = None,
    **how: Any,
) -> datasets.Dataset:
    """Return the rows with the columns ``ref_chosen_logps`` and ``ref_rejected_logps`` of the model as it is now.

    Several processes compute a share each. The values are kept in ``path`` under ``key``, so a resumed job reads what
    the untrained policy gave. Rows outside ``only`` (training of less than an epoch never reaches them) get NaN, which
    would stop training if it did.
    """
    values = _read(path, key)
    if values is None:
        model.eval()
        wanted = sorted(range(len(rows)) if only is None else only)
        values = torch.full((len(rows), 2), math.nan)
        values[wanted] = 0
        share = wanted[processes.rank() :: processes.count()]
        with bar(title, len(share)) as progress:
            scored = scoring.pair_logps(model, rows.select(share), batch_size=batch_size, holding=_held, **how)
            for numbers, logps in scored:
                values[[share[i] for i in numbers]] = logps
                progress.update(len(numbers))
        values = processes.total(values)
        if processes.rank() == 0:
            _write(path, key, values)
    rows = rows.add_column("ref_chosen_logps", values[:, 0].tolist())
    return rows.add_column("ref_rejected_logps", values[:, 1].tolist())


def _read(path: Path, key: str) -> torch.Tensor | None:
    """Return the log-probabilities [rows, 2] of chosen and rejected, or None where there are none under this key."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as kept:
        values: torch.Tensor = kept.get_tensor("logps")
        return values if (kept.metadata() or {}).get("key") == key else None


def _write(path: Path, key: str, logps: torch.Tensor) -> None:
    """Write log-probabilities aside and put them in place in one step."""
    aside = path.with_name(f".{path.name}")
    save_file({"logps": logps}, aside, metadata={"key": key})
    aside.replace(path)


def _held(pairs: Sequence[Any]) -> AbstractContextManager[None]:
    return memory.holding(len(pairs), max(map(sharing.longest, pairs)), "reference")


def measure(trainer: Any, **how: Any) -> tuple[float, float, int]:
    """Return ``(loss, largest difference in nats, pairs)`` of the untrained policy on the first training batches.

    The loss is the trainer's own; the difference is between a pair's log-probability now and its reference column.
    """
    rows, size = trainer.train_dataset, trainer.args.train_batch_size
    first = list(itertools.islice(trainer._get_train_sampler(), size * CHECKED_BATCHES))
    trainer.model.eval()
    losses, largest = [], 0.0
    for start in range(0, len(first), size):
        examples = [rows[i] for i in first[start : start + size]]
        losses.append(trainer.loss_of(trainer.model, trainer.collator(size)(examples)).item())
        at_once = scoring.rows_at_once(size, trainer.parts)
        for numbers, logps in scoring.pair_logps(trainer.model, examples, batch_size=at_once, **how):
            kept = [[examples[i]["ref_chosen_logps"], examples[i]["ref_rejected_logps"]] for i in numbers]
            largest = max(largest, (logps - torch.tensor(kept)).abs().max().item())
    trainer._metrics["eval"].clear()
    trainer.model.train()
    return sum(losses) / len(losses), largest, len(first)


def check(
    loss: float,
    difference: float,
    beta: float,
    loss_types: Sequence[str],
    tolerance: float,
    weights: Sequence[float] | None = None,
) -> float | None:
    """Return the loss expected of an untrained policy, ln 2 times its weight, or None for losses without that value.

    Raises:
        DivergedError: the policy differs from its reference before the first update.
    """
    (weight, *_) = weights or (1.0,)
    expected = weight * math.log(2) if tuple(loss_types) == ("sigmoid",) else None
    off = expected is not None and not abs(loss - expected) <= abs(weight) * beta * tolerance
    if off or not difference <= tolerance:
        raise DivergedError(
            f"the DPO reference is not the SFT policy: before the first update the loss is {loss:.6f}"
            + (f" instead of {expected:.6f}" if expected is not None else "")
            + f" and log-probabilities differ by up to {difference:.4g} nats (allowed: {tolerance:.4g}). "
            "The weights, the data or the chat template changed between SFT and DPO; start the run anew"
        )
    return expected
