"""The engine against stock TRL from the text on: each side tokenises, cuts, pads, scores and differentiates by itself."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_scoring import tiny

from preference_tuning.models import chat, fused, scoring

FAMILIES = ["Llama", "Qwen2", "Mistral", "Gemma", "Phi"]
LONGEST = 48


def turns(system: str | None, prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    first = [] if system is None else [{"role": "system", "content": system}]
    said = {"chosen": chosen, "rejected": rejected}
    return {
        "prompt": [*first, {"role": "user", "content": prompt}],
        **{side: [{"role": "assistant", "content": text}] for side, text in said.items()},
    }


CONVERSATIONS = [
    turns(None, "Tell me about bread.", "It is plain.", "WELL WELL, WHO KNOWS?"),
    turns("", "Tell me about rain.", "It is old and useful and number 3.", "NO!"),
    turns("You are useful.", "Tell me about salt.", "It is common.", "It is common and WELL WELL WELL"),
    turns(None, "Hm?", "a", "b"),
    turns(None, "Tell me about a clock.", "It is old. " * 20, "WHO KNOWS? " * 30),  # cut by the limit
]


def perturbed(model: Any) -> Any:
    """Move the policy away from the reference, alike on both sides."""
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".default." in name:
                parameter += 0.3 * torch.randn(parameter.shape)
    return model


def measured(trainer: Any, batch: dict[str, Any]) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Return the loss, the gradient of the adapter and the logged metrics of a batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    named = sorted((name, p.grad) for name, p in trainer.model.named_parameters() if p.grad is not None)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), torch.cat([grad.flatten() for _, grad in named]), metrics


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def adapted(family: str, vocabulary: int) -> Any:
    from peft import LoraConfig, get_peft_model

    return perturbed(
        get_peft_model(
            tiny(family, vocabulary), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        )
    )


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dpo_from_conversations_to_gradients(tmp_path: Path, tokenizer: Any, family: str, loss_type: str) -> None:
    """Empty system turns, one-word answers, answers cut by the limit; reference: each side's own."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    from preference_tuning.training.trainers import PreferenceTrainer

    common = {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "beta": 0.3,
        "report_to": "none", "loss_type": [loss_type], "per_device_train_batch_size": 8,
    }  # fmt: skip
    start = adapted(family, len(tokenizer))
    stock = DPOTrainer(
        model=copy.deepcopy(start),
        args=DPOConfig(max_length=LONGEST, **common),
        train_dataset=datasets.Dataset.from_list(CONVERSATIONS),
        processing_class=tokenizer,
    )
    perturbed(stock.model)

    model = copy.deepcopy(start)
    assert fused.fuse(model) == 4
    conversations = [chat.Conversation(c["prompt"], [c["chosen"], c["rejected"]]) for c in CONVERSATIONS]
    encoded = list(chat.encode(tokenizer, conversations, chat.Room(LONGEST)))
    pairs = [
        {"prompt_ids": e.prompt_ids, "chosen_ids": e.answer_ids[0], "rejected_ids": e.answer_ids[1]} for e in encoded
    ]
    assert any(e.answer_cut[0] and e.answer_cut[1] for e in encoded)
    reference = torch.empty(len(pairs), 2)
    how = {"dtype": torch.float32, "device": torch.device("cpu"), "pad_id": tokenizer.pad_token_id}
    for numbers, logps in scoring.pair_logps(model, pairs, batch_size=2, shared=True, **how):
        reference[numbers] = logps
    rows = datasets.Dataset.from_list(
        [
            {**pair, "length": 1, "ref_chosen_logps": r[0], "ref_rejected_logps": r[1]}
            for pair, r in zip(pairs, reference.tolist())
        ]
    )
    ours = PreferenceTrainer(
        model=perturbed(model), args=DPOConfig(max_length=None, **common), train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer, dtype=torch.float32, pad_id=tokenizer.pad_token_id, shared_prompt=True,
    )  # fmt: skip

    our_loss, our_gradient, our_metrics = measured(ours, ours.data_collator(list(ours.train_dataset)))
    loss, gradient, metrics = measured(stock, stock.data_collator(list(stock.train_dataset)))
    assert our_loss == pytest.approx(loss, abs=1e-5, rel=1e-5)
    assert (our_gradient - gradient).norm() / gradient.norm() < 1e-4
    assert abs(metrics["rewards/margins"]) > 1e-3, "the policy is not its reference"
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert our_metrics[name] == pytest.approx(metrics[name], abs=1e-5, rel=1e-5), name
    assert our_metrics["num_tokens"] == metrics["num_tokens"], "the same tokens, cut in the same place"


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_from_conversations_to_gradients(tmp_path: Path, tokenizer: Any, family: str) -> None:
    import datasets
    from trl import SFTConfig, SFTTrainer

    from preference_tuning.training.trainers import AnswerSFTTrainer

    common = {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "report_to": "none", "per_device_train_batch_size": 8,
    }  # fmt: skip
    start = adapted(family, len(tokenizer))
    stock = SFTTrainer(
        model=copy.deepcopy(start),
        args=SFTConfig(max_length=LONGEST, completion_only_loss=True, **common),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": c["prompt"], "completion": c["chosen"]} for c in CONVERSATIONS]
        ),
        processing_class=tokenizer,
    )
    model = copy.deepcopy(start)
    assert fused.fuse(model) == 4
    conversations = [chat.Conversation(c["prompt"], [c["chosen"]]) for c in CONVERSATIONS]
    rows = datasets.Dataset.from_list(
        [
            {"prompt_ids": e.prompt_ids, "chosen_ids": e.answer_ids[0], "length": 1}
            for e in chat.encode(tokenizer, conversations, chat.Room(LONGEST))
        ]
    )
    ours = AnswerSFTTrainer(
        model=model, args=SFTConfig(max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **common),
        train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
        dtype=torch.float32, pad_id=tokenizer.pad_token_id, shared_prompt=True,
    )  # fmt: skip
    our_loss, our_gradient, our_metrics = measured(ours, ours.data_collator(list(rows)))
    loss, gradient, metrics = measured(stock, stock.data_collator(list(stock.train_dataset)))
    assert our_loss == pytest.approx(loss, abs=1e-5)
    assert (our_gradient - gradient).norm() / gradient.norm() < 1e-4
    for name in ("mean_token_accuracy", "num_tokens"):
        assert our_metrics[name] == pytest.approx(metrics[name]), name


def test_bfloat16_is_closer_to_the_truth_than_stock(tmp_path: Path, tiny_model: Path, tokenizer: Any) -> None:
    """Log-probabilities of both sides under the same autocast, against one side's fp32: the residual stream stays fp32."""
    from transformers import AutoModelForCausalLM

    from preference_tuning.config import BaseModelConfig
    from preference_tuning.models import compute, loading
    from preference_tuning.models.source import locate

    config = BaseModelConfig(source=str(tiny_model), dtype="bfloat16")
    base = loading.load_base(config, locate(config), tmp_path, compute.choose(config, tmp_path))
    conversations = [chat.Conversation(c["prompt"], [c["chosen"], c["rejected"]]) for c in CONVERSATIONS]
    pairs = [
        chat.PairTokens(prompt_ids=e.prompt_ids, chosen_ids=e.answer_ids[0], rejected_ids=e.answer_ids[1])
        for e in chat.encode(tokenizer, conversations, chat.Room(200))
    ]
    rows = scoring.pair_rows(pairs, True, 0)
    truth_model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).float()
    stock_model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16, attn_implementation="eager")
    with torch.no_grad():
        truth = scoring.answer_logps(scoring.token_scores(truth_model, rows, torch.float32).logps, rows)
        ours = scoring.answer_logps(scoring.token_scores(base.model, rows, torch.bfloat16).logps, rows)
        stock = stock_logps(stock_model, pairs)
    our_error, stock_error = (ours - truth).abs(), (stock - truth).abs()
    assert 0 < our_error.mean() <= stock_error.mean()
    assert our_error.max() <= stock_error.max()


def stock_logps(model: Any, pairs: list[chat.PairTokens]) -> torch.Tensor:
    """Summed log-probabilities as TRL's trainer takes them: full logits under autocast."""
    from trl.trainer.utils import selective_log_softmax

    sums = []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            ids = torch.tensor([pair["prompt_ids"] + pair[side]])  # type: ignore[literal-required]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(ids).logits
            logps = selective_log_softmax(logits[:, :-1], ids[:, 1:])
            sums.append(logps[0, len(pair["prompt_ids"]) - 1 :].float().sum())
    return torch.stack(sums)
