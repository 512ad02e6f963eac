"""The shared-prompt forward is exact: against one answer a row, and against stock TRL, for several architectures."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preference_tuning.evaluation import metrics
from preference_tuning.models import attention, chat, fused, head, scoring, tree
from preference_tuning.models.chat import PairTokens

VOCABULARY = 128
PAIRS = [
    PairTokens(prompt_ids=[5, 6, 7, 8], chosen_ids=[9, 10, 11], rejected_ids=[12, 13, 14, 15, 16, 17]),
    PairTokens(prompt_ids=[20, 21], chosen_ids=[22], rejected_ids=[23]),
    PairTokens(prompt_ids=[30] * 12, chosen_ids=[31, 32, 33, 34, 35, 36, 37], rejected_ids=[38, 39]),
]


def tiny(family: str, vocabulary: int = VOCABULARY) -> Any:
    """A random model of a family, in fp32."""
    import transformers

    common = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    extra = {
        "Gemma": {"head_dim": 8},
        "Gemma2": {"head_dim": 8, "sliding_window": 64, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
        "Cohere": {"logit_scale": 0.3},
    }
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**common, **extra.get(family, {}))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.config._attn_implementation = "eager"
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


FAMILIES = ["Llama", "Qwen2", "Mistral", "Gemma", "Gemma2", "Phi", "Cohere"]


def logps_of(model: Any, shared: bool) -> torch.Tensor:
    rows = scoring.pair_rows(PAIRS, shared, pad_id=0)
    return scoring.answer_logps(scoring.token_scores(model, rows, torch.float32).logps, rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_changes_nothing(family: str) -> None:
    """Log-probabilities of chosen and rejected equal a plain causal model's, summed by hand from its logits."""
    model = tiny(family)
    shared, plain = logps_of(model, shared=True), logps_of(model, shared=False)
    by_hand = []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in PAIRS:
            ids = torch.tensor([pair["prompt_ids"] + pair[side]])  # type: ignore[literal-required]
            logps = model(ids).logits.float().log_softmax(-1)
            start = len(pair["prompt_ids"])
            by_hand.append(sum(logps[0, at - 1, ids[0, at]] for at in range(start, ids.shape[1])))
    assert torch.allclose(shared, torch.stack(by_hand), atol=2e-4)  # type: ignore[arg-type]
    assert torch.allclose(shared, plain, atol=1e-4)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Cohere", "Phi"])
def test_the_heads_gradient_is_autograds(family: str, trains: bool) -> None:
    """Of the hidden states, and of the head where it trains, as from log_softmax over full logits."""
    model = tiny(family).requires_grad_(trains)
    rows = scoring.pair_rows(PAIRS, True, pad_id=0)
    layer = model.get_output_embeddings()
    hidden = torch.randn(len(rows.targets), 32, requires_grad=True)
    twin = hidden.detach().clone().requires_grad_()
    config = model.config
    softcap, scale = getattr(config, "final_logit_softcapping", None), getattr(config, "logit_scale", None)
    logps, entropies, correct, mean_logits = head.head_scores(hidden, layer.weight, layer.bias, rows.targets, torch.float32, softcap, scale)  # fmt: skip
    logits = torch.nn.functional.linear(twin, layer.weight, layer.bias)
    logits = logits * scale if scale else logits
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = logits.log_softmax(-1)
    taken = expected.gather(-1, rows.targets[:, None])[:, 0]
    weights = torch.randn(len(logps))
    ours = [hidden, *(p for p in layer.parameters() if trains)]
    theirs = [twin, *ours[1:]]
    found = torch.autograd.grad((logps * weights).sum(), ours)
    wanted = torch.autograd.grad((taken * weights).sum(), theirs)
    assert torch.allclose(logps, taken, atol=1e-5)
    for mine, its in zip(found, wanted, strict=True):
        assert torch.allclose(mine, its, atol=1e-5)
    assert torch.allclose(entropies, -(expected.exp() * expected).sum(-1), atol=1e-5)
    assert torch.equal(correct, expected.argmax(-1) == rows.targets)
    assert torch.allclose(mean_logits, logits.mean(-1), atol=1e-5)


def test_what_sequences_begin_with_is_computed_once() -> None:
    """Prompt once a pair, the system turn once a batch, common first words of answers once; nothing is padding."""
    system, long = [50, 51, 52], [60] * 20
    pairs = [
        PairTokens(prompt_ids=[*system, 5], chosen_ids=[7, 8], rejected_ids=[7, 9, 9]),
        PairTokens(prompt_ids=[*system, 6, *long], chosen_ids=[7], rejected_ids=[8]),
        PairTokens(prompt_ids=[*system, 5], chosen_ids=[7, 8], rejected_ids=[10]),  # its chosen sequence is known
    ]
    rows = scoring.pair_rows(pairs, True, pad_id=0)
    assert rows.input_ids.shape == (1, 3 + 1 + 2 + 2 + (1 + 20) + 2 + 1)
    assert rows.tokens == sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"] + p["rejected_ids"]) for p in pairs)
    assert rows.tree is not None
    whole, ends = rows.tree.blocks
    assert whole.mask is None
    assert (whole.queries.shape[1], ends.queries.shape[1]) == (25, 2), "ends ask for themselves alone"
    model = tiny("Llama")
    plain = scoring.pair_rows(pairs, False, pad_id=0)
    ours, theirs = (scoring.answer_logps(scoring.token_scores(model, r, torch.float32).logps, r) for r in (rows, plain))
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("length", [60, 200], ids=["short", "long"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_spelled_out_is_torchs(length: int, masked: bool) -> None:
    """Values and gradients, with three heads to a key head, on both sides of the length where the kernel changes."""
    torch.manual_seed(3)
    queries = length // 3 if masked else length
    at = torch.arange(length - queries, length)[:, None]
    mask = (torch.arange(length) <= at).expand(2, 1, queries, length) if masked else None
    tensors = [
        torch.randn(2, heads, n, 16, requires_grad=True) for heads, n in ((6, queries), (2, length), (2, length))
    ]
    twins = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    nodes = torch.arange(2 * length).view(2, length)
    block = tree.Block(nodes[:, -queries:], nodes, mask)
    flat = [t.transpose(0, 1).flatten(1, 2)[None] for t in tensors]  # sequence after sequence
    if masked:
        block = tree.Block(torch.arange(2 * queries).view(2, queries), nodes, mask)
    out, _ = attention.attend(None, *flat, None, tree.Tree([block], torch.arange(2 * queries)))  # type: ignore[arg-type]
    q, k, v = twins[0], *(t.repeat_interleave(3, 1) for t in twins[1:])
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not masked)
    weights = torch.randn(expected.shape)
    (out.view(2, queries, 6, 16).transpose(1, 2) * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.allclose(out.view(2, queries, 6, 16).transpose(1, 2), expected, atol=1e-5)
    for ours, theirs in zip(tensors, twins):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_model_that_took_trees_still_generates(family: str, kind: str) -> None:
    """With a cache and with padding; a soft cap, which torch's fused attention does not know, is kept."""
    model = tiny(family)
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    how = {"attention_mask": (ids != 0).long(), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    before = [model.generate(ids, **how), model.generate(ids[1:], max_new_tokens=8, do_sample=False, eos_token_id=None)]
    model.config._attn_implementation = kind
    scoring.token_scores(model, scoring.pair_rows(PAIRS, True, pad_id=0), torch.float32)
    assert model.config._attn_implementation == attention.NAMES[kind]
    after = [model.generate(ids, **how), model.generate(ids[1:], max_new_tokens=8, do_sample=False, eos_token_id=None)]
    assert [made.tolist() for made in after] == [made.tolist() for made in before]


def test_fused_lora_layers_stand_aside_where_the_formula_is_another(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    inputs = torch.randint(3, VOCABULARY, (2, 9))
    for settings in ({}, {"lora_dropout": 0.5}, {"use_dora": True}):
        config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **settings)
        model = get_peft_model(tiny("Llama"), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        found = []
        for fuse in (False, True):
            assert not fuse or fused.fuse(model) == 4
            torch.manual_seed(5)
            model.train()
            model.zero_grad()
            trained = model(inputs).logits
            trained.square().mean().backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            with model.disable_adapter():
                found.append((trained, gradient, model(inputs).logits))
        for plain, ours in zip(*found):
            assert torch.allclose(plain, ours, atol=1e-5), settings


def test_answers_do_not_see_each_other() -> None:
    model = tiny("Llama")
    changed = copy.deepcopy(PAIRS)
    changed[0]["chosen_ids"] = [99] * 9
    rows = [scoring.pair_rows(pairs, True, pad_id=0) for pairs in (PAIRS, changed)]
    before, after = (scoring.answer_logps(scoring.token_scores(model, r, torch.float32).logps, r) for r in rows)
    assert torch.allclose(before[3:], after[3:], atol=1e-5), "rejected answers are untouched by another chosen one"
    assert before[0] != after[0]


def word_level() -> Any:
    """A tokenizer of as many words as the tiny models know."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t2")


def trainer(tmp_path: Path, model: Any, shared: bool, loss_type: list[str], **settings: Any) -> Any:
    import datasets
    from trl import DPOConfig

    from preference_tuning.training.trainers import PreferenceTrainer

    if shared:
        fused.fuse(model)
    rows = datasets.Dataset.from_list(
        [
            {**pair, "length": 1, "ref_chosen_logps": -10.0 - i, "ref_rejected_logps": -12.0 + i}
            for i, pair in enumerate(PAIRS)
        ]
    )
    arguments = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", beta=0.3,
        loss_type=loss_type, max_length=None, per_device_train_batch_size=3, **settings,
    )  # fmt: skip
    return PreferenceTrainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=word_level(),
        dtype=torch.float32, pad_id=0, shared_prompt=shared,
    )  # fmt: skip


def adapted(family: str) -> Any:
    """A tiny model with an adapter that is not zero."""
    from peft import LoraConfig, get_peft_model

    modules = ["q_proj", "v_proj"]
    model = get_peft_model(tiny(family), LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM"))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


LOSSES = [
    ["sigmoid"], ["ipo"], ["hinge"], ["robust"], ["exo_pair"], ["nca_pair"], ["bco_pair"], ["sppo_hard"], ["aot"],
    ["aot_unpaired"], ["apo_zero"], ["apo_down"], ["discopop"], ["sigmoid_norm"], ["sigmoid", "sft"],
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "loss_type"),
    [*(("Llama", loss) for loss in LOSSES), *((f, loss) for f in FAMILIES[1:4] for loss in LOSSES[:2]), ("Phi", ["sigmoid"])],
    ids=str,
)  # fmt: skip
def test_losses_and_gradients_equal_stock_trl(tmp_path: Path, family: str, loss_type: list[str]) -> None:
    """fp32, policy different from its reference, unequal lengths, one-token answers."""
    settings = {"label_smoothing": 0.1} if {"robust", "exo_pair", "aot"} & set(loss_type) else {}
    found = []
    for shared in (True, False):
        engine = trainer(tmp_path, adapted(family), shared, loss_type, **settings)
        engine.model.train()
        batch = engine.data_collator([dict(row) for row in engine.train_dataset])
        loss = engine.compute_loss(engine.model, batch)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in engine.model.parameters() if p.requires_grad])
        metrics = {name: values[-1] for name, values in engine._metrics["train"].items()}
        found.append((loss.item(), gradients, metrics))
    (ours, our_gradient, our_metrics), (stock, stock_gradient, stock_metrics) = found
    assert ours == pytest.approx(stock, abs=1e-5, rel=1e-5)
    assert (our_gradient - stock_gradient).norm() / stock_gradient.norm() < 1e-4
    assert our_metrics.keys() == stock_metrics.keys()
    exact = {"rewards/accuracies", "mean_token_accuracy", "num_tokens"}
    for name, theirs in stock_metrics.items():
        assert our_metrics[name] == pytest.approx(theirs, abs=1e-6 if name in exact else 1e-4), name


def test_metrics_are_those_of_trl(tmp_path: Path) -> None:
    """A stock DPO trainer's own evaluation, on pairs without a tie and in one batch."""
    stock = trainer(tmp_path, adapted("Llama"), False, ["sigmoid"])
    told = {name.removeprefix("eval_"): value for name, value in stock.evaluate().items()}
    with torch.no_grad():
        logps = logps_of(stock.model, shared=False).double().numpy()
    n = np.arange(len(PAIRS))
    scores = {
        "prompt": n.astype(str),
        **{f"{side}_tokens": np.array([float(len(pair[f"{side}_ids"])) for pair in PAIRS]) for side in metrics.ANSWERS},  # type: ignore[literal-required]
        "dpo/chosen": logps[: len(n)],
        "dpo/rejected": logps[len(n) :],
        "sft/chosen": -10.0 - n,
        "sft/rejected": -12.0 + n,
    }
    ours = metrics.figures(scores, {"dpo": "sft"}, beta=0.3, seed=0)["dpo"]
    names = [
        "rewards/accuracies",
        "rewards/margins",
        "rewards/chosen",
        "rewards/rejected",
        "logps/chosen",
        "logps/rejected",
    ]
    assert {name: ours[name].value for name in names} == pytest.approx({name: told[name] for name in names}, abs=1e-4)


def test_only_one_adapter_is_kept(tmp_path: Path) -> None:
    """A "ref" adapter in a checkpoint makes transformers resume from the wrong weights."""
    engine = trainer(tmp_path, adapted("Llama"), True, ["sigmoid"])
    assert list(engine.model.peft_config) == ["default"]
    assert not [name for name, _ in engine.model.named_parameters() if ".ref." in name]
    assert engine.model.active_adapters == ["default"]


def test_models_whose_attention_cannot_take_the_mask_are_recognised() -> None:
    assert scoring.refuses_shared_prompt(tiny("Llama"), 100) is None
    window = tiny("Mistral")
    window.config.sliding_window = 16
    assert "sliding window of 16 tokens is shorter" in str(scoring.refuses_shared_prompt(window, 100))
    assert scoring.refuses_shared_prompt(window, 10) is None
    strange = tiny("Llama")
    strange.config.layer_types = ["linear_attention", "full_attention"]
    assert "layers of the kind linear_attention" in str(scoring.refuses_shared_prompt(strange, 10))
    fast = tiny("Llama")
    layer = fast.model.layers[0].self_attn
    layer.__class__ = type("Fast", (type(layer),), {"forward": lambda self, x, **_: (x, None)})
    layer.__class__.forward.__module__ = "unsloth.models.llama"
    assert scoring.refuses_shared_prompt(fast, 10) == "unsloth brings its own attention"
    own = tiny("Llama")
    own.__class__ = type("Own", (type(own),), {"_supports_attention_backend": False})
    assert scoring.refuses_shared_prompt(own, 10) == "its attention cannot be replaced"
    flash = tiny("Llama")
    flash.config._attn_implementation = "flash_attention_2"
    assert "knows no token trees" in str(scoring.refuses_shared_prompt(flash, 10))


def test_a_model_that_attends_in_a_way_of_its_own_is_found_out() -> None:
    """Rules know names; the try looks at what comes out. Here keys lose their positions, so sharing changes them."""
    examples = [(pair["prompt_ids"], pair["chosen_ids"]) for pair in PAIRS]
    model = tiny("Llama")
    assert scoring.tree_error(model, examples, torch.float32) < 1e-4
    assert model.training is False
    layer = model.model.layers[1].self_attn
    plain = layer.forward

    def by_place_in_the_batch(*args: Any, **kwargs: Any) -> Any:
        out, weights = plain(*args, **kwargs)
        return out * torch.arange(1, out.shape[1] + 1)[:, None], weights

    layer.forward = by_place_in_the_batch
    assert scoring.tree_error(model, examples, torch.float32) > 1e-2


def test_tokens_are_those_of_trl(tiny_model: Path) -> None:
    """The boundary between prompt and answer, and the end of the answer, as TRL's own preparation puts them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    user, yes, no = (
        [{"role": r, "content": c}] for r, c in (("user", "Why?"), ("assistant", "So."), ("assistant", "N"))
    )

    def encoded(length: int) -> chat.Encoded | chat.Refused:
        (row,) = chat.encode(tokenizer, [chat.Conversation(user, [yes, no])], chat.Room(length))
        return row

    pair = encoded(64)
    assert isinstance(pair, chat.Encoded)
    assert tokenizer.decode(pair.prompt_ids) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(pair.answer_ids[0]) == "So.<|im_end|>\n"
    assert chat.encode_prompt(tokenizer, user) == pair.prompt_ids
    cut = encoded(len(pair.prompt_ids) + 2)
    assert isinstance(cut, chat.Encoded)
    assert (cut.prompt_ids, cut.answer_ids[0]) == (pair.prompt_ids, pair.answer_ids[0][:2])
    refused = encoded(len(pair.prompt_ids))
    assert isinstance(refused, chat.Refused)
    assert refused.problem == "long_prompt"


def test_chatml_for_a_tokenizer_without_its_tokens(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer.get_vocab = dict  # a vocabulary without <|im_end|>
    chat.set_template(tokenizer, "chatml")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<|im_start|>user\nhi<|endoftext|>\n"


KNOWN_LOSSES = {  # torchtune's test_dpo_loss.py: h = [0, 10, 20] at beta 0.1 and 0.5
    ("sigmoid", 0.1): [0.693147, 0.313262, 0.126928],
    ("sigmoid", 0.5): [0.693147, 0.006715, 0.000045],
}


@pytest.mark.parametrize(("loss", "beta"), KNOWN_LOSSES)
def test_the_literatures_values(tmp_path: Path, loss: str, beta: float) -> None:
    """TRL's loss on given log-probabilities, through the method that our forward replaces."""
    policy = torch.tensor([[-0.5, -10.0, -1.0], [-0.1, -30.0, -21.0]])
    reference = [[-0.5, -10.1, -0.1], [-0.1, -20.1, -0.1]]
    engine = trainer(tmp_path, adapted("Llama"), True, [loss])
    engine.beta = beta
    for i, expected in enumerate(KNOWN_LOSSES[loss, beta]):
        mask = torch.tensor([[0, 1], [0, 1]])
        values = torch.stack([policy[0, i], policy[1, i]])[:, None]
        engine._get_per_token_logps_and_entropies = lambda *_, v=values: (v, torch.zeros(2, 1), None)
        batch = {
            "input_ids": torch.zeros(2, 2, dtype=torch.long), "attention_mask": mask, "completion_mask": mask, "rows": {}, "rows_here": 1,
            "ref_chosen_logps": torch.tensor([reference[0][i]]), "ref_rejected_logps": torch.tensor([reference[1][i]]),
        }  # fmt: skip
        assert engine.compute_loss(engine.model, batch).item() == pytest.approx(expected, abs=1e-6)
    assert pytest.approx(math.log(2), abs=1e-6) == KNOWN_LOSSES[loss, beta][0]


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral", "Gemma", "Phi"])
def test_sft_equals_stock_trl(tmp_path: Path, family: str) -> None:
    """The loss on the answers' tokens and its gradient, with rows of unequal lengths and an answer of one token."""
    (our_loss, ours), (stock_loss, stock) = sft_of_both(tmp_path, adapted(family))
    assert our_loss == pytest.approx(stock_loss, abs=1e-5)
    our_gradient, stock_gradient = (torch.cat([g.flatten() for g in found.values()]) for found in (ours, stock))
    assert (our_gradient - stock_gradient).norm() / stock_gradient.norm() < 1e-4


def sft_of_both(tmp_path: Path, model: Any) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Return the loss and the gradients that our trainer gives a model, then those that stock TRL gives it."""
    import datasets
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from preference_tuning.training.trainers import AnswerSFTTrainer

    rows = datasets.Dataset.from_list([{**pair, "length": 1} for pair in PAIRS])
    plain = [
        {
            "input_ids": pair["prompt_ids"] + pair["chosen_ids"],
            "labels": [-100] * len(pair["prompt_ids"]) + pair["chosen_ids"],
        }
        for pair in PAIRS
    ]
    arguments = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        max_length=None, per_device_train_batch_size=3, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    common = {"model": model, "args": arguments, "processing_class": word_level()}
    # Stock first: it patches the model's own forward, which ours then wraps.
    collator = DataCollatorForLanguageModeling(pad_token_id=0)
    stock = SFTTrainer(train_dataset=datasets.Dataset.from_list(plain), data_collator=collator, **common)
    ours = AnswerSFTTrainer(
        train_dataset=rows, eval_dataset=rows, dtype=torch.float32, pad_id=0, shared_prompt=True, **common
    )
    found = []
    for engine, batch in ((ours, ours.data_collator(list(rows))), (stock, collator(plain))):
        engine.model.train()
        engine.model.zero_grad()
        loss = engine.compute_loss(engine.model, batch)
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    return found


@pytest.mark.parametrize(
    "reference_of", ["the policy", "the base model", "another adapter", "another template", "other data"]
)
def test_a_reference_that_is_not_the_policy_is_caught(tmp_path: Path, reference_of: str) -> None:
    """Broken on purpose in the four ways in which a reference goes wrong unseen: training would start from them all."""
    import contextlib

    from preference_tuning.errors import DivergedError
    from preference_tuning.training import reference

    model = adapted("Llama")
    engine = trainer(tmp_path, model, True, ["sigmoid"])
    how = {"dtype": torch.float32, "device": torch.device("cpu"), "pad_id": 0, "shared": True}
    rows = engine.train_dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
    of_reference = {
        "another template": rows.map(lambda row: {"prompt_ids": [3, *row["prompt_ids"]]}),
        "other data": rows.select([1, 2, 0]),
    }.get(reference_of, rows)
    weights = {name: value.clone() for name, value in model.named_parameters() if "lora_B" in name}
    if reference_of == "another adapter":
        model.load_state_dict({name: value * 1.5 for name, value in weights.items()}, strict=False)
    with model.disable_adapter() if reference_of == "the base model" else contextlib.nullcontext():
        stored = reference.add_reference(of_reference, tmp_path / "r", "key", model, "reference", batch_size=3, **how)
    model.load_state_dict(weights, strict=False)
    columns = {name: stored[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}
    engine.train_dataset = rows.add_column("ref_chosen_logps", list(columns["ref_chosen_logps"])).add_column(
        "ref_rejected_logps", list(columns["ref_rejected_logps"])
    )
    loss, difference, pairs = reference.measure(engine, **how)
    assert pairs == 3
    tolerance = scoring.TOLERANCE[torch.float32]
    if reference_of == "the policy":
        assert reference.check(loss, difference, 0.3, ["sigmoid"], tolerance) == math.log(2)
        return
    with pytest.raises(DivergedError, match="the DPO reference is not the SFT policy"):
        reference.check(loss, difference, 0.3, ["sigmoid"], tolerance)
