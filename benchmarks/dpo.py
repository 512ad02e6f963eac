"""The whole DPO phase against stock TRL: reference pass and one epoch, interleaved in one process.

    .venv/bin/python benchmarks/dpo.py [DATA] [PAIRS]          the phase, and what each part of the engine brings
    .venv/bin/python benchmarks/dpo.py DATA PAIRS defaults     against TRL's defaults alone
    .venv/bin/python benchmarks/dpo.py shapes                  how the ratio moves with the shape of the pairs

Stock TRL is as well configured as it can be: reference log-probabilities computed once, no checkpointing, the precision
that is fastest on this machine, the faster of its attentions. It runs in the order that TRL gives, and once more on our
batches of similar length (which TRL's DPO trainer cannot be told to make), where the losses can be compared.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from sides import LONGEST, ROOT, STEP, Phase, Setting, our_dpo, stock_dpo, without
from torch import Tensor
from trl import DPOConfig

from preference_tuning.models import scoring
from preference_tuning.training import trainers

REPETITIONS = 3
DEFAULT_PAIRS = 16
"""Of the comparison with TRL's defaults, which are slow."""


def main() -> None:
    """Measure and print."""
    what = sys.argv[1:]
    if what[:1] == ["shapes"]:
        return shapes()
    data = Path(what[0]) if what else ROOT / "data" / "direct_answers.jsonl"
    count = int(what[1]) if len(what) > 1 else 64
    with tempfile.TemporaryDirectory() as folder:
        if what[2:3] == ["peak"]:
            return peak(Setting.load(Path(folder), data, count), what[3])
        if what[2:3] == ["defaults"]:
            ratio = against_defaults(Setting.load(Path(folder), data, count))
            return print(f"result: ratio_defaults={ratio:.2f}")
        peaks = {side: peak_of(data, count, side) for side in ("ours", "stock")}
        setting = Setting.load(Path(folder), data, count)
        tell_tokens(setting)
        eager = faster_attention(setting)
        result = phases(setting, eager)
        causes(setting, eager)
        defaults = against_defaults(Setting.load(Path(folder) / "few", data, DEFAULT_PAIRS))
    print("peak memory: " + ", ".join(f"{side} {mb:,.0f} MB" for side, mb in peaks.items()))
    print(
        f"result: {result} ratio_defaults={defaults:.2f} peak_ours_mb={peaks['ours']:.0f} "
        f"peak_stock_mb={peaks['stock']:.0f}"
    )
    return None


def against_defaults(setting: Setting) -> float:
    """Return the ratio to TRL's defaults: bfloat16 autocast, checkpointing, the reference with every step."""
    ours = our_dpo(setting)
    defaults = stock_dpo(setting, False, precompute_ref_log_probs=False, gradient_checkpointing=True, bf16=True)
    print(f"\nTRL's defaults, {len(setting.pairs)} pairs: {defaults.seconds:.1f} s, ours {ours.seconds:.1f} s")
    return defaults.seconds / ours.seconds


def tell_tokens(setting: Setting) -> None:
    """Print how many tokens each way of laying out the epoch runs through the model."""
    counts = dict.fromkeys(("as TRL pads them", "without padding", "prompt once a pair", "token tree", "answers"), 0)
    order = list(trainers.LengthBatches(list(setting.pairs["length"]), STEP["per_device_train_batch_size"], 42))
    for start in range(0, len(order), 8):
        batch = [setting.pairs[i] for i in order[start : start + 8]]
        plain, tree = (scoring.pair_rows(batch, shared, 0) for shared in (False, True))  # type: ignore[arg-type]
        counts["as TRL pads them"] += plain.input_ids.numel()
        counts["without padding"] += plain.tokens
        counts["prompt once a pair"] += plain.tokens - sum(len(pair["prompt_ids"]) for pair in batch)
        counts["token tree"] += tree.input_ids.numel()
        counts["answers"] += len(tree.targets)
    print("\ntokens of an epoch: " + ", ".join(f"{name} {number:,}" for name, number in counts.items()))


def faster_attention(setting: Setting) -> bool:
    """Return whether stock TRL is faster with eager attention than with SDPA."""
    batch = [setting.pairs[i] for i in range(8)]
    seconds = {
        kind: min(_step(stock_step(setting, kind == "eager"), batch)[0] for _ in range(3)) for kind in ("sdpa", "eager")
    }
    print("stock TRL's forward and backward, " + ", ".join(f"{kind} {s:.2f} s" for kind, s in seconds.items()))
    return seconds["eager"] < seconds["sdpa"]


def phases(setting: Setting, eager: bool) -> str:
    """Run the phases in turn, print them with their losses, and return the ratios."""
    sides: dict[str, Any] = {
        "ours": lambda: our_dpo(setting),
        "stock TRL": lambda: with_attention(setting, eager, lambda: stock_dpo(setting, same_batches=False)),
        "stock TRL, our batches": lambda: with_attention(setting, eager, lambda: stock_dpo(setting, same_batches=True)),
    }
    runs: dict[str, list[Phase]] = {name: [] for name in sides}
    for _ in range(REPETITIONS):
        for name, run in sides.items():
            runs[name].append(run())
    ratios = {
        name: [other.seconds / ours.seconds for other, ours in zip(runs[name], runs["ours"], strict=True)]
        for name in sides
    }
    print(f"\n{'':24}{'reference':>10}{'train()':>10}{'phase':>10}{'ratio':>8}   seconds, medians of {REPETITIONS}")
    for name, done in runs.items():
        reference, training, whole = (
            statistics.median(getattr(phase, part) for phase in done) for part in ("reference", "training", "seconds")
        )
        ratio = statistics.median(ratios[name])
        print(f"{name:24}{reference:>10.1f}{training:>10.1f}{whole:>10.1f}{ratio:>8.2f}")
    print("\nlosses by step, on the same batches:")
    for name in ("ours", "stock TRL, our batches"):
        print(f"{name:24}" + " ".join(f"{loss:.6f}" for loss in runs[name][0].losses))
    return (
        f"ratio={statistics.median(ratios['stock TRL']):.2f} "
        f"ratio_same_batches={statistics.median(ratios['stock TRL, our batches']):.2f}"
    )


def with_attention(setting: Setting, eager: bool, run: Any) -> Any:
    """Run stock TRL with the attention that is faster for it."""
    plain = setting.reset

    def reset(ours: bool) -> Any:
        policy = plain(ours)
        policy.get_base_model().config._attn_implementation = "eager" if eager else "sdpa"
        return policy

    setting.reset = reset  # type: ignore[method-assign]
    try:
        return run()
    finally:
        del setting.reset


# --- one step at a time -----------------------------------------------------------------------------------------------


def stock_step(setting: Setting, eager: bool) -> Any:
    """Return a trainer whose forward is stock TRL's, on the rows that ours takes."""
    return with_attention(setting, eager, lambda: _trainer(setting, shared=False, ours=False))


def _trainer(setting: Setting, shared: bool, ours: bool = True) -> Any:
    base, policy = setting.base, setting.reset(ours)
    count = len(setting.pairs)
    tokens = setting.pairs.add_column("ref_chosen_logps", [-20.0] * count)
    tokens = tokens.add_column("ref_rejected_logps", [-20.0] * count)
    args = DPOConfig(
        output_dir=str(setting.folder / "step"), use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.5,
        report_to="none", max_length=None,
    )  # fmt: skip
    return trainers.PreferenceTrainer(
        model=policy, args=args, train_dataset=tokens, eval_dataset=tokens, processing_class=base.tokenizer,
        dtype=base.dtype, pad_id=base.tokenizer.pad_token_id, shared_prompt=shared,
    )  # fmt: skip


class _PlainRows:
    """Our collator, with each answer in a padded row of its own."""

    def __init__(self, collate: Any, pad_id: int) -> None:
        self._collate, self._pad_id = collate, pad_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._collate(examples)
        return {**batch, "rows": scoring.pair_rows(examples, False, self._pad_id)}  # type: ignore[arg-type]


def _step(trainer: Any, pairs: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the seconds of a forward and backward pass, and the loss."""
    examples = [{**pair, "ref_chosen_logps": -20.0, "ref_rejected_logps": -20.0} for pair in pairs]
    batch = trainer.data_collator(examples)
    dtype = next(p.dtype for n, p in trainer.model.named_parameters() if "base_layer" in n)
    trainer.model.train()
    start = time.perf_counter()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss: Tensor = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    seconds = time.perf_counter() - start
    trainer.model.zero_grad()
    return seconds, loss.item()


def causes(setting: Setting, eager: bool) -> None:
    """Print what each part of the engine brings to a step, one after the other."""
    order = list(trainers.LengthBatches(list(setting.pairs["length"]), 8, 42))
    batches = [[setting.pairs[i] for i in order[start : start + 8]] for start in range(0, min(len(order), 48), 8)]
    names = (
        "stock TRL", "+ head on answer tokens only", "+ token tree", "+ short attention spelled out", "+ fused LoRA",
    )  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for batch in batches:
        for number, name in enumerate(names):
            with ExitStack() as off:
                if number < 4:
                    off.enter_context(without("fused"))
                if number < 3:
                    off.enter_context(without("short"))
                trainer = stock_step(setting, eager) if number == 0 else _trainer(setting, shared=True)
                if number == 1:
                    trainer.data_collator = _PlainRows(trainer.data_collator, setting.base.tokenizer.pad_token_id)
                seconds[name].append(min(_step(trainer, batch)[0] for _ in range(2)))
    print(f"\n{'forward and backward of':32}{len(batches):>3} batches of 8 pairs{'seconds':>10}{'ratio':>8}")
    first = sum(seconds[names[0]])
    for name in names:
        print(f"{name:32}{'':22}{sum(seconds[name]):>10.2f}{first / sum(seconds[name]):>8.2f}")
    print(roofline(setting, batches, sum(seconds[names[-1]])))


def roofline(setting: Setting, batches: list[list[dict[str, Any]]], seconds: float) -> str:
    """Return the share of a plain matrix product's speed that forward and backward reach."""
    model = setting.base.model.get_base_model()
    layers = [m for m in model.base_model.modules() if hasattr(m, "lora_A")]
    frozen = sum(layer.base_layer.weight.numel() for layer in layers)
    trained = sum(p.numel() for p in setting.start.values())
    head = model.get_output_embeddings().weight.numel()
    flops = 0.0
    for batch in batches:
        rows = scoring.pair_rows(batch, True, 0)  # type: ignore[arg-type]
        nodes, answers = rows.input_ids.numel(), len(rows.targets)
        # A frozen product has no gradient of its own: twice the forward. Attention's own products are left out.
        flops += nodes * (2 * 2 * frozen + 3 * 2 * trained) + answers * 2 * 2 * head
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(2048, 2048, dtype=dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        found[dtype] = 2 * 2048**3 / min(times)
    reached = flops / seconds
    return (
        f"\nroofline: {reached / 1e12:.3f} TFLOP/s of products, {reached / found[setting.base.dtype]:.0%} of a plain "
        f"{setting.base.dtype} product ({found[torch.float32] / 1e12:.3f} in float32, "
        f"{found[torch.bfloat16] / 1e12:.3f} in bfloat16)"
    )


# --- shapes -----------------------------------------------------------------------------------------------------------

SHAPES = {
    "short": (32, 16), "middle": (128, 64), "long": (512, 256),
    "prompt-heavy": (256, 64), "answer-heavy": (64, 256), "no prompt to share": (4, 128),
}  # fmt: skip
AT_ONCE = 1600
"""Tokens of stock TRL's batch, at most: it keeps the logits of all of them."""


def shapes() -> None:
    """Print the ratio of a step on made-up pairs that share no system turn: tokens of the prompt, of each answer."""
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting.load(Path(folder), ROOT / "data" / "direct_answers.jsonl", 16)
        eager = faster_attention(setting)
        print(f"\n{'pairs':20}{'prompt':>8}{'answer':>8}{'ours':>9}{'stock':>9}{'ratio':>8}{'losses apart':>14}")
        ratios = {}
        for name, (prompt, answer) in SHAPES.items():
            torch.manual_seed(0)
            pairs = [
                {
                    "prompt_ids": torch.randint(3, 49_000, (prompt,)).tolist(),
                    "chosen_ids": torch.randint(3, 49_000, (answer - i % 4,)).tolist(),
                    "rejected_ids": torch.randint(3, 49_000, (answer - i % 3,)).tolist(),
                }
                for i in range(max(1, min(4, AT_ONCE // (2 * (prompt + answer)))))
            ]
            times: dict[str, list[float]] = {"ours": [], "stock": []}
            losses = {}
            for _ in range(REPETITIONS):
                for side in times:
                    # Eager attention keeps the square of a length for every layer.
                    short = eager and prompt + answer < 256
                    trainer = _trainer(setting, shared=True) if side == "ours" else stock_step(setting, short)
                    seconds, losses[side] = _step(trainer, pairs)
                    times[side].append(seconds)
            ours, stock = (statistics.median(times[side]) for side in times)
            ratios[name] = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
            apart = abs(losses["ours"] / losses["stock"] - 1)
            print(f"{name:20}{prompt:>8}{answer:>8}{ours:>8.2f}s{stock:>8.2f}s{ratios[name]:>8.2f}{apart:>14.1e}")
    print("result: " + " ".join(f"{name.replace(' ', '_').replace('-', '_')}={r:.2f}" for name, r in ratios.items()))


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_of(data: Path, count: int, side: str) -> float:
    """Return the peak memory in MB of a process of its own that runs the longest batches of a side."""
    done = subprocess.run(
        [sys.executable, __file__, str(data), str(count), "peak", side], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def peak(setting: Setting, side: str) -> None:
    """Run the longest batch of a side and print the peak memory of this process in MB."""
    longest = sorted(range(len(setting.pairs)), key=setting.pairs["length"].__getitem__)[-8:]
    trainer = _trainer(setting, shared=True) if side == "ours" else stock_step(setting, eager=False)
    for _ in range(2):
        _step(trainer, [setting.pairs[i] for i in longest])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    assert LONGEST
    main()
