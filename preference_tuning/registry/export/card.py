"""The README of an export: the metadata of the version's own card, and what was made of it."""

from pathlib import Path
from typing import Any

import yaml

from preference_tuning.models import weights
from preference_tuning.registry.export.merge import Merged
from preference_tuning.registry.export.reading import Found
from preference_tuning.registry.folder import CARD as CARD
from preference_tuning.registry.folder import Version


def of_merged(version_folder: Path, version: Version, outtype: str, came: Merged) -> str:
    """Return the card of a merged model."""
    usage = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")',
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)  # with the chat template of the training",
    ]
    kind = {"library_name": "transformers", "base_model_relation": "finetune"}
    lines = ["`FOLDER` is the folder of this card.", "", "```python", *usage, "```"]
    return _card(version_folder, version, outtype, came, kind, lines)


def of_gguf(
    version_folder: Path, version: Version, outtype: str, came: Merged, found: Found, file: str, ollama: bool
) -> str:
    """Return the card of a GGUF file, with or without a Modelfile beside it."""
    kind = {"library_name": "gguf", "base_model_relation": "quantized"}
    lines = [
        f"`{file}`: {outtype}, architecture `{found.architecture}`, {found.tensors} tensors, a vocabulary of "
        f"{found.vocabulary}, with the chat template of the training.",
    ]
    if ollama:
        lines += ["", "```", f"ollama create {version.name} -f Modelfile", f"ollama run {version.name}", "```"]
    return _card(version_folder, version, outtype, came, kind, lines)


def _card(
    version_folder: Path, version: Version, outtype: str, came: Merged, kind: dict[str, str], usage: list[str]
) -> str:
    metadata = {**_metadata(version_folder / "model" / CARD), **kind}
    metadata["tags"] = [tag for tag in metadata.get("tags", []) if tag != "lora"]
    source = version.base_model["source"]
    how = (
        f"its LoRA adapter merged into `{source}` in fp32 and rounded once"
        if weights.is_adapter(version_folder / "model")
        else f"every weight of `{source}` trained, and rounded once"
    )
    lines = [
        f"# {version.name}, whole, in {outtype}",
        "",
        f"Version `{version.id}` of `{version.name}` as one model of {came.parameters:,} parameters: {how}.",
        "",
        f"Verdict on the version: **{version.verdict.decision}** ({version.verdict.reason}). Its figures, and what it "
        "was trained on, are in the card of the version.",
        "",
        *usage,
        "",
        f"- base model: `{version.base_model['fingerprint']}`",
        f"- the model before it was put into this form: {came}",
    ]
    if came.quantised_base:
        lines.append(
            "- the adapter learned on the base model in 4 bits and is merged into the whole one: answers may differ"
        )
    return "\n".join(["---", yaml.safe_dump(metadata, sort_keys=True).strip(), "---", *lines, ""])


def _metadata(path: Path) -> dict[str, Any]:
    """Return the metadata block of a card, empty where there is none."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    block = text.split("---\n", 2)[1] if text.startswith("---\n") else ""
    found = yaml.safe_load(block)
    return found if isinstance(found, dict) else {}
