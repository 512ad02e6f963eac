"""The sections of a run config, with their defaults: the LLM Engineer's Handbook's recipe.

Every default lives here and nowhere else. Field names are those of transformers and TRL where they have one.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from preference_tuning.config.data import DataConfig
from preference_tuning.config.evaluation import EvaluationConfig
from preference_tuning.config.notify import Receiver
from preference_tuning.config.place import Place
from preference_tuning.config.registry import RegistryConfig
from preference_tuning.config.retrain import RetrainConfig
from preference_tuning.config.section import Section, Share, Text
from preference_tuning.config.training import TrainingConfig
from preference_tuning.errors import ConfigError

DPOLoss = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair",
    "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
]  # fmt: skip
SMOOTHED_LOSSES = {"robust", "exo_pair", "aot", "aot_unpaired"}
"""Where TRL 1.14.2 really applies ``label_smoothing`` (trl/trainer/dpo_trainer.py); elsewhere it ignores it."""


class BaseModelConfig(Section):
    """The model that is tuned, and how it is loaded."""

    source: Place
    """A hub id, a local directory, a .gguf file, or ``package:NAME/FILE`` for a file of an installed Python package."""
    revision: Text | None = None
    """Branch, tag or commit of a hub id; resolved to a commit before anything runs. None: the main branch."""
    backend: Literal["transformers", "unsloth"] = "transformers"
    """unsloth needs CUDA and the gpu extra; asked for where it cannot run, it is an error."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: on CUDA bfloat16 where the GPU has it, else float16; on a CPU float32, or bfloat16 where it is faster."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """auto: sdpa on CUDA and in float32; in bfloat16 on a CPU the faster of sdpa and eager."""
    threads: int | None = Field(None, ge=1, le=4096)
    """CPU threads of one operation. None: OMP_NUM_THREADS, else torch's default or all usable CPUs, as measured."""
    load_in_4bit: bool = False
    """Quantise the frozen weights to 4 bits with bitsandbytes (QLoRA); CUDA only."""
    max_seq_length: int = Field(2048, ge=16, le=1_048_576)
    """Longest row, in tokens, that SFT trains on."""
    chat_template: Place | None = None
    """None: the tokenizer's own. ``chatml``, or the path of a Jinja file, replaces it; it is saved with the model."""


class LoraConfig(Section):
    """The adapter that walks through SFT and DPO (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = Field(32, ge=1, le=1024)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[Text, ...] = (
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    )  # fmt: skip
    """Kept sorted: equal sets are equal settings."""

    @field_validator("target_modules")
    @classmethod
    def _adaptable(cls, modules: tuple[str, ...]) -> tuple[str, ...]:
        if not modules:
            raise ValueError("at least one module is needed")
        if "lm_head" in modules:
            raise ValueError(
                "lm_head cannot be adapted: the engine applies the head's own weights to answer tokens only"
            )
        return tuple(sorted(set(modules)))


class StageConfig(Section):
    """What SFT and DPO have in common; they differ in the defaults of the first two."""

    num_train_epochs: float = Field(gt=0, le=1000)
    learning_rate: float = Field(gt=0, lt=1)
    per_device_train_batch_size: int = Field(2, ge=1)
    gradient_accumulation_steps: int = Field(8, ge=1)
    per_device_eval_batch_size: int = Field(8, ge=1)
    optim: Literal["auto", "adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = "auto"
    """auto: adamw_8bit on CUDA, adamw_torch_fused on a CPU (where 8-bit steps are 14 times slower)."""
    weight_decay: float = Field(0.01, ge=0, le=1)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: float = Field(10, ge=0)
    """Optimizer steps; below 1, a share of the run. The schedule ``constant`` has no warm-up."""
    max_grad_norm: float = Field(1.0, gt=0)
    logging_steps: int = Field(1, ge=1)
    eval_steps: Share = 0.2
    """Evaluate on the held-out rows each time this share of the optimizer steps is done."""
    save_steps: Share = 0.2
    """Write a checkpoint each time this share of the optimizer steps is done."""
    gradient_checkpointing: bool = False
    """Keep no activations inside of layers and compute them again in backward: less memory, about a third more time."""
    torch_compile: bool = False
    """Compile the model (torch.compile): minutes at the start; for long runs on CUDA."""
    seed: int = Field(42, ge=0)

    @field_validator("warmup_steps")
    @classmethod
    def _whole_or_share(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("must be a whole number of steps, or a share below 1")
        return value

    def total_steps(self, rows: int, processes: int = 1) -> int:
        """Return the optimizer steps on ``rows`` rows in so many processes, as transformers counts them."""
        batches = math.ceil(rows / (self.per_device_train_batch_size * processes))
        steps_an_epoch = max(1, math.ceil(batches / self.gradient_accumulation_steps))
        return max(1, math.ceil(self.num_train_epochs * steps_an_epoch))

    def warmup_of(self, rows: int, processes: int = 1) -> int:
        """Return how many of these steps are warm-up."""
        if self.lr_scheduler_type == "constant":
            return 0
        steps = self.total_steps(rows, processes)
        return int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(self.warmup_steps * steps)

    def check_warmup(self, name: str, rows: int, processes: int = 1) -> None:
        """Refuse a warm-up that the run would never come out of: nothing would be learned at the rate asked for.

        Raises:
            ConfigError: warm-up takes all steps.
        """
        steps = self.total_steps(rows, processes)
        if self.warmup_steps >= 1 and self.warmup_of(rows, processes) >= steps:
            raise ConfigError(
                f"{name}.warmup_steps: {self.warmup_steps:.0f} of {steps} steps ({rows} rows{_in(processes)}) would be "
                "warm-up: the learning rate would never be reached. Give a share, such as 0.1"
            )


def _in(processes: int) -> str:
    return f" in {processes} processes" if processes > 1 else ""


class SFTConfig(StageConfig):
    """Supervised fine-tuning on the chosen answers."""

    num_train_epochs: float = Field(3, gt=0, le=1000)
    learning_rate: float = Field(3e-4, gt=0, lt=1)


class DPOConfig(StageConfig):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), from the SFT policy."""

    num_train_epochs: float = Field(1, gt=0, le=1000)
    learning_rate: float = Field(2e-6, gt=0, lt=1)
    beta: float = Field(0.5, gt=0, le=100)
    loss_type: Annotated[tuple[DPOLoss, ...], Field(min_length=1)] = ("sigmoid",)
    """One of TRL's losses, or several to be summed with ``loss_weights``."""
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    max_length: int | None = Field(None, ge=16)
    """Longest prompt plus answer, in tokens. None: half of ``base_model.max_seq_length``."""
    engine: Literal["auto", "shared_prompt", "trl"] = "auto"
    """shared_prompt runs each prompt once for both answers; auto takes it wherever the model's attention allows."""

    @field_validator("loss_type", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def length(self, base_model: BaseModelConfig) -> int:
        """Return the longest row in tokens: the recipe's ``max_length = max_seq_length // 2`` unless set."""
        return self.max_length or base_model.max_seq_length // 2


class TrackingConfig(Section):
    """Comet. Every metric also lies in a plain metrics.jsonl, whatever is chosen here."""

    mode: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online when COMET_API_KEY is set, else offline archives that `comet upload` takes later."""
    project: Text = "preference-tuning"
    workspace: Text | None = None
    tags: tuple[Text, ...] = ()
    log: tuple[Literal["code", "git", "environment", "output", "command_line"], ...] = ()
    """What Comet gets beside the run's own results; nothing of it unless it is named here."""


class RunConfig(Section):
    """One run: the ``parameters`` of the pipeline."""

    finetuning_type: Literal["sft", "dpo"] = "sft"
    output_dir: Place = "outputs"
    base_model: BaseModelConfig
    lora: LoraConfig | None = LoraConfig()
    """null trains every weight instead, kept in fp32: 16 bytes a parameter with AdamW, and a rate far below LoRA's."""
    data: DataConfig
    sft: SFTConfig = SFTConfig()
    dpo: DPOConfig = DPOConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    registry: RegistryConfig = RegistryConfig()
    tracking: TrackingConfig = TrackingConfig()
    retrain: RetrainConfig = RetrainConfig()
    notify: tuple[Receiver, ...] = ()
    """Who is told what became of a run."""

    def contradictions(self) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """Yield ``(path of the field, message)`` for settings that are fine alone and wrong together."""
        yield from _model_contradictions(self.base_model)
        if self.lora is None:
            yield from _full_contradictions(self.base_model)
        yield from self.data.contradictions(self.dpo.length(self.base_model))
        yield from _stage_contradictions("sft", self.sft)
        yield from _stage_contradictions("dpo", self.dpo)
        yield from _dpo_contradictions(self.dpo)
        yield from self.evaluation.contradictions()
        for place, message in self.registry.contradictions():
            yield ("registry", *place), message
        yield from self.training.contradictions(self.base_model.backend, self.base_model.load_in_4bit)
        yield from self.retrain.contradictions()
        if self.dpo.length(self.base_model) > self.base_model.max_seq_length:
            yield (
                ("dpo", "max_length"),
                f"{self.dpo.max_length} is more than base_model.max_seq_length ({self.base_model.max_seq_length})",
            )


def _model_contradictions(model: BaseModelConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    if model.source.endswith(".gguf") and model.load_in_4bit:
        yield ("base_model", "load_in_4bit"), "a GGUF file is already quantised; use the model's safetensors instead"
    if model.source.endswith(".gguf") and model.revision:
        yield ("base_model", "revision"), "a file has no revision; remove it"
    if model.device == "cpu" and model.backend == "unsloth":
        yield ("base_model", "backend"), "unsloth runs on CUDA only, and device is cpu"
    if model.device == "cpu" and model.load_in_4bit:
        yield ("base_model", "load_in_4bit"), "4-bit training needs CUDA, and device is cpu"
    if model.device == "cpu" and model.dtype == "float16":
        yield ("base_model", "dtype"), "float16 does not train on a CPU; use auto, bfloat16 or float32"
    if model.attention == "flash_attention_2" and model.device == "cpu":
        yield ("base_model", "attention"), "flash_attention_2 runs on CUDA only, and device is cpu"
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield ("base_model", "attention"), "flash_attention_2 has no float32; use dtype auto, bfloat16 or float16"
    if model.attention != "auto" and model.backend == "unsloth":
        yield ("base_model", "attention"), "unsloth brings its own attention; use auto"


def _stage_contradictions(name: str, stage: StageConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    asked_for = "warmup_steps" in stage.model_fields_set and stage.warmup_steps
    if asked_for and stage.lr_scheduler_type == "constant":
        yield (name, "warmup_steps"), "has no effect with lr_scheduler_type constant; use constant_with_warmup"


def _full_contradictions(model: BaseModelConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    if model.load_in_4bit:
        yield ("base_model", "load_in_4bit"), "4-bit weights do not train, and lora is null; give a lora section"
    if model.backend == "unsloth":
        yield ("base_model", "backend"), "unsloth trains adapters here, and lora is null; use transformers"


def _dpo_contradictions(dpo: DPOConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    losses = dpo.loss_type
    if dpo.label_smoothing and not SMOOTHED_LOSSES & set(losses):
        yield (
            ("dpo", "label_smoothing"),
            f"has no effect with loss_type {', '.join(losses)}; it acts in {', '.join(sorted(SMOOTHED_LOSSES))}",
        )
    if "exo_pair" in losses and not dpo.label_smoothing:
        yield ("dpo", "label_smoothing"), "must be above 0 with loss_type exo_pair (its paper uses 1e-3)"
    if dpo.loss_weights is not None and len(dpo.loss_weights) != len(losses):
        yield ("dpo", "loss_weights"), f"{len(dpo.loss_weights)} weights for {len(losses)} loss types"
