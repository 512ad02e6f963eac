"""A DPO step with the shared prompt against stock TRL's: forward and backward, one process, interleaved, same batches.

    .venv/bin/python benchmarks/dpo.py [BATCHES]

Both sides run the quickstart's model, adapter and pairs under the same autocast (asserted), with stored reference
log-probabilities, eager attention and no checkpointing: stock TRL as well configured as it can be.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import torch  # noqa: E402

from preference_tuning import config  # noqa: E402
from preference_tuning.data import job as data_job  # noqa: E402
from preference_tuning.data import prepare  # noqa: E402
from preference_tuning.models import chat, compute, loading, rows  # noqa: E402
from preference_tuning.models.source import locate  # noqa: E402
from preference_tuning.training import arguments, trainers  # noqa: E402


def build(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the loaded base and both trainers on one model."""
    run = config.load(ROOT / "configs" / "quickstart.yaml").config
    data = run.data.model_copy(update={"source": str(ROOT / run.data.source)})
    dataset = prepare.prepare(data, data_job.fingerprints_of(data), folder / "data")
    chosen = compute.choose(run.base_model, ROOT / "outputs")
    base = loading.load_base(run.base_model, locate(run.base_model), ROOT / "outputs", chosen)
    room = chat.Room(run.dpo.length(run.base_model))
    tokens = rows.tokenise(dataset.path("train"), base.tokenizer, room, folder, answers=2).rows
    nothing = [0.0] * len(tokens)
    tokens = tokens.add_column("ref_chosen_logps", nothing).add_column("ref_rejected_logps", nothing)
    model = loading.new_policy(base, run.lora, seed=0)
    both = {
        name: trainers.PreferenceTrainer(
            model=model,
            args=arguments.dpo(run.dpo, base, folder / name),
            train_dataset=tokens,
            eval_dataset=tokens,
            processing_class=base.tokenizer,
            dtype=base.dtype,
            pad_id=base.tokenizer.pad_token_id,
            shared_prompt=name == "shared prompt",
        )
        for name in ("shared prompt", "stock TRL")
    }
    return base, both


def step(trainer: Any, batch: dict[str, Any], dtype: torch.dtype) -> tuple[float, float]:
    """Return the seconds of a forward and backward pass, and the loss."""
    seen = []
    layer = next(m for n, m in trainer.model.named_modules() if n.endswith("layers.0.mlp.down_proj"))
    hook = layer.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    trainer.model.train()
    start = time.perf_counter()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    seconds = time.perf_counter() - start
    hook.remove()
    trainer.model.zero_grad()
    assert set(seen) == {dtype}, f"the matrix products ran in {set(seen)}, not in {dtype}"
    return seconds, loss.item()


def main() -> None:
    """Measure and print."""
    datasets.disable_progress_bars()
    batches = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    with tempfile.TemporaryDirectory() as folder:
        base, both = build(Path(folder))
        sampler = iter(both["stock TRL"]._get_train_sampler())
        size = both["stock TRL"].args.train_batch_size
        print(f"{torch.get_num_threads()} threads, {base.dtype}, {size} pairs a batch")
        print(
            f"{'batch':>6}{'tokens':>8}" + "".join(f"{name:>16}" for name in both) + f"{'ratio':>8}{'loss apart':>12}"
        )
        ratios = []
        for number in range(batches + 1):
            examples = [both["stock TRL"].train_dataset[next(sampler)] for _ in range(size)]
            timed = {name: step(t, t.data_collator(examples), base.dtype) for name, t in both.items()}
            (ours, our_loss), (stock, stock_loss) = timed.values()
            if number == 0:
                continue  # warm-up
            ratios.append(stock / ours)
            tokens = sum(len(e["prompt_ids"]) + len(e["chosen_ids"]) + len(e["rejected_ids"]) for e in examples)
            apart = abs(our_loss - stock_loss) / abs(stock_loss)
            print(f"{number:>6}{tokens:>8}{ours:>15.2f}s{stock:>15.2f}s{stock / ours:>8.2f}{apart:>12.1e}")
    print(f"result: ratio_median={statistics.median(ratios):.2f} ratio_min={min(ratios):.2f} batches={len(ratios)}")


if __name__ == "__main__":
    main()
