"""The model card of a version, with the metadata block that model hubs read.

Written with huggingface_hub's own classes; its ``validate`` and ``push_to_hub`` ask a server and are not called.
"""

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from preference_tuning.config import BaseModelConfig
from preference_tuning.data.table import Manifest
from preference_tuning.evaluation import catalogue
from preference_tuning.evaluation.gate import Verdict
from preference_tuning.evaluation.job import Evaluation
from preference_tuning.models.source import PACKAGE_PREFIX, ModelSource
from preference_tuning.reports import markdown
from preference_tuning.reports.markdown import code, plain
from preference_tuning.training.job import TrainingRecord

TASK = "text-generation"
SPOKEN = "Hello!"
"""What the example says to the model."""


@dataclass(frozen=True)
class Card:
    """Everything that a card tells."""

    name: str
    adapter: bool
    """An adapter, else a full model."""
    base_model: BaseModelConfig
    """Portable, and a hub id at its commit."""
    source: ModelSource
    licence: str | None
    languages: list[str]
    datasets: list[str]
    """The data's sources that are hub ids."""
    manifest: Manifest
    records: dict[str, TrainingRecord]
    evaluation: Evaluation
    verdict: Verdict
    software: dict[str, str | bool | None]
    links: dict[str, str]
    charts: Collection[str]
    """Names of files beside the card."""

    @property
    def on_hub(self) -> bool:
        """Whether the base model is one of a hub."""
        return self.source.kind == "hub"


def render(card: Card) -> str:
    """Return the card as Markdown."""
    sections = {
        "How it is loaded": _usage(card),
        "How it was trained": _training(card),
        "Figures": _figures(card),
        "What got worse": [f"- {plain(line)}" for line in card.evaluation.worse] or ["Nothing that was measured."],
        "Verdict": _verdict(card.verdict),
        "Limits": [f"- {line}" for line in _limits(card)],
        "Where it comes from": _provenance(card),
        "Licence": [_licence(card)],
    }
    body = "\n\n".join("\n".join([f"## {title}", "", *lines]) for title, lines in sections.items())
    return f"---\n{_metadata(card)}\n---\n# {card.name}\n\n{_what(card)}\n\n{body}\n"


def _metadata(card: Card) -> str:
    from huggingface_hub import ModelCardData

    base = {"base_model": card.base_model.source, "base_model_relation": "adapter" if card.adapter else "finetune"}
    data = ModelCardData(
        license=card.licence,
        language=card.languages or None,
        library_name="peft" if card.adapter else "transformers",
        pipeline_tag=TASK,
        datasets=card.datasets or None,
        tags=[*(["lora"] if card.adapter else []), "preference-tuning", *card.records],
        model_name=card.name,
        eval_results=list(_results(card)) or None,
        **(base if card.on_hub else {}),
    )
    return str(data.to_yaml())


def _results(card: Card) -> Iterator[object]:
    """Yield the main figures of the model itself, as a hub shows them beside the card."""
    from huggingface_hub import EvalResult

    candidate = card.evaluation.models[card.evaluation.terms.candidate]
    for name, words in catalogue.main({"": candidate}).items():
        if math.isfinite(candidate[name].value):
            yield EvalResult(
                task_type=TASK,
                dataset_type=card.datasets[0] if len(card.datasets) == 1 else "preference-pairs",
                dataset_name=f"held-out pairs of {card.manifest.source}",
                metric_type=name,
                metric_value=float(f"{candidate[name].value:.6g}"),
                metric_name=words,
            )


def _what(card: Card) -> str:
    base = code(card.base_model.source)
    what = f"A LoRA adapter for {base}" if card.adapter else f"{base} with every weight trained"
    stages = " then ".join(stage.upper() for stage in card.records)
    return (
        f"{what}, tuned by {stages} on {card.manifest.train} preference pairs of {code(card.manifest.source)} and "
        f"measured on {card.evaluation.pairs} held-out pairs. Verdict: **{card.verdict.decision}** "
        f"({plain(card.verdict.reason)})."
    )


def _usage(card: Card) -> list[str]:
    """Return code that runs as it is in the card's folder, once the base model is at hand."""
    load = "AutoModelForCausalLM.from_pretrained"
    lines = ['FOLDER = "."  # of this card, or its id on a hub']
    if not card.adapter:
        lines.append(f'model = {load}(FOLDER, dtype="auto")')
    else:
        lines += [*_base(card, load), "model = PeftModel.from_pretrained(base, FOLDER)"]
    path = ["from pathlib import Path", ""] if card.adapter and card.source.kind == "gguf" else []
    return [
        "```python",
        *path,
        *(["from peft import PeftModel"] if card.adapter else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        *lines,
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)  # with the chat template of the training",
        "",
        f'messages = [{{"role": "user", "content": "{SPOKEN}"}}]',
        "prompt = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ")",
        "answer = model.generate(**prompt, max_new_tokens=64)",
        'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
    ]


def _base(card: Card, load: str) -> list[str]:
    """Return how the base model is loaded; where it lies on a machine is for that machine's user to say."""
    source = card.base_model.source
    if card.on_hub:
        return [f'base = {load}({_quoted(source)}, revision={_quoted(str(card.base_model.revision))}, dtype="auto")']
    if card.source.kind == "directory":
        return [f"BASE = {_quoted(source)}  # the folder of the base model", f'base = {load}(BASE, dtype="auto")']
    of = "the base model"
    if source.startswith(PACKAGE_PREFIX):
        of, _, source = source.removeprefix(PACKAGE_PREFIX).partition("/")
        of = f"the Python package {of}"
    return [
        f"BASE = Path({_quoted(source)})  # the file of {of}",
        f"base = {load}(BASE.parent, gguf_file=BASE.name)",
    ]


def _quoted(text: str) -> str:
    """Return a text as Python writes it, in one line of code that ends where the text does."""
    return json.dumps(text)


def _training(card: Card) -> list[str]:
    lines = []
    for stage, record in card.records.items():
        settings = record.identity.get(stage) or {}
        rate = settings.get("learning_rate")
        told = [
            f"{record.steps} steps, {record.epochs:g} times through {record.rows} rows",
            *([f"learning rate {rate:g}"] if rate is not None else []),
            *([f"beta {settings['beta']:g}, loss {'+'.join(settings['loss_type'])}"] if stage == "dpo" else []),
            f"{record.compute.dtype} on {record.compute.device}, {record.seconds:.0f} s",
        ]
        lines.append(f"- {stage.upper()}: {'; '.join(map(plain, told))}")
        if record.reference:
            lines.append(
                f"- The DPO reference is the SFT policy: loss {record.reference.loss:.6f} before the first update, "
                f"log-probabilities equal to {record.reference.largest_difference:.3g} nats"
            )
    lora = next((r.identity.get("lora") for r in card.records.values() if r.identity.get("lora")), None)
    if lora:
        lines.append(
            f"- LoRA: rank {lora['rank']}, alpha {lora['alpha']:g}, on {plain(', '.join(lora['target_modules']))}"
        )
    return [*lines, *_pictures(card, tuple(card.records))]


def _figures(card: Card) -> list[str]:
    """Return the main figures of every model."""
    evaluation = card.evaluation
    titles = [plain(catalogue.title(model, evaluation.champion)) for model in evaluation.models]
    rows = [
        [
            f"{plain(words)} ({code(name)})",
            *(plain(catalogue.in_line(name, f.get(name))) for f in evaluation.models.values()),
        ]
        for name, words in catalogue.main(evaluation.models).items()
    ]
    return [
        "On the held-out pairs, with 95 % intervals; the registry's evidence has all of them in `evaluation.json`.",
        "",
        *markdown.table(["figure", *titles], rows),
        *_pictures(card, ("evaluation",)),
    ]


def _pictures(card: Card, kinds: tuple[str, ...]) -> list[str]:
    shown = [name for name in card.charts if name.rpartition("/")[2].startswith(tuple(f"{kind}-" for kind in kinds))]
    return ["", *(f"![{name.rpartition('/')[2].removesuffix('.svg')}]({name})" for name in shown)] if shown else []


def _verdict(verdict: Verdict) -> list[str]:
    rows = [[plain(rule.name), plain(rule.measured), plain(rule.wanted), rule.outcome] for rule in verdict.rules]
    return [
        f"**{verdict.decision}**: {plain(verdict.reason)}.",
        *(["", *markdown.table(["rule", "measured", "wanted", "outcome"], rows)] if rows else []),
    ]


def _limits(card: Card) -> Iterator[str]:
    yield (
        f"The figures are of {card.evaluation.pairs} held-out pairs of the data that it was trained on. They say "
        "nothing of other tasks, and nothing of whether its answers are true or safe."
    )
    measured = catalogue.measured(card.evaluation.models)
    if "general/nll" not in measured:
        yield "What it forgot of general text was not measured."
    if not any(name.startswith("judge/") for name in measured):
        yield "No judge compared its answers; the preference figures are of likelihoods."
    if card.source.kind == "gguf":
        yield "The base model is a quantised GGUF file: its weights are rounded, and so is what they can learn."
    yield from (plain(note) for note in card.evaluation.notes)


def _provenance(card: Card) -> list[str]:
    evaluation, manifest = card.evaluation, card.manifest
    at = "commit" if card.on_hub else "sha256"
    lines = [
        f"- base model: {code(card.base_model.source)}, {at} {code(card.source.fingerprint)}",
        f"- data: {code(manifest.source)}, {manifest.train} pairs to train on and {manifest.held_out} held out, "
        f"fingerprint {code(manifest.fingerprint)}, with the split {code(manifest.split_fingerprint)}",
        f"- chat template: {code(evaluation.template_hash)}",
        *(f"- weights after {stage.upper()}: {code(record.adapter_hash)}" for stage, record in card.records.items()),
        f"- seal of the verdict, its figures and what they stand on: {code(evaluation.seal)}",
    ]
    modified = ", with changes" if card.software.get("modified") else ""
    made = [
        f"{name} {value}{modified if name == 'commit' else ''}"
        for name, value in card.software.items()
        if value and name != "modified"
    ]
    return [
        *lines,
        f"- software: {plain(', '.join(made))}",
        *(f"- {name}: {_linked(at)}" for name, at in card.links.items()),
    ]


def _linked(place: str) -> str:
    return f"<{place}>" if place.startswith("https://") and not set(place) & set("<> ") else code(place)


def _licence(card: Card) -> str:
    if card.licence is None:
        return "Not known: the base model does not say. Find out before you pass the model on."
    return f"{code(card.licence)}. The licence of the data is its own."
