"""The model card of a version, with the metadata block that model hubs read."""

import yaml

from preference_tuning.config import BaseModelConfig
from preference_tuning.data.table import Manifest
from preference_tuning.evaluation import catalogue
from preference_tuning.evaluation.gate import Verdict
from preference_tuning.evaluation.job import Evaluation
from preference_tuning.training.job import TrainingRecord


def render(
    base_model: BaseModelConfig,
    evaluation: Evaluation,
    verdict: Verdict,
    records: dict[str, TrainingRecord],
    manifest: Manifest,
    name: str,
    adapter: bool,
) -> str:
    """Return the card as Markdown; ``adapter`` tells an adapter from a full model."""
    metadata = {
        "base_model": base_model.source,
        "base_model_relation": "adapter" if adapter else "finetune",
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*(["lora"] if adapter else []), "preference-tuning", *records],
    }
    what = (
        f"A LoRA adapter for `{base_model.source}`" if adapter else f"`{base_model.source}` with every weight trained"
    )
    stages = " then ".join(stage.upper() for stage in records)
    return "\n".join(
        [
            "---",
            yaml.safe_dump(metadata, sort_keys=True).strip(),
            "---",
            f"# {name}",
            "",
            f"{what}, tuned by {stages} on {manifest.train} preference pairs of "
            f"`{manifest.source}` and measured on {evaluation.pairs} held-out pairs.",
            "",
            f"Verdict: **{verdict.decision}** ({verdict.reason}).",
            "",
            *_usage(base_model, adapter),
            "",
            *_figures(evaluation),
            "",
            *_provenance(records, manifest, evaluation),
            "",
        ]
    )


def _usage(base_model: BaseModelConfig, adapter: bool) -> list[str]:
    """Return how the folder that the card lies in is loaded."""
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if adapter:
        at = f", revision={base_model.revision!r}" if base_model.revision else ""
        lines = ["from peft import PeftModel", *lines]
        lines += [
            f"base = AutoModelForCausalLM.from_pretrained({base_model.source!r}{at})",
            "model = PeftModel.from_pretrained(base, FOLDER)",
        ]
    else:
        lines.append('model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")  # fp32, as trained')
    lines.append("tokenizer = AutoTokenizer.from_pretrained(FOLDER)  # with the chat template of the training")
    return ["`FOLDER` is the folder of this card.", "", "```python", *lines, "```"]


def _figures(evaluation: Evaluation) -> list[str]:
    """Return the main figures of every model, and what got worse."""
    titles = [catalogue.title(model, evaluation.champion) for model in evaluation.models]
    rows = [
        [f"{words} (`{name}`)", *(catalogue.in_line(name, f.get(name)) for f in evaluation.models.values())]
        for name, words in catalogue.main(evaluation.models).items()
    ]
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (["figure", *titles], *rows)]
    worse = [f"- {sentence}" for sentence in evaluation.worse] or ["- nothing"]
    return [
        "Figures on the held-out pairs with their 95 % intervals; the evidence has all of them in `evaluation.json`.",
        "",
        table[0],
        "|---|" + "---|" * len(titles),
        *table[1:],
        "",
        f"What got worse in `{evaluation.terms.candidate}`:",
        "",
        *worse,
    ]


def _provenance(records: dict[str, TrainingRecord], manifest: Manifest, evaluation: Evaluation) -> list[str]:
    lines = [
        f"- data: `{manifest.source}`, fingerprint `{manifest.fingerprint}`",
        f"- base model: `{evaluation.base_model_fingerprint}`",
        f"- chat template: `{evaluation.template_hash}`",
        f"- seal of the verdict, its figures and what they stand on: `{evaluation.seal}`",
    ]
    for stage, record in records.items():
        ran_on = f"{record.compute.dtype} on {record.compute.device}"
        lines.append(f"- {stage}: {record.steps} steps, {ran_on}, weights `{record.adapter_hash}`")
        if record.reference:
            lines.append(
                f"- the DPO reference is the SFT policy: loss {record.reference.loss:.6f} before the first update, "
                f"log-probabilities equal to {record.reference.largest_difference:.3g} nats"
            )
    return lines
