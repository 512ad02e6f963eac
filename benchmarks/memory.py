"""The memory that `run.py check` expects, against the peak of real training jobs on random Llama models.

    .venv/bin/python benchmarks/memory.py [20M 135M 360M]

Each case is the training job itself (`python -m preference_tuning.training`), an epoch of a few steps, in a process
of its own whose peak resident memory the kernel tells (``ru_maxrss``). Only for CPUs: on CUDA the peak is another one.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from preference_tuning import config, jobs  # noqa: E402
from preference_tuning.data import job as data_job  # noqa: E402
from preference_tuning.models.source import locate  # noqa: E402
from preference_tuning.preflight import fit, memory  # noqa: E402
from preference_tuning.preflight.world import World  # noqa: E402
from preference_tuning.training import job as training_job  # noqa: E402

SIZES: dict[str, dict[str, int]] = {
    "20M": {"vocab": 32_000, "hidden": 320, "inner": 864, "layers": 8, "heads": 5, "kv": 5},
    "135M": {"vocab": 49_152, "hidden": 576, "inner": 1536, "layers": 30, "heads": 9, "kv": 3},
    "360M": {"vocab": 49_152, "hidden": 960, "inner": 2560, "layers": 32, "heads": 15, "kv": 5},
}
"""The last two are SmolLM2's shapes."""
CASES: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "full": {"full": True},
    "LoRA, checkpointing": {"gradient_checkpointing": True},
    "LoRA, attention only": {"target_modules": ["q_proj", "v_proj"]},
    "LoRA, bfloat16": {"dtype": "bfloat16"},
    "full, checkpointing": {"full": True, "gradient_checkpointing": True},
}
EVERYWHERE = 2
"""Cases that every size is measured in; the others take the middle one."""
ROWS, BATCH = 10, 4
ALLOWED = 0.25


class Measured(NamedTuple):
    """A case: what was expected and what the kernel counted, in bytes."""

    size: str
    case: str
    stage: str
    expected: memory.Memory
    peak: int

    @property
    def error(self) -> float:
        """By which share the estimate is too high."""
        return self.expected.total / self.peak - 1


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["make"]:
        return make(Path(sys.argv[2]), SIZES[sys.argv[3]])
    wanted = sys.argv[1:] or list(SIZES)
    print(f"{'model':6}{'case':24}{'stage':6}{'expected':>10}{'measured':>10}{'error':>8}   MB", flush=True)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for size in wanted:
            for measured in measure(Path(folder), size):
                found.append(measured)
                _print(measured)
    worst = max((abs(m.error), m) for m in found)[1]
    inside = sum(abs(m.error) <= ALLOWED for m in found)
    print(f"result: cases={len(found)} within_25_percent={inside} worst={worst.error:+.2f}")


def _print(m: Measured) -> None:
    parts = " ".join(f"{name} {size / 1e6:.0f}" for name, size in m.expected.parts.items() if size >= 5e5)
    expected, peak = m.expected.total / 1e6, m.peak / 1e6
    print(f"{m.size:6}{m.case:24}{m.stage:6}{expected:>10,.0f}{peak:>10,.0f}{m.error:>+8.0%}   {parts}", flush=True)


def measure(folder: Path, size: str) -> Iterator[Measured]:
    """Yield every case of a model of this size."""
    model = folder / size
    subprocess.run([sys.executable, __file__, "make", str(model), size], check=True)
    cases = list(CASES.items())
    for case, changes in cases if size == "135M" else cases[:EVERYWHERE]:
        yield from _case(model, size, case, dict(changes))


def _case(model: Path, size: str, case: str, changes: dict[str, Any]) -> Iterator[Measured]:
    full, dtype = changes.pop("full", False), changes.pop("dtype", "float32")
    lora = {"target_modules": changes.pop("target_modules")} if "target_modules" in changes else {}
    stage = {
        "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "num_train_epochs": 1,
        "warmup_steps": 0.1, "learning_rate": 1e-6, "eval_steps": 0.9, "save_steps": 0.9, "optim": "adamw_torch_fused",
        "per_device_eval_batch_size": BATCH, **changes,
    }  # fmt: skip
    run = config.RunConfig.model_validate(
        {
            "finetuning_type": "dpo",
            "output_dir": str(model.parent / "outputs"),
            "base_model": {"source": str(model), "dtype": dtype, "max_seq_length": 1024},
            "lora": None if full else lora,
            "data": {"source": str(model.parent / "rows.jsonl"), "held_out": 0.2},
            "sft": stage,
            "dpo": {**stage, "max_length": 1024},
            "tracking": {"mode": "off"},
        }
    )
    world = World(run)
    source, out = locate(run.base_model), Path(run.output_dir)
    dataset = data_job.prepare_for_run(data_job.of_run(run, source))
    settings: dict[str, Any] = {"lora": run.lora, "sft": run.sft}
    adapter: Path | None = None
    for name in ("sft", "dpo"):
        if name == "dpo":
            settings = {"dpo": run.dpo, "adapter": adapter}
        work = training_job.from_artifacts(name, run.base_model, source, dataset, out, run.training, **settings)
        scratch = model.parent / "jobs" / f"{size}, {case}, {name}"
        scratch.mkdir(parents=True)
        jobs.write_json(scratch / jobs.JOB, work.model_dump(mode="json"))
        yield Measured(size, case, name, fit.of_stage(world, name), _peak(scratch))
        adapter = scratch / training_job.ADAPTER


def _peak(folder: Path) -> int:
    """Run the training job of a folder and return its peak resident memory in bytes."""
    environment = {**jobs._environment(1), "TQDM_DISABLE": "1"}
    child = subprocess.Popen([sys.executable, "-m", training_job.MODULE, str(folder)], env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, (folder / jobs.ERROR).read_text(encoding="utf-8")
    return usage.ru_maxrss * 1024


def make(folder: Path, shape: dict[str, int]) -> None:
    """Write a random model of these shapes, and the rows beside it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from preference_tuning.models.chat import CHATML

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=5)) for _ in range(500)]
    lengths = [(rng.randint(20, 100), rng.randint(20, 120), rng.randint(20, 120)) for _ in range(ROWS)]
    rows = [
        dict(zip(("prompt", "chosen", "rejected"), (" ".join(rng.choices(words, k=n)) for n in row), strict=True))
        for row in lengths
    ]
    folder.parent.joinpath("rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    raw.train_from_iterator(
        [" ".join(words)] * 4,
        trainers.BpeTrainer(vocab_size=4096, special_tokens=special, initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, **dict(zip(("pad_token", "eos_token"), special[::2], strict=True))
    )
    tokenizer.chat_template = CHATML.replace("END", "<|im_end|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(settings).to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    main()
