"""The sections of a run config, with their defaults: the LLM Engineer's Handbook's recipe.

Every default lives here and nowhere else. Field names are those of transformers and TRL where they have one.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from preference_tuning.errors import ConfigError

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Share = Annotated[float, Field(gt=0, lt=1)]

DPOLoss = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair",
    "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
]  # fmt: skip
SMOOTHED_LOSSES = {"robust", "exo_pair", "aot", "aot_unpaired"}
"""Where TRL 1.14.2 really applies ``label_smoothing`` (trl/trainer/dpo_trainer.py); elsewhere it ignores it."""


class Section(BaseModel):
    """A part of the run config: unknown keys are errors, values are fixed once read, nan and inf are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: Any) -> Any:
        # pydantic would take `beta: true` as 1.0, and `load_in_4bit: "no"` as False.
        annotation = str(cls.model_fields[info.field_name].annotation)
        wants_bool = "bool" in annotation
        if isinstance(value, bool) and not wants_bool:
            raise ValueError("true and false are not accepted here")
        if wants_bool and not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value


class BaseModelConfig(Section):
    """The model that is tuned, and how it is loaded."""

    source: Text
    """A hub id, a local directory, a .gguf file, or ``package:NAME/FILE`` for a file of an installed Python package."""
    revision: Text | None = None
    """Branch, tag or commit of a hub id; resolved to a commit before anything runs. None: the main branch."""
    backend: Literal["transformers", "unsloth"] = "transformers"
    """unsloth needs CUDA and the gpu extra; asked for where it cannot run, it is an error."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: bfloat16 where the hardware has it; else float16 on CUDA and float32 on a CPU."""
    load_in_4bit: bool = False
    """Quantise the frozen weights to 4 bits with bitsandbytes (QLoRA); CUDA only."""
    max_seq_length: int = Field(2048, ge=16, le=1_048_576)
    """Longest row, in tokens, that SFT trains on."""
    chat_template: Text | None = None
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
            raise ValueError("lm_head cannot be adapted: the engine applies the frozen head to answer tokens only")
        return tuple(sorted(set(modules)))


Loss = Literal["drop", "error"]
"""What happens to a row that cannot be trained on."""
Policy = Literal["keep", "drop", "error"]
"""What happens to a row that could be trained on and perhaps should not."""

Format = Literal[
    "pairs", "transcripts", "chatml", "separated", "safe_rlhf", "shp", "halos", "helpsteer", "alpaca_eval", "arena",
    "completions", "ranked_outputs", "unpaired",
]  # fmt: skip
SFTFormat = Literal["messages", "instruction", "completion"]


class Columns(Section):
    """Which columns of a source hold what; a name given here always wins over what would be recognised."""

    prompt: Text | None = None
    context: Text | None = None
    """What the prompt is about, put below it: the `input` of instruction data."""
    system: Text | None = None
    history: Text | None = None
    """Earlier turns, as messages or as a list of [question, answer]."""
    tools: Text | None = None
    chosen: Text | None = None
    rejected: Text | None = None
    first: Text | None = None
    """The first of two answers of which `label` says the better one."""
    second: Text | None = None
    label: Text | None = None
    completions: Text | None = None
    """A list of answers to one prompt."""
    completion: Text | None = None
    """The one answer of an unpaired row."""
    score: Text | None = None
    """The field of a completion by which the answers are ranked."""
    margin: Text | None = None
    chosen_score: Text | None = None
    rejected_score: Text | None = None
    group: Text | None = None
    """Rows of one group stay on one side of the split. None: rows of one prompt."""
    source: Text | None = None
    topic: Text | None = None
    split: Text | None = None
    """A column whose value (train, test, validation, ...) says on which side a row is."""


class Origin(Section):
    """Where rows come from."""

    source: Text
    """A .jsonl, .json, .csv or .parquet file (text forms also as .gz or .zst), a directory saved by datasets, a hub id,
    or, with ``allow_urls``, the http(s) address of such a file."""
    revision: Text | None = None
    """Branch, tag or commit of a hub id; resolved to a commit before anything runs. None: the main branch."""
    split: Text = "train"
    """The split to read from a hub id or from a saved DatasetDict."""
    records: Text | None = None
    """Path of the list of rows inside a JSON file, such as ``data.train``. None: the only list of objects there is."""
    weight: float = Field(1.0, gt=0, le=1)
    """Share of the source's prompts that is used, decided by a keyed hash of each prompt."""
    name: Text | None = None
    """What the report calls the source. None: its file name or hub id."""


class SourceConfig(Origin):
    """A source of preferences, and how its rows are read."""

    test_split: Text = "auto"
    """The source's own held-out split, used instead of cutting one off. auto: the one that belongs to ``split``, if
    there is one; none: do not use it."""
    format: Format | None = None
    """None: recognised by the names and shapes of the columns."""
    columns: Columns = Columns()
    separator: Text | None = None
    """What ends the prompt in two texts that both begin with it, such as ``Answer:`` (format separated)."""


class SFTSourceConfig(Origin):
    """Answers for the SFT stage, in place of the chosen ones."""

    format: SFTFormat | None = None
    """messages: conversations that end with an answer (ShareGPT's too); instruction: instruction, input, output;
    completion: prompt, completion. None: recognised by the columns."""


class Problems(Section):
    """What to do with a row that has a problem. Dropped rows count towards ``data.max_dropped``, ties apart."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    missing: Loss = "drop"
    """a field is missing or null"""
    blank: Loss = "drop"
    """a field holds only white space"""
    not_text: Loss = "drop"
    """a field holds something that is not text"""
    too_large: Loss = "drop"
    """the row is larger than data.max_row_bytes"""
    role_order: Loss = "drop"
    """the turns are in the wrong order"""
    diverging: Loss = "drop"
    """the two conversations part before the last turn"""
    tie: Loss = "drop"
    """the source states no preference"""
    unpaired: Loss = "drop"
    """an answer without one of the opposite label for its prompt"""
    identical: Loss = "drop"
    """chosen equals rejected"""
    identical_folded: Policy = "drop"
    """chosen and rejected differ only in white space or case"""
    identical_after_cut: Policy = "drop"
    """chosen equals rejected once both are cut to max_length"""
    long_prompt: Literal["keep_end", "drop", "error"] = "drop"
    """the prompt is longer than data.max_prompt_length, or leaves no room for an answer; keep_end cuts its beginning"""
    answer_cut: Policy = "keep"
    """an answer is cut by max_length and loses its end"""
    special_tokens: Policy = "drop"
    """the text holds a special token of the chat template, which would act as one"""
    control_characters: Policy = "drop"
    """the text holds control characters"""
    no_tools: Policy = "drop"
    """the row uses tools, and the chat template does not show them to the model"""
    duplicate: Policy = "drop"
    """the same pair again"""
    contradiction: Policy = "drop"
    """the same two answers to the same prompt are also preferred the other way round"""
    leak: Loss = "drop"
    """a training row whose prompt is among the held-out ones"""
    near_duplicate: Policy = "drop"
    """a training row whose prompt is nearly one of the held-out ones"""


class DataConfig(SourceConfig):
    """The preference data: its sources, what to do with rows that have a problem, and the split."""

    source: Text | None = None  # type: ignore[assignment]
    """As in ``SourceConfig``; or several of them under ``sources``."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources, mixed."""
    sft_source: SFTSourceConfig | None = None
    """None: SFT trains on the chosen answers."""
    allow_urls: bool = False
    """Whether a source may be an http(s) address."""
    pairing: Literal["best_worst", "all"] = "best_worst"
    """Of several ranked answers to a prompt: best against worst, or every better one against every worse one."""
    problems: Problems = Problems()
    max_dropped: float = Field(0.05, ge=0, le=1)
    """Largest share of rows that may be dropped before the run stops."""
    max_row_bytes: int = Field(1_000_000, ge=100, le=100_000_000)
    max_prompt_length: int | None = Field(None, ge=1)
    """Longest prompt, in tokens; it never takes room from an answer. None: whatever leaves room for an answer."""
    near_duplicates: bool = True
    """Look for prompts that are nearly the same (MinHash); half a millisecond a prompt."""
    near_duplicate_similarity: float = Field(0.9, gt=0, le=1)
    """Jaccard similarity of the prompts' three-word sequences from which on they are nearly the same."""
    held_out: Share = 0.05
    """Share of the prompts kept from training for evaluation, decided by a keyed hash of each prompt."""
    seed: int = Field(42, ge=0)

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """Return the sources, one or several, in the same form."""
        if self.sources:
            return self.sources
        return (SourceConfig(**self.model_dump(include=set(SourceConfig.model_fields))),)


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
    """Optimizer steps; below 1, a share of the run."""
    max_grad_norm: float = Field(1.0, gt=0)
    logging_steps: int = Field(1, ge=1)
    eval_steps: Share = 0.2
    """Evaluate on the held-out rows each time this share of the optimizer steps is done."""
    save_steps: Share = 0.2
    """Write a checkpoint each time this share of the optimizer steps is done."""
    gradient_checkpointing: bool = False
    seed: int = Field(42, ge=0)

    @field_validator("warmup_steps")
    @classmethod
    def _whole_or_share(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("must be a whole number of steps, or a share below 1")
        return value

    def total_steps(self, rows: int) -> int:
        """Return the optimizer steps on ``rows`` rows in one process, as transformers counts them."""
        batches = math.ceil(rows / self.per_device_train_batch_size)
        steps_an_epoch = max(1, math.ceil(batches / self.gradient_accumulation_steps))
        return max(1, math.ceil(self.num_train_epochs * steps_an_epoch))

    def warmup_of(self, rows: int) -> int:
        """Return how many of these steps are warm-up."""
        steps = self.total_steps(rows)
        return int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(self.warmup_steps * steps)

    def check_warmup(self, name: str, rows: int) -> None:
        """Refuse a warm-up that the run would never come out of: nothing would be learned at the rate asked for.

        Raises:
            ConfigError: warm-up takes all steps.
        """
        steps = self.total_steps(rows)
        if self.warmup_steps >= 1 and self.warmup_steps >= steps:
            raise ConfigError(
                f"{name}.warmup_steps: {self.warmup_steps:.0f} of {steps} steps ({rows} rows) would be warm-up: the "
                "learning rate would never be reached. Give a share, such as 0.1"
            )


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


class EvaluationConfig(Section):
    """Scoring on the held-out pairs, and the rules of the verdict."""

    batch_size: int = Field(8, ge=1)
    samples: int = Field(6, ge=0, le=64)
    """Held-out prompts answered by every model, side by side."""
    max_new_tokens: int = Field(96, ge=1, le=4096)
    min_pairs: int = Field(30, ge=1)
    """Fewer held-out pairs than this leave the verdict inconclusive."""
    min_accuracy: float = Field(0.5, ge=0, lt=1)
    """The lower end of the 95 % interval of the reward accuracy must lie above this."""
    max_nll_increase: float = Field(0.2, ge=0)
    """Nats a token: the upper end of the interval of the chosen answers' NLL increase must not exceed this."""
    champion_tolerance: float = Field(0.02, ge=0, lt=1)
    """A challenger may be below the champion's reward accuracy by at most this, at the interval's lower end."""
    seed: int = Field(42, ge=0)


class RegistryConfig(Section):
    """Where results become versions."""

    folder: Text = "outputs/registry"
    name: Name = "preference-tuned"


class TrackingConfig(Section):
    """Comet. Every metric also lies in a plain metrics.jsonl, whatever is chosen here."""

    mode: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online when COMET_API_KEY is set, else offline archives that `comet upload` takes later."""
    project: Text = "preference-tuning"
    workspace: Text | None = None
    tags: tuple[Text, ...] = ()


class RunConfig(Section):
    """One run: the ``parameters`` of the pipeline."""

    finetuning_type: Literal["sft", "dpo"] = "sft"
    output_dir: Text = "outputs"
    base_model: BaseModelConfig
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    sft: SFTConfig = SFTConfig()
    dpo: DPOConfig = DPOConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    registry: RegistryConfig = RegistryConfig()
    tracking: TrackingConfig = TrackingConfig()

    def contradictions(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield ``(path of the field, message)`` for settings that are fine alone and wrong together."""
        yield from _model_contradictions(self.base_model)
        yield from _data_contradictions(self.data, self.dpo.length(self.base_model))
        yield from _dpo_contradictions(self.dpo)
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


def _data_contradictions(data: DataConfig, max_length: int) -> Iterator[tuple[tuple[str, ...], str]]:
    if data.source is None and not data.sources:
        yield ("data", "source"), "is required: one source here, or several under data.sources"
    if data.sources:
        given = sorted(set(SourceConfig.model_fields) & data.model_fields_set)
        if given:
            yield ("data", given[0]), "belongs to each of data.sources, when there are several"
        names = [source.name or source.source for source in data.sources]
        if len(set(names)) < len(names):
            yield ("data", "sources"), "two of them are called the same; give each a name"
    for source in data.all_sources() if data.source or data.sources else ():
        if source.format == "separated" and source.separator is None:
            yield ("data", "separator"), "is needed with format separated: the text that ends the prompt"
    if data.max_prompt_length and data.max_prompt_length > max_length:
        yield (
            ("data", "max_prompt_length"),
            f"{data.max_prompt_length} is more than a whole DPO row may have (dpo.max_length, {max_length})",
        )


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
