"""SFT on the chosen answers against stock TRL: one epoch inside train(), interleaved in one process.

    .venv/bin/python benchmarks/sft.py [DATA] [ROWS]

Stock TRL is as well configured as it can be: loss on the answers alone with the head on their tokens alone (its
default, ``chunked_nll``), batches by length, no checkpointing, the precision that is fastest on this machine. It runs
with its own batches by length, and on ours, where the losses can be compared.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from sides import ROOT, Phase, Setting, our_sft, stock_sft

REPETITIONS = 2


def main() -> None:
    """Measure and print."""
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "data" / "direct_answers.jsonl"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 96
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting.load(Path(folder), data, count, answers=1)
        sides = {
            "ours": lambda: our_sft(setting),
            "stock TRL": lambda: stock_sft(setting, False, train_sampling_strategy="group_by_length"),
            "stock TRL, our batches": lambda: stock_sft(setting, True),
        }
        runs: dict[str, list[Phase]] = {name: [] for name in sides}
        for _ in range(REPETITIONS):
            for name, run in sides.items():
                runs[name].append(run())
    print(f"\n{'':24}{'train()':>10}{'ratio':>8}   seconds, medians of {REPETITIONS}")
    ratios = {}
    for name, done in runs.items():
        ratios[name] = statistics.median(a.seconds / b.seconds for a, b in zip(done, runs["ours"], strict=True))
        print(f"{name:24}{statistics.median(phase.seconds for phase in done):>10.1f}{ratios[name]:>8.2f}")
    print("\nlosses by step, on the same batches:")
    for name in ("ours", "stock TRL, our batches"):
        print(f"{name:24}" + " ".join(f"{loss:.5f}" for loss in runs[name][0].losses))
    print(f"result: ratio={ratios['stock TRL']:.2f} ratio_same_batches={ratios['stock TRL, our batches']:.2f}")


if __name__ == "__main__":
    main()
