"""Scoring held-out pairs under base, SFT and DPO, against plain forwards over prompt plus answer with full logits.

    .venv/bin/python benchmarks/evaluation.py [DATA] [PAIRS] [REPETITIONS]

Both sides in one process on the same model, adapters and pairs, in turn. The plain side is given one set of weights for
all three states too (peft's own switch), and answers of similar length in batches; one answer at a time is measured on
a part of the pairs. Ours also computes what the plain side does not: the divergence of each state from the one before.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sides import ROOT, Setting

STATES = ("base", "sft", "dpo")
BATCH = 8


def main() -> None:
    """Measure and print."""
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "data" / "direct_answers.jsonl"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    repetitions = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting.load(Path(folder), data, count)
        policy = setting.reset(ours=False)
        _second_adapter(policy)
        seconds: dict[str, list[float]] = {"ours": [], "plain, batches of 8": []}
        found: dict[str, Any] = {}
        for _ in range(repetitions):
            for name, score in {"ours": _ours, "plain, batches of 8": _plain}.items():
                start = time.perf_counter()
                found[name] = score(setting, policy, setting.pairs)
                seconds[name].append(time.perf_counter() - start)
        few = setting.pairs.select(range(min(len(setting.pairs), 20)))
        start = time.perf_counter()
        _plain(setting, policy, few, batch=1)
        single = (time.perf_counter() - start) / len(few) * len(setting.pairs)
    error = max((found["ours"][s] - found["plain, batches of 8"][s]).abs().max().item() for s in STATES)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["plain, batches of 8"], strict=True)]
    ours = statistics.median(seconds["ours"])
    print(f"\n{'':32}{'seconds':>10}{'ratio':>8}   medians of {repetitions}")
    print(f"{'ours, with divergences':32}{ours:>10.1f}{1:>8.2f}")
    print(f"{'plain, batches of 8':32}{statistics.median(seconds['plain, batches of 8']):>10.1f}", end="")
    print(f"{statistics.median(ratios):>8.2f}")
    print(f"{'plain, one answer at a time':32}{single:>10.1f}{single / ours:>8.2f}   from {len(few)} pairs")
    print(f"largest difference of a summed log-probability: {error:.2g} nats")
    print(f"result: ratio={statistics.median(ratios):.2f} ratio_single={single / ours:.2f} error={error:.2g}")


def _second_adapter(policy: Any) -> None:
    """Give the policy another adapter of the same shape and other values, as DPO leaves beside SFT."""
    import torch

    policy.add_adapter("dpo", policy.peft_config["default"])
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".dpo." in name:
                parameter.normal_(std=0.01)
    policy.eval()


def _ours(setting: Setting, policy: Any, pairs: Any) -> dict[str, Any]:
    import torch

    from preference_tuning.models import comparing, fused, scoring

    fused.fuse(policy)
    family = _Family(setting, policy)
    comparison = comparing.Comparison(family, {"sft": "base", "dpo": "sft"}, pairs, BATCH, shared=True)  # type: ignore[arg-type]
    sums = {name: torch.zeros(len(pairs), 2) for name in STATES}
    for batch in comparison.run(STATES):
        for name, logps in batch.logps.items():
            rows = SimpleNamespace(answers=2 * len(batch.numbers), answer=batch.answer)
            sums[name][batch.numbers] = scoring.answer_logps(logps, rows).view(2, -1).T  # type: ignore[arg-type]
    for layer in policy.modules():
        vars(layer).pop("forward", None)
    return sums


class _Family:
    """What a comparison asks of ``models.family.Family``, around a model that is loaded already."""

    shares = True

    def __init__(self, setting: Setting, policy: Any) -> None:
        self.base, self._policy = setting.base, policy

    def member(self, name: str | None) -> Any:
        return _state(self._policy, name or "base")


@contextmanager
def _state(policy: Any, name: str) -> Iterator[Any]:
    """Give the policy as one of the states."""
    if name == "base":
        with policy.disable_adapter():
            yield policy
    else:
        policy.set_adapter("default" if name == "sft" else name)
        yield policy


def _plain(setting: Setting, policy: Any, pairs: Any, batch: int = BATCH) -> dict[str, Any]:
    """Return the summed log-probabilities [pairs, 2] of each state, from full logits of padded batches of answers."""
    import torch

    setting.base.model.get_base_model().config._attn_implementation = "sdpa"
    answers = [(i, side) for i in range(len(pairs)) for side in range(2)]
    rows = list(pairs)
    sequences = {(i, s): rows[i]["prompt_ids"] + rows[i][("chosen_ids", "rejected_ids")[s]] for i, s in answers}
    answers.sort(key=lambda at: len(sequences[at]))
    sums = {name: torch.zeros(len(pairs), 2) for name in STATES}
    for name in STATES:
        with _state(policy, name) as model, torch.inference_mode():
            for start in range(0, len(answers), batch):
                part = answers[start : start + batch]
                width = max(len(sequences[at]) for at in part)
                ids = torch.zeros(len(part), width, dtype=torch.long)
                mask = torch.zeros(len(part), width, dtype=torch.long)
                for row, at in enumerate(part):
                    ids[row, : len(sequences[at])] = torch.tensor(sequences[at])
                    mask[row, : len(sequences[at])] = 1
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
                taken = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
                for row, (i, side) in enumerate(part):
                    begin = len(rows[i]["prompt_ids"]) - 1
                    sums[name][i, side] = taken[row, begin : len(sequences[i, side]) - 1].sum()
    return sums


if __name__ == "__main__":
    main()
