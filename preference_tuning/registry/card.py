"""The model card of a version, with the metadata block that model hubs read."""

import yaml

from preference_tuning.config import BaseModelConfig
from preference_tuning.data.table import Manifest
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
    names = list(dict.fromkeys(name for figures in evaluation.models.values() for name in figures))
    header = ["| figure | " + " | ".join(evaluation.models) + " |", "|---|" + "---|" * len(evaluation.models)]
    rows = [
        f"| {name} | " + " | ".join(str(f[name]) if name in f else "" for f in evaluation.models.values()) + " |"
        for name in names
    ]
    return ["Every figure with its 95 % interval.", "", *header, *rows]


def _provenance(records: dict[str, TrainingRecord], manifest: Manifest, evaluation: Evaluation) -> list[str]:
    lines = [
        f"- data: `{manifest.source}`, fingerprint `{manifest.fingerprint}`",
        f"- base model: `{evaluation.base_model_fingerprint}`",
        f"- chat template: `{evaluation.template_hash}`",
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
