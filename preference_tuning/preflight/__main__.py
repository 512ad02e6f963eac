"""The process that answers what only torch and transformers know: ``python -m preference_tuning.preflight FOLDER``."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preference_tuning import jobs
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.models import chat, compute, gguf, shapes
from preference_tuning.models.compute import Compute
from preference_tuning.models.tokenizer import load_tokenizer
from preference_tuning.preflight.facts import Device, Facts, FactsJob, Problem, Template

PROBE_SECONDS = 0.2
ROWS, WIDTH, INNER = 256, 576, 1536
"""Of the matrices that a CPU multiplies: a layer of a small model."""
TOGETHER = 0.9
"""What a thread does beside others, of what it does alone."""
SIDE = 4096
"""Of the square matrices that a GPU multiplies."""
TALK = (
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And three?"},
)
ANSWER = {"role": "assistant", "content": "Seven, if you add it."}


def main(folder: Path, job: FactsJob) -> Facts:
    """Return what can be known; a part that cannot leaves the others as they are."""
    with gguf.read_once() if job.source.kind == "gguf" else contextlib.nullcontext():
        return _look(job)


def _look(job: FactsJob) -> Facts:
    facts = Facts()
    with_template = lambda: _template(load_tokenizer(job.base_model, job.source, job.output_dir))  # noqa: E731
    facts.template = _part(facts, "template", with_template)
    facts.compute = _part(facts, "device", lambda: compute.choose(job.base_model, job.output_dir))
    attention = facts.compute.attention if facts.compute else "sdpa"
    facts.shapes = _part(facts, "model", lambda: shapes.read(job.base_model, job.source, job.output_dir, attention))
    if facts.compute is not None:
        facts.devices, facts.tflops = _devices(), _tflops(facts.compute)
    return facts


def _part(facts: Facts, area: str, look: Callable[[], Any]) -> Any:
    try:
        return look()
    except PreferenceTuningError as error:
        facts.problems.append(Problem(area=area, message=str(error)))
        return None


def _template(tokenizer: chat.Tokenizer) -> Template:
    """Look at the tokenizer the way the engine uses it: rendered texts, tokenised without special tokens."""
    talk = list(TALK)
    try:
        prompt = chat.encode_prompt(tokenizer, talk)
    except Exception:  # a template may refuse several turns, and is a program of its own
        talk = talk[-1:]
        prompt = chat.encode_prompt(tokenizer, talk)
    whole = list(tokenizer(chat.render(tokenizer, [*talk, ANSWER]), add_special_tokens=False)["input_ids"])
    return Template(
        hash=chat.template_hash(tokenizer),
        pad=str(tokenizer.pad_token),
        eos=str(tokenizer.eos_token),
        same=whole[: len(prompt)] == prompt,
        closes=tokenizer.eos_token_id in whole[len(prompt) :],
        bytes=len(tokenizer.backend_tokenizer.to_str().encode()) if tokenizer.is_fast else 0,
    )


def _devices() -> list[Device]:
    import torch

    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [Device(name=device.name, total=device.total_memory) for device in found]


def _tflops(chosen: Compute) -> float:
    """Return the speed of plain matrix products, in 10^12 operations a second."""
    return _of_gpu(chosen.dtype) if chosen.device == "cuda" else chosen.threads * TOGETHER * _of_thread(chosen.dtype)


def _of_thread(dtype: str) -> float:
    """Return what one CPU thread does in its own time: other processes may keep the machine busy now."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    left, right = (torch.ones(shape, dtype=getattr(torch, dtype)) for shape in ((ROWS, WIDTH), (WIDTH, INNER)))
    least, end = float("inf"), time.thread_time() + PROBE_SECONDS
    while time.thread_time() < end:
        start = time.thread_time()
        left @ right
        least = min(least, time.thread_time() - start)
    torch.set_num_threads(before)
    return 2 * ROWS * WIDTH * INNER / least / 1e12


def _of_gpu(dtype: str) -> float:
    import torch

    matrix = torch.randn(SIDE, SIDE, device="cuda", dtype=getattr(torch, dtype))
    least = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        matrix @ matrix
        torch.cuda.synchronize()
        least = min(least, time.perf_counter() - start)
    return 2 * SIDE**3 / least / 1e12


if __name__ == "__main__":
    jobs.main(FactsJob, main)
