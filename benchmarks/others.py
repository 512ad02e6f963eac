"""DPO in another tool against ours: same model, pairs, settings, optimizer steps and threads, one after the other.

    .venv/bin/python benchmarks/others.py TOOL --python /path/to/its/environment/bin/python [--steps N] [--data FILE]

The tool runs from an environment of its own (README.md says how to make it) on a config that is written here, and its
seconds, losses and log-probabilities are what it logs itself. Both sides start from the base model with an adapter
that changes nothing yet, so both first losses are ln 2. Every pair is visited once, so the mean log-probability of a
chosen answer tells whether both sides ran the same model on the same rows.
"""

import argparse
import contextlib
import importlib.metadata
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import torch  # noqa: E402
from other_tools import LORA, MAX_LENGTH, TOOLS, Measured, Task  # noqa: E402

from preference_tuning import config  # noqa: E402
from preference_tuning.config import BaseModelConfig, DPOConfig  # noqa: E402
from preference_tuning.data import job as data_job  # noqa: E402
from preference_tuning.data import prepare  # noqa: E402
from preference_tuning.data.table import MANIFEST, SCHEMA, Dataset, Writer  # noqa: E402
from preference_tuning.models import compute, loading, rows, weights  # noqa: E402
from preference_tuning.models.source import locate  # noqa: E402
from preference_tuning.tracking.spool import read  # noqa: E402
from preference_tuning.training import __main__ as training  # noqa: E402
from preference_tuning.training import job, reference  # noqa: E402


def ours(task: Task, folder: Path) -> Measured:
    """Run our DPO job in this process, from a fresh adapter; seconds are its training and its reference pass.

    They hold what the other side is spared: one evaluation, of a single pair, and one checkpoint.
    """
    base_model = _base_model(task.model)
    source = locate(base_model)
    base = loading.load_base(base_model, source, folder, compute.choose(base_model, folder))
    weights.save(loading.new_adapter(base, LORA, task.dpo.seed), base.tokenizer, folder / "sft", base_model)
    work = job.from_artifacts(
        "dpo", base_model, source, Dataset(task.folder / "data"), folder, adapter=folder / "sft", dpo=task.dpo
    )
    (folder / "job").mkdir()
    with _reference_clock() as passes:
        record = training.main(folder / "job", work)
    points = [p.metrics for p in read(folder / "job" / job.EVIDENCE / job.METRICS) if "dpo/train/loss" in p.metrics]
    return Measured(
        record.seconds + sum(passes),
        [p["dpo/train/loss"] for p in points],
        [p["dpo/train/logps/chosen"] for p in points],
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        {"preference_tuning": importlib.metadata.version("preference_tuning"), **record.versions},
    )


@contextlib.contextmanager
def _reference_clock() -> Iterator[list[float]]:
    """Yield a list that the seconds of each reference pass are added to; the record of a job leaves them out."""
    seconds: list[float] = []
    original = reference.add_reference

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.monotonic()
        try:
            return original(*args, **kwargs)
        finally:
            seconds.append(time.monotonic() - start)

    reference.add_reference = timed
    try:
        yield seconds
    finally:
        reference.add_reference = original


def _base_model(model: Path) -> BaseModelConfig:
    return BaseModelConfig(source=str(model), chat_template="chatml", dtype="float32", max_seq_length=MAX_LENGTH)


def prepare_task(folder: Path, data: str, dpo: DPOConfig, steps: int, threads: int) -> Task:
    """Write the model in float32 and the pairs that both sides train on: as many as the steps take."""
    quickstart = config.load(ROOT / "configs" / "quickstart.yaml").config
    model = quickstart.base_model.model_copy(update={"dtype": "float32"})
    base = loading.load_base(model, locate(model), ROOT / "outputs", compute.choose(model, folder))
    base.model.save_pretrained(folder / "model")  # type: ignore[operator]
    base.tokenizer.save_pretrained(folder / "model")
    settings = quickstart.data.model_copy(update={"source": data})
    prepared = prepare.prepare(settings, data_job.fingerprints_of(settings), folder / "prepared")
    table = rows.in_order(prepared.path("train"))
    wanted = steps * dpo.per_device_train_batch_size * dpo.gradient_accumulation_steps
    assert wanted <= len(table), f"{steps} steps take {wanted} pairs, and {data} has {len(table)} to train on"
    chosen = table.select(random.Random(dpo.seed).sample(range(len(table)), wanted))
    (folder / "data").mkdir()
    (folder / "data" / MANIFEST).write_bytes((prepared.folder / MANIFEST).read_bytes())
    for split, part in (("train", chosen), ("held_out", rows.in_order(prepared.path("held_out")).select([0]))):
        writer = Writer(folder / "data" / f"{split}.arrow", SCHEMA)
        for batch in part.flatten_indices().data.table.cast(SCHEMA).to_batches():
            writer.add(batch)
        writer.close()
    return Task(folder, folder / "model", [_texts(row) for row in chosen], dpo, threads)


def _texts(row: dict[str, Any]) -> dict[str, str]:
    assert [message["role"] for message in row["prompt"]] == ["user"], "pairs of one question and one answer only"
    return {name: row[name][0]["content"] for name in ("prompt", "chosen", "rejected")}


def report(name: str, measured: Measured) -> None:
    """Print a side."""
    print(f"{name}: {measured.seconds:.1f} s, peak {measured.peak_mb} MB")
    print("  losses " + " ".join(f"{loss:.4f}" for loss in measured.losses))
    print(f"  mean log-probability of a chosen answer {statistics.mean(measured.chosen_logps):.3f}")
    print("  " + " ".join(f"{package} {version}" for package, version in measured.versions.items()), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--python", type=Path, required=True, help="of the tool's environment")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--data", default=str(ROOT / "data" / "direct_answers.jsonl"))
    parser.add_argument("--batch", type=int, default=8, help="pairs of a micro batch; an optimizer step takes 16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    datasets.disable_progress_bars()
    torch.set_num_threads(options.threads)
    dpo = DPOConfig(
        num_train_epochs=1,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=16 // options.batch,
        warmup_steps=0,
        # Once, at the end.
        eval_steps=0.99,
        save_steps=0.99,
        max_length=MAX_LENGTH,
    )
    with tempfile.TemporaryDirectory() as name:
        task = prepare_task(Path(name), options.data, dpo, options.steps, options.threads)
        folders = [task.folder / side for side in ("theirs", "ours")]
        for folder in folders:
            folder.mkdir()
        # Not resolved: the link in an environment's folder is what makes it an environment.
        theirs = TOOLS[options.tool](task, folders[0], options.python.absolute())
        report(options.tool, theirs)
        mine = ours(task, folders[1])
        report("preference_tuning", mine)
    print(
        f"result: tool={options.tool} seconds={theirs.seconds:.1f} ours_seconds={mine.seconds:.1f} "
        f"ratio={theirs.seconds / mine.seconds:.2f} peak_mb={theirs.peak_mb} ours_peak_mb={mine.peak_mb} "
        f"steps={options.steps} threads={options.threads}"
    )


if __name__ == "__main__":
    main()
