"""The memory that a stage of training needs, by a formula over the shapes of the model and the lengths of the rows.

What is counted, with ``e`` bytes of a number in a matrix product (docs/check.md derives it, with measured peaks):

- weights: ``e`` bytes each under an adapter (half a byte in 4 bits), 4 where all of them train;
- trained ones: a gradient of 4 bytes, two moments of 4 (of 1 with an 8-bit optimizer);
- activations: what autograd keeps of a layer, times the layers; with gradient checkpointing its input alone, and one
  layer whole;
- the head: a tile of logits, and where it trains its gradients;
- the process: Python and its libraries, or the CUDA context.
"""

from dataclasses import dataclass, replace
from typing import Literal

from preference_tuning.config import LoraConfig
from preference_tuning.models.shapes import Shapes
from preference_tuning.preflight.batches import Batch

WITHIN = 0.25
"""Share by which the estimate may be off."""
PROCESS = {"cpu": 640_000_000, "cuda": 600_000_000}
"""Bytes of Python with all libraries of a job, measured on a CPU; of a CUDA context, assumed."""
HOLES = {"cpu": 1.25, "cuda": 1.1}
"""What an allocator holds for each byte of activations: measured with glibc's heap on a CPU, assumed on CUDA."""
TILE = 128
"""Answer tokens whose logits exist at once (``models.head.HEAD_TILE``)."""
SHORT = 128
"""Keys up to which a CPU keeps the probabilities of attention (``models.attention.SHORT``)."""
LARGEST_FILE = 5_000_000_000
"""Bytes of a file of weights at most (``models.weights.SHARD_SIZE``)."""
FOUR_BITS = 0.56
"""Bytes of a weight in NF4 with double quantisation, its scales included (Dettmers et al. 2023, arXiv 2305.14314)."""
SAME_INPUT = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp"}
"""Layers that read one tensor, which in fp32 is kept once for all of them."""
GATES = {"gate_proj", "gate_up_proj", "up_gate_proj"}


@dataclass(frozen=True)
class Setup:
    """All that the memory of a stage depends on."""

    shapes: Shapes
    device: Literal["cpu", "cuda"]
    width: int
    """Bytes of a number in a matrix product: 4, or 2 in 16 bits."""
    eager: bool
    """Whether attention keeps its scores."""
    lora: LoraConfig | None
    four_bits: bool
    eight_bits: bool
    """Whether the optimizer keeps its moments in 8 bits."""
    checkpointing: bool
    accumulates: bool
    """Whether gradients of one batch wait for those of the next."""
    dropout: bool
    """Whether the adapter drops some of its input: its layers are then peft's own."""
    batch: Batch
    """The largest one that is trained on."""
    scored: Batch | None = None
    """The largest one that is scored without gradients."""
    shares: int = 1
    """Processes that hold a share of the weights each (FSDP)."""

    @property
    def full(self) -> bool:
        """Whether every weight trains."""
        return self.lora is None

    @property
    def trained(self) -> int:
        """Parameters that train."""
        return self.shapes.trained(self.lora)


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


def needed(setup: Setup) -> Memory:
    """Return the memory at the peak of training: the beginning of a backward pass, or the checkpoint after it."""
    gradients = 4 * setup.trained // setup.shares
    scored = _layer(replace(setup, batch=setup.scored)) if setup.scored else 0
    activations = round(HOLES[setup.device] * max(_activations(setup), scored))
    at_start = {"activations": activations, "logits": _head(setup)}
    held = gradients if setup.accumulates or not setup.full else 0
    # safetensors writes from a copy in main memory.
    copy = min(4 * setup.shapes.parameters, LARGEST_FILE) if setup.full and setup.device == "cpu" else 0
    if held + sum(at_start.values()) < gradients + copy:
        # Activations are let go of while gradients come, and a checkpoint follows: that is then the peak.
        at_start, held = {"checkpoint": copy}, gradients
    return Memory(
        {
            "process": PROCESS[setup.device],
            "weights": _weights(setup),
            "adapter": 0 if setup.full else 4 * setup.trained,
            "gradients": held,
            "optimizer": (2 if setup.eight_bits else 8) * setup.trained // setup.shares,
            **at_start,
        }
    )


def _weights(setup: Setup) -> int:
    shapes = setup.shapes
    if setup.four_bits:
        return round(FOUR_BITS * shapes.linear) + 2 * (shapes.parameters - shapes.linear)
    return (4 if setup.full else setup.width) * shapes.parameters // setup.shares


def _activations(setup: Setup) -> int:
    """Return the bytes that autograd keeps at the end of a forward pass, and what one layer's backward adds."""
    layer, count = _layer(setup), setup.shapes.layers
    tokens = setup.batch.tokens
    passing = _passing(setup)
    copies = 2 * setup.shapes.linear if setup.full and setup.width == 2 else 0  # autocast keeps them
    if setup.checkpointing:
        return 4 * tokens * setup.shapes.hidden * count + layer + passing + copies // count
    return layer * count + passing + copies


def _layer(setup: Setup) -> int:
    """Return the bytes that autograd keeps of a decoder layer."""
    shapes, tokens, e = setup.shapes, setup.batch.tokens, setup.width
    norms = 2 * (2 if setup.full else 1) * 4 * tokens * shapes.hidden
    inner = _inner(shapes)
    gated = any(linear.name in GATES for linear in shapes.linears)
    return norms + _inputs(setup) + (3 if gated else 2) * e * tokens * inner + _attention(setup)


def _inputs(setup: Setup) -> int:
    """Return the bytes of the inputs of linear layers that are kept because their weights, or adapters, train."""
    tokens, e = setup.batch.tokens, setup.width
    kept: dict[str, int] = {}
    for linear in setup.shapes.linears:
        if setup.lora is None or linear.name in setup.lora.target_modules:
            shared = SAME_INPUT.get(linear.name, linear.name) if e == 4 else linear.name
            dropped = (e + 1) * tokens * linear.inputs if setup.dropout else 0
            size = e * tokens * linear.inputs * linear.count // setup.shapes.layers
            kept[shared] = max(kept.get(shared, 0), size) + dropped
    return sum(kept.values())


def _attention(setup: Setup) -> int:
    """Return the bytes that attention keeps in a layer: queries, keys and values, what it gives, and probabilities."""
    shapes, e, size = setup.shapes, setup.width, 0
    for sequences, queries, keys in setup.batch.attention:
        asked = sequences * queries * shapes.heads * shapes.head_width
        short = setup.device == "cpu" and keys <= SHORT
        of_keys = sequences * keys * shapes.head_width * (shapes.key_heads if short else shapes.heads)
        scores = sequences * shapes.heads * queries * keys
        size += e * (2 * asked + 2 * of_keys)
        if short:
            size += e * scores
        elif setup.eager:
            size += (4 + e) * scores
    return size


def _passing(setup: Setup) -> int:
    """Return the bytes of gradients on their way through a layer."""
    tokens, e = setup.batch.tokens, setup.width
    return tokens * (3 * e * _inner(setup.shapes) + 2 * 4 * setup.shapes.hidden)


def _head(setup: Setup) -> int:
    shapes, e = setup.shapes, setup.width
    tile = min(TILE, setup.batch.answers) * shapes.vocabulary * (12 if e == 4 else 14)
    states = 2 * 4 * setup.batch.answers * shapes.hidden
    if not setup.full:
        return tile + states
    # Its gradient, the product that is added to it, and in 16 bits that product in fp32 and the weights in 16.
    return tile + states + shapes.embedding * (8 if e == 4 else 12) // setup.shares


def _inner(shapes: Shapes) -> int:
    """Return the width of what the MLP computes between its layers."""
    return max((linear.inputs for linear in shapes.linears), default=shapes.hidden)
