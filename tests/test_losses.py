"""Every loss of DPO, from the YAML that asks for it to the number: computed by hand from plain log-probabilities.

docs/training.md has the same formulas in its table of losses. That our forward pass gives what stock TRL gives for
each of them is shown in test_scoring.py; here TRL's formula itself is checked, against the papers'.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import pytest
import torch

from preference_tuning import config
from preference_tuning.config.schema import SMOOTHED_LOSSES, DPOLoss
from preference_tuning.models import compute
from preference_tuning.models.loading import Base

# Prompt, chosen, rejected: unequal lengths, an answer of one token.
PAIRS = [
    ([5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16, 17]),
    ([20, 21], [22], [23]),
    ([30] * 12, [31, 32, 33, 34, 35, 36, 37], [38, 39]),
]
REFERENCE = [(-10.0, -23.0), (-4.0, -6.0), (-27.0, -7.5)]
"""Log-probabilities of chosen and rejected: near the policy's, so that no sigmoid is saturated."""


@dataclass
class Batch:
    """What a loss is made of: summed log-probabilities in nats and lengths in tokens, a value for each pair."""

    chosen: list[float]
    rejected: list[float]
    chosen_tokens: list[int]
    rejected_tokens: list[int]

    @property
    def chosen_ratios(self) -> list[float]:
        return [policy - ref[0] for policy, ref in zip(self.chosen, REFERENCE, strict=True)]

    @property
    def rejected_ratios(self) -> list[float]:
        return [policy - ref[1] for policy, ref in zip(self.rejected, REFERENCE, strict=True)]

    @property
    def margins(self) -> list[float]:
        return [w - v for w, v in zip(self.chosen_ratios, self.rejected_ratios, strict=True)]

    @property
    def margins_a_token(self) -> list[float]:
        chosen = [ratio / n for ratio, n in zip(self.chosen_ratios, self.chosen_tokens, strict=True)]
        rejected = [ratio / n for ratio, n in zip(self.rejected_ratios, self.rejected_tokens, strict=True)]
        return [w - v for w, v in zip(chosen, rejected, strict=True)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def smoothed(delta: float, beta: float, epsilon: float) -> float:
    return -(1 - epsilon) * log_sigmoid(beta * delta) - epsilon * log_sigmoid(-beta * delta)


def exo(margin: float, beta: float, epsilon: float) -> float:
    """KL of (sigmoid(b m), sigmoid(-b m)) from (1 - e, e)."""
    p = sigmoid(beta * margin)
    return p * math.log(p / (1 - epsilon)) + (1 - p) * math.log((1 - p) / epsilon)


def discopop(margin: float, beta: float) -> float:
    logits = beta * margin
    mixed = sigmoid(logits / 0.05)
    return (1 - mixed) * -log_sigmoid(logits) + mixed * math.exp(-logits)


def sorted_margins(batch: Batch, reference_too: bool) -> list[float]:
    """What optimal transport in one dimension pairs: the sorted values of both sides, over the batch."""
    if reference_too:
        policy = sorted(w - v for w, v in zip(batch.chosen, batch.rejected, strict=True))
        return [a - b for a, b in zip(policy, sorted(w - v for w, v in REFERENCE), strict=True)]
    return [a - b for a, b in zip(sorted(batch.chosen_ratios), sorted(batch.rejected_ratios), strict=True)]


def each(batch: Batch, loss: Callable[[float, float], float]) -> float:
    """The mean of a loss of the two log-ratios."""
    return fmean(map(loss, batch.chosen_ratios, batch.rejected_ratios))


Formula = Callable[[Batch, float, float], float]
BY_HAND: dict[str, Formula] = {
    "sigmoid": lambda x, b, e: fmean(-log_sigmoid(b * m) for m in x.margins),
    "sigmoid_norm": lambda x, b, e: fmean(-log_sigmoid(b * m) for m in x.margins_a_token),
    "hinge": lambda x, b, e: fmean(max(0.0, 1 - b * m) for m in x.margins),
    "ipo": lambda x, b, e: fmean((m - 1 / (2 * b)) ** 2 for m in x.margins_a_token),
    "robust": lambda x, b, e: fmean(
        (-(1 - e) * log_sigmoid(b * m) + e * log_sigmoid(-b * m)) / (1 - 2 * e) for m in x.margins
    ),
    "exo_pair": lambda x, b, e: fmean(exo(m, b, e) for m in x.margins),
    "nca_pair": lambda x, b, e: each(
        x, lambda w, v: -log_sigmoid(b * w) - log_sigmoid(-b * w) / 2 - log_sigmoid(-b * v) / 2
    ),
    "bco_pair": lambda x, b, e: each(x, lambda w, v: -log_sigmoid(b * w) - log_sigmoid(-b * v)),
    "sppo_hard": lambda x, b, e: each(x, lambda w, v: (w - 1 / (2 * b)) ** 2 + (v + 1 / (2 * b)) ** 2),
    "aot": lambda x, b, e: fmean(smoothed(m, b, e) for m in sorted_margins(x, True)),
    "aot_unpaired": lambda x, b, e: fmean(smoothed(m, b, e) for m in sorted_margins(x, False)),
    "apo_zero": lambda x, b, e: each(x, lambda w, v: 1 - sigmoid(b * w) + sigmoid(b * v)),
    "apo_down": lambda x, b, e: each(x, lambda w, v: sigmoid(b * w) + 1 - sigmoid(b * (w - v))),
    "discopop": lambda x, b, e: fmean(discopop(m, b) for m in x.margins),
    "sft": lambda x, b, e: -sum(x.chosen) / sum(x.chosen_tokens),
}


@pytest.fixture(scope="module")
def model() -> Any:
    """A random Llama with an adapter that is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2")


@pytest.fixture(scope="module")
def batch(model: Any) -> Batch:
    def log_probability(prompt: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            logps = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        return sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))

    return Batch(
        chosen=[log_probability(prompt, chosen) for prompt, chosen, _ in PAIRS],
        rejected=[log_probability(prompt, rejected) for prompt, _, rejected in PAIRS],
        chosen_tokens=[len(chosen) for _, chosen, _ in PAIRS],
        rejected_tokens=[len(rejected) for _, _, rejected in PAIRS],
    )


Loss = Callable[..., float]


@pytest.fixture
def loss_of(model: Any, tokenizer: Any, tmp_path: Path) -> Loss:
    """The loss of the fixed batch, in the trainer that the `dpo` section of a run config makes."""
    import datasets

    from preference_tuning.training import arguments, trainers

    names = ("prompt_ids", "chosen_ids", "rejected_ids")

    def loss(
        dpo: str, pairs: int = len(PAIRS), reference: list[tuple[float, float]] = REFERENCE, **overrule: Any
    ) -> float:
        rows = datasets.Dataset.from_list(
            [
                {**dict(zip(names, pair, strict=True)), "length": 1, "ref_chosen_logps": w, "ref_rejected_logps": v}
                for pair, (w, v) in zip(PAIRS, reference, strict=True)
            ]
        )
        path = tmp_path / "run.yaml"
        path.write_text(
            f"parameters:\n  base_model: {{source: org/m, device: cpu, dtype: float32}}\n  data: {{source: r}}\n  dpo: {dpo}\n"
        )
        run = config.load(path).config
        base = Base(model, tokenizer, compute.choose(run.base_model, tmp_path), run.base_model, None)
        trainer = trainers.PreferenceTrainer(
            args=arguments.dpo(run.dpo, base, tmp_path), train_dataset=rows, eval_dataset=rows, model=model,
            processing_class=tokenizer, dtype=torch.float32, pad_id=0, shared_prompt=True,
        )  # fmt: skip
        vars(trainer).update(overrule)
        return trainer.compute_loss(model, trainer.data_collator(list(rows)[:pairs])).item()

    return loss


def smoothing(loss_type: str) -> float:
    return 0.1 if loss_type in SMOOTHED_LOSSES else 0.0


@pytest.mark.parametrize("loss_type", get_args(DPOLoss))
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_a_loss_by_hand(loss_of: Loss, batch: Batch, loss_type: str, beta: float) -> None:
    epsilon = smoothing(loss_type)
    found = loss_of(f"{{beta: {beta}, loss_type: {loss_type}, label_smoothing: {epsilon}}}")
    assert found == pytest.approx(BY_HAND[loss_type](batch, beta, epsilon), rel=1e-4)


@pytest.mark.parametrize(
    ("dpo", "expected"),
    [
        # RPO (Pang et al. 2024): the preference, and the likelihood of the chosen answers beside it.
        ("{beta: 0.1, loss_type: [sigmoid, sft], loss_weights: [1.0, 0.2]}", [("sigmoid", 1.0), ("sft", 0.2)]),
        # The same as text of one loss and as a list of one.
        ("{beta: 0.1, loss_type: [sigmoid]}", [("sigmoid", 1.0)]),
        # Without weights every loss counts once.
        ("{beta: 0.1, loss_type: [sigmoid, sft]}", [("sigmoid", 1.0), ("sft", 1.0)]),
        ("{beta: 0.1, loss_type: sigmoid, loss_weights: [0.25]}", [("sigmoid", 0.25)]),
        # MPO (Wang et al. 2024): preference, quality and generation.
        (
            "{beta: 0.1, loss_type: [sigmoid, bco_pair, sft], loss_weights: [0.8, 0.2, 1.0]}",
            [("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0)],
        ),
        # Length-normalised DPO (Tulu 3), with the likelihood of the chosen answers.
        ("{beta: 5, loss_type: [sigmoid_norm, sft], loss_weights: [1.0, 0.1]}", [("sigmoid_norm", 1.0), ("sft", 0.1)]),
    ],
)  # fmt: skip
def test_a_sum_of_losses_by_hand(loss_of: Loss, batch: Batch, dpo: str, expected: list[tuple[str, float]]) -> None:
    beta = 5 if "beta: 5" in dpo else 0.1
    by_hand = sum(weight * BY_HAND[loss_type](batch, beta, 0.0) for loss_type, weight in expected)
    assert loss_of(dpo) == pytest.approx(by_hand, rel=1e-4)


def test_what_beta_and_label_smoothing_act_on(loss_of: Loss) -> None:
    """The config refuses label_smoothing where TRL would ignore it; this is the measure of where."""
    acts: dict[str, set[str]] = {"beta": set(), "label_smoothing": set()}
    for loss_type in get_args(DPOLoss):
        text = f"{{beta: 0.1, loss_type: {loss_type}, label_smoothing: {smoothing(loss_type)}}}"
        plain = loss_of(text)
        acts["beta"] |= {loss_type} if loss_of(text, beta=0.3) != plain else set()
        acts["label_smoothing"] |= {loss_type} if loss_of(text, label_smoothing=0.2) != plain else set()
    assert acts["label_smoothing"] == SMOOTHED_LOSSES
    assert acts["beta"] == set(get_args(DPOLoss)) - {"sft"}


LN_2 = math.log(2)
AT_START: dict[str, Callable[[float, float], float]] = {
    **dict.fromkeys(("sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired"), lambda b, e: LN_2),
    **dict.fromkeys(("nca_pair", "bco_pair"), lambda b, e: 2 * LN_2),
    **dict.fromkeys(("hinge", "apo_zero", "apo_down"), lambda b, e: 1),
    "ipo": lambda b, e: 1 / (4 * b**2),
    "sppo_hard": lambda b, e: 1 / (2 * b**2),
    "exo_pair": lambda b, e: -math.log(4 * e * (1 - e)) / 2,
    "discopop": lambda b, e: (LN_2 + 1) / 2,
}


def test_the_loss_of_a_policy_that_is_its_reference(loss_of: Loss, batch: Batch) -> None:
    """What the first step of a run shows; docs/training.md has these values."""
    same = list(zip(batch.chosen, batch.rejected, strict=True))
    for loss_type, expected in AT_START.items():
        epsilon = smoothing(loss_type)
        found = loss_of(f"{{beta: 0.3, loss_type: {loss_type}, label_smoothing: {epsilon}}}", reference=same)
        assert found == pytest.approx(expected(0.3, epsilon), rel=1e-4), loss_type
    assert set(AT_START) == set(get_args(DPOLoss)) - {"sft"}


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_optimal_transport_needs_a_batch(loss_of: Loss, batch: Batch, loss_type: str) -> None:
    """With one pair a batch nothing is sorted: what is left is DPO with smoothed labels."""
    found = loss_of(f"{{beta: 0.1, loss_type: {loss_type}, label_smoothing: 0.2}}", pairs=1)
    assert found == pytest.approx(smoothed(batch.margins[0], 0.1, 0.2), rel=1e-4)


def test_the_documentation_lists_every_loss() -> None:
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    table = text.partition("| `loss_type` | loss of a pair |")[2].partition("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `")]
    assert {cells[0].strip(" `") for cells in rows} == set(get_args(DPOLoss))
    assert {cells[0].strip(" `") for cells in rows if cells[4].strip().startswith("yes")} == SMOOTHED_LOSSES
