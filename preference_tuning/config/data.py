"""The data section of a run config: sources, formats, problems of rows, the split."""

from collections.abc import Iterator
from typing import Literal

from pydantic import ConfigDict, Field

from preference_tuning.config.place import Source
from preference_tuning.config.section import Section, Share, Text

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

    source: Source
    """A .jsonl, .json, .csv or .parquet file (text forms also as .gz or .zst), a directory saved by datasets, a hub id,
    or, with ``allow_urls``, the http(s) address of such a file; ``env:NAME``: what the environment variable holds."""
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

    source: Source | None = None  # type: ignore[assignment]
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
    """Look for prompts that are nearly the same (MinHash); about 0.3 ms a prompt."""
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

    def contradictions(self, max_length: int) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield ``(path of the field, message)`` for settings that are fine alone and wrong together."""
        if self.source is None and not self.sources:
            yield ("data", "source"), "is required: one source here, or several under data.sources"
        if self.sources:
            given = sorted(set(SourceConfig.model_fields) & self.model_fields_set)
            if given:
                yield ("data", given[0]), "belongs to each of data.sources, when there are several"
            names = [source.name or source.source for source in self.sources]
            if len(set(names)) < len(names):
                yield ("data", "sources"), "two of them are called the same; give each a name"
        for source in self.all_sources() if self.source or self.sources else ():
            if source.format == "separated" and source.separator is None:
                yield ("data", "separator"), "is needed with format separated: the text that ends the prompt"
        if self.max_prompt_length and self.max_prompt_length > max_length:
            yield (
                ("data", "max_prompt_length"),
                f"{self.max_prompt_length} is more than a whole DPO row may have (dpo.max_length, {max_length})",
            )
