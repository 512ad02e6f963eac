"""Preparing data: rows a second, peak memory and its growth, from 10,000 to 1,000,000 pairs.

    .venv/bin/python benchmarks/data.py [ROWS ...]

Each size runs in a process of its own, as the pipeline runs it: reading, checking, comparing, splitting, saving, and
the report; without near-duplicates, and without a tokenizer, whose share depends on the model. The data is made up
on the spot: JSON Lines, 1.5 KB a pair, one row in 200 with a problem.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SIZES = (10_000, 100_000, 300_000, 1_000_000)
WORDS = 200_000


def write_rows(path: Path, count: int) -> None:
    """Write ``count`` pairs of random words; every 200th row repeats the one before, every 1,000th is blank."""
    rng = random.Random(count)
    letters = "abcdefghijklmnopqrstuvwxyz"
    text = " ".join("".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(WORDS))
    span = len(text) - 1000

    def piece(length: int) -> str:
        start = rng.randrange(span)
        return text[start : start + length].strip()

    last = {}
    with path.open("w", encoding="utf-8") as stream:
        for i in range(count):
            if i % 1000 == 999:
                row = {"prompt": f"{i} {piece(300)}", "chosen": " ", "rejected": piece(300)}
            elif i % 200 == 199:
                row = last
            else:
                row = {
                    "prompt": f"{i} {piece(rng.randint(150, 450))}",
                    "chosen": piece(rng.randint(300, 900)),
                    "rejected": piece(rng.randint(300, 900)),
                }
            last = row
            stream.write(json.dumps(row) + "\n")


def measure(path: Path, folder: Path) -> None:
    """Prepare the data in this process and print what it took."""
    sys.path.insert(0, str(ROOT))
    from preference_tuning.config import DataConfig
    from preference_tuning.data import job, prepare

    config = DataConfig(source=str(path), near_duplicates=False)
    start = time.perf_counter()
    dataset = prepare.prepare(config, job.fingerprints_of(config), folder / "dataset")
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "dropped": dataset.manifest.dropped}))


def main(sizes: tuple[int, ...]) -> None:
    """Measure every size and print the table."""
    print("| pairs | JSONL | seconds | rows/s | peak RSS | left out |\n|---|---|---|---|---|---|")
    found = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = folder / "rows.jsonl"
            write_rows(path, size)
            command = [sys.executable, __file__, "--measure", str(path), str(folder)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            result = json.loads(done.stdout.splitlines()[-1])
            found.append((size, result))
            print(
                f"| {size:,} | {path.stat().st_size / 1e6:,.0f} MB | {result['seconds']:.1f} | "
                f"{size / result['seconds']:,.0f} | {result['peak']:,.0f} MB | {result['dropped']:,} |",
                flush=True,
            )
    # What grows with the rows shows between the largest sizes; below, buffers still fill up.
    (small, first), (large, last) = found[-2:] if len(found) > 1 else found * 2
    growth = (last["peak"] - first["peak"]) * 1024 * 1024 / max(1, large - small)
    print(
        f"result: rows={large} rows_per_s={large / last['seconds']:.0f} peak_rss_mb={last['peak']:.0f} "
        f"growth_bytes_per_row={growth:.1f}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(tuple(map(int, sys.argv[1:])) or SIZES)
