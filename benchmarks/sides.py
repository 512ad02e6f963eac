"""The two sides of the training benchmarks: stock TRL and ours, on one model, one adapter and the same rows."""

import copy
import random
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

from preference_tuning import config  # noqa: E402
from preference_tuning.data import job as data_job  # noqa: E402
from preference_tuning.data import prepare  # noqa: E402
from preference_tuning.models import attention, chat, compute, fused, loading, rows  # noqa: E402
from preference_tuning.models.source import locate  # noqa: E402
from preference_tuning.training import arguments, reference, trainers  # noqa: E402

LONGEST = 1024
STEP = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
"""The Handbook's effective batch of 16, in micro-batches that are fast on both sides."""
ALIKE = {
    "num_train_epochs": 1, "weight_decay": 0.01, "warmup_steps": 0.1, "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0, "seed": 42,
}  # fmt: skip


@dataclass
class Setting:
    """The quickstart's model with its own chat template, a fresh adapter on all projections, and the rows."""

    base: loading.Base
    start: dict[str, torch.Tensor]
    """The adapter that every run starts from."""
    pairs: datasets.Dataset
    """Token rows of pairs."""
    talks: list[dict[str, Any]]
    """The same pairs as conversations, in the same order."""
    folder: Path

    @classmethod
    def load(cls, folder: Path, data: Path, count: int, answers: int = 2) -> "Setting":
        """Load the model, and ``count`` rows of ``data`` chosen by a seed."""
        datasets.disable_progress_bars()
        run = config.load(ROOT / "configs" / "quickstart.yaml").config
        model = run.base_model.model_copy(update={"chat_template": None})
        section = run.data.model_copy(update={"source": str(data)})
        dataset = prepare.prepare(section, data_job.fingerprints_of(section), folder / "data")
        chosen = compute.choose(model, ROOT / "outputs")
        base = loading.load_base(model, locate(model), ROOT / "outputs", chosen)
        policy = loading.new_adapter(base, config.LoraConfig(), seed=0)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:  # away from zero, or half of the adapter's work would be with zeros
                    parameter.normal_(std=0.01)
        base.model = policy
        kept = rows.tokenise(dataset.path("train"), base.tokenizer, chat.Room(LONGEST), folder, answers).rows
        talks = [
            {
                "prompt": chat.read_messages(row["prompt"]),
                "chosen": chat.read_messages(row["chosen"]),
                "rejected": chat.read_messages(row["rejected"]),
            }
            for row in rows.in_order(dataset.path("train"))
        ]
        assert len(talks) == len(kept), "a row was left out; choose data whose rows all fit"
        taken = sorted(random.Random(1).sample(range(len(kept)), min(count, len(kept))))
        start = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
        print(
            f"{len(taken)} rows, {chosen.dtype}, {chosen.threads} threads, "
            f"{sum(p.numel() for p in start.values()):,} adapter weights"
        )
        return cls(base, start, kept.select(taken), [talks[i] for i in taken], folder)

    def reset(self, ours: bool) -> Any:
        """Return the policy with the adapter that every run starts from; its layers fused or peft's own."""
        policy = self.base.model
        # Or the precision of the first trainer in the process would be that of all others.
        AcceleratorState._reset_state(reset_partial_state=True)
        vars(policy).pop("_is_accelerate_prepared", None)
        for name, parameter in policy.named_parameters():
            if name in self.start:
                parameter.data.copy_(self.start[name])
                parameter.grad = None
        for layer in policy.modules():
            vars(layer).pop("forward", None)
        if ours:
            fused.fuse(policy)
        # Stock attention for stock TRL; ours is put in by the first token tree.
        policy.get_base_model().config._attn_implementation = "sdpa"
        return policy


class _SameBatches:
    """TRL's trainer on our batches of similar length."""

    lengths: list[int]
    args: Any

    def _get_train_sampler(self, *_: Any) -> Any:
        return trainers.LengthBatches(self.lengths, self.args.train_batch_size, self.args.seed)


class StockDPO(_SameBatches, DPOTrainer):  # type: ignore[misc]
    """TRL's DPO on our batches."""


class StockSFT(_SameBatches, SFTTrainer):  # type: ignore[misc]
    """TRL's SFT on our batches."""


@dataclass
class Phase:
    """What a whole phase took, and its losses by step."""

    reference: float
    training: float
    losses: list[float]

    @property
    def seconds(self) -> float:
        """Of the reference pass and of train()."""
        return self.reference + self.training


def trained(trainer: Any, dtype: torch.dtype, before: float) -> Phase:
    """Run ``train()`` and time it; the matrix products must really run in ``dtype``."""
    with products_in(trainer.model, dtype):
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return Phase(before, seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@contextmanager
def products_in(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Assert that a layer's output has the precision that is claimed (autocast is on inside train() alone)."""
    seen = set()
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.down_proj"))
    hook = layer.register_forward_hook(lambda _m, _i, output: seen.add(output.dtype))
    yield
    hook.remove()
    assert seen == {dtype}, f"the matrix products ran in {seen}, not in {dtype}"


def our_dpo(setting: Setting) -> Phase:
    """Run our whole DPO phase: the reference pass and the training."""
    base, policy = setting.base, setting.reset(ours=True)
    section = config.DPOConfig(**STEP, **ALIKE)
    how = {"dtype": base.dtype, "device": base.device, "pad_id": base.tokenizer.pad_token_id, "shared": True}
    start = time.perf_counter()
    path = setting.folder / f"{uuid.uuid4()}.safetensors"
    tokens = reference.add_reference(setting.pairs, path, "", policy, "reference", batch_size=8, **how)
    before = time.perf_counter() - start
    trainer = trainers.PreferenceTrainer(
        model=policy, args=arguments.dpo(section, base, setting.folder / "ours"), train_dataset=tokens,
        eval_dataset=tokens, processing_class=base.tokenizer, dtype=base.dtype, pad_id=how["pad_id"],
        shared_prompt=True,
    )  # fmt: skip
    return trained(trainer, base.dtype, before)


def stock_dpo(setting: Setting, same_batches: bool, **changes: Any) -> Phase:
    """Run stock TRL's whole DPO phase, as well configured as it can be unless ``changes`` say otherwise."""
    base = setting.base
    policy = copy.deepcopy(setting.reset(ours=False))  # TRL adds a second adapter
    settings: dict[str, Any] = {
        "precompute_ref_log_probs": True, "gradient_checkpointing": False, "bf16": base.dtype == torch.bfloat16,
        "precompute_ref_batch_size": 8, **changes,
    }  # fmt: skip
    args = DPOConfig(
        output_dir=str(setting.folder / "stock"), beta=0.5, learning_rate=2e-6, max_length=LONGEST, logging_steps=1,
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", **STEP, **ALIKE, **settings,
    )  # fmt: skip
    talks = datasets.Dataset.from_list(setting.talks)
    talks._fingerprint = uuid.uuid4().hex  # or a second run would find the first one's reference
    spent: list[float] = []
    kind = StockDPO if same_batches else DPOTrainer
    plain = DPOTrainer._precompute_ref_logps

    def timed(*of: Any, **how: Any) -> Any:
        start = time.perf_counter()
        try:
            return plain(*of, **how)
        finally:
            spent.append(time.perf_counter() - start)

    DPOTrainer._precompute_ref_logps = timed
    try:
        trainer = kind(model=policy, args=args, train_dataset=talks, processing_class=base.tokenizer)
    finally:
        DPOTrainer._precompute_ref_logps = plain
    trainer.lengths = list(setting.pairs["length"])
    return trained(trainer, torch.bfloat16 if settings["bf16"] else torch.float32, sum(spent))


def our_sft(setting: Setting) -> Phase:
    """Run our SFT on the chosen answers."""
    base, policy = setting.base, setting.reset(ours=True)
    section = config.SFTConfig(**STEP, **ALIKE)
    trainer = trainers.AnswerSFTTrainer(
        model=policy, args=arguments.sft(section, base, setting.folder / "ours"), train_dataset=setting.pairs,
        eval_dataset=setting.pairs, processing_class=base.tokenizer, dtype=base.dtype,
        pad_id=base.tokenizer.pad_token_id, shared_prompt=True,
    )  # fmt: skip
    return trained(trainer, base.dtype, 0.0)


def stock_sft(setting: Setting, same_batches: bool, **changes: Any) -> Phase:
    """Run stock TRL's SFT on the chosen answers: loss on the answers alone, the head on their tokens alone."""
    base, policy = setting.base, setting.reset(ours=False)
    settings: dict[str, Any] = {"gradient_checkpointing": False, "bf16": base.dtype == torch.bfloat16, **changes}
    args = SFTConfig(
        output_dir=str(setting.folder / "stock"), learning_rate=3e-4, max_length=LONGEST, logging_steps=1,
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", completion_only_loss=True,
        **STEP, **ALIKE, **settings,
    )  # fmt: skip
    talks = datasets.Dataset.from_list([{"prompt": t["prompt"], "completion": t["chosen"]} for t in setting.talks])
    kind = StockSFT if same_batches else SFTTrainer
    trainer = kind(model=policy, args=args, train_dataset=talks, processing_class=base.tokenizer)
    trainer.lengths = list(setting.pairs["length"])
    return trained(trainer, torch.bfloat16 if settings["bf16"] else torch.float32, 0.0)


def without(feature: str) -> Any:
    """Return a context in which a part of our engine is off: ``fused`` or ``short``."""

    @contextmanager
    def short() -> Iterator[None]:
        kept, attention.SHORT = attention.SHORT, 0
        yield
        attention.SHORT = kept

    @contextmanager
    def unfused() -> Iterator[None]:
        kept = fused.fuse
        fused.fuse = lambda _model: 0
        yield
        fused.fuse = kept

    return {"short": short, "fused": unfused}[feature]()
