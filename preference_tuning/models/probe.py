"""How long a CPU takes for a small model's layer: matrix products and attention, forward and backward."""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

TOKENS, WIDTH, INNER = 256, 576, 1536
ROWS, HEADS, LENGTH, HEAD_WIDTH = 2, 8, 128, 64
PRODUCTS_A_LAYER = 4
"""The linear modules of a layer do this many times the work of one [TOKENS, WIDTH] x [WIDTH, INNER] product."""
FLOPS = 3 * 2 * TOKENS * WIDTH * INNER
"""Of one such product, forward, and backward for both factors."""
MIN_ROUNDS, MAX_ROUNDS = 3, 16
"""Small pieces in several rounds: on a busy machine at least one run of each is then left in peace."""


class Way(NamedTuple):
    """One way to run a layer."""

    dtype: str
    attention: str
    threads: int


class Part(NamedTuple):
    """A piece of a layer; ``work`` is ``product``, ``sdpa`` or ``eager``."""

    dtype: str
    work: str
    threads: int


def layers(ways: Iterable[Way], budget: float) -> tuple[dict[Way, float], dict[str, float]]:
    """Return the seconds of a layer run in each way, and the figures they are made of.

    Args:
        ways: to measure; they take turns.
        budget: seconds after which no other round begins.
    """
    ways = list(ways)
    parts = dict.fromkeys(Part(w.dtype, work, w.threads) for w in ways for work in ("product", w.attention))
    times = measure(parts, budget)
    seconds = {
        way: PRODUCTS_A_LAYER * times[Part(way.dtype, "product", way.threads)] + times[Part(*way)] for way in ways
    }
    return seconds, {_name(part): round(_figure(part, taken), 4) for part, taken in times.items()}


def _name(part: Part) -> str:
    return f"{part.dtype}/{part.threads}/{'tflops' if part.work == 'product' else f'{part.work}_ms'}"


def _figure(part: Part, seconds: float) -> float:
    return FLOPS / seconds / 1e12 if part.work == "product" else seconds * 1e3


def measure(parts: Iterable[Part], budget: float) -> dict[Part, float]:
    """Return the seconds of each part: the least over the repetitions, which is the least disturbed one.

    The parts take turns, so that a disturbance does not fall on one of them alone; the first round warms up.
    """
    before = torch.get_num_threads()
    prepared = {part: _prepare(part) for part in parts}
    least = dict.fromkeys(prepared, float("inf"))
    end = time.perf_counter() + budget
    try:
        for number in range(MAX_ROUNDS + 1):
            for part, run in prepared.items():
                torch.set_num_threads(part.threads)
                start = time.perf_counter()
                torch.autograd.backward(run().sum())
                if number:
                    least[part] = min(least[part], time.perf_counter() - start)
            if number >= MIN_ROUNDS and time.perf_counter() > end:
                break
    finally:
        torch.set_num_threads(before)
    return least


def _prepare(part: Part) -> Callable[[], Tensor]:
    """Return a function that runs the part forward."""
    dtype: torch.dtype = getattr(torch, part.dtype)
    # A generator of its own: the random state of the process must not move.
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    if part.work == "product":
        left, right = random(TOKENS, WIDTH), random(WIDTH, INNER)
        return lambda: left @ right
    query, key, value = (random(ROWS, HEADS, LENGTH, HEAD_WIDTH) for _ in range(3))
    mask = torch.full((LENGTH, LENGTH), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    if part.work == "sdpa":
        return lambda: functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def eager() -> Tensor:
        scores = query @ key.transpose(2, 3) * HEAD_WIDTH**-0.5 + mask
        attended: Tensor = scores.softmax(-1, dtype=torch.float32).to(dtype) @ value
        return attended

    return eager
