"""How a version is introduced elsewhere: its role, its description and its labels, the same in every registry."""

from pathlib import Path
from typing import Literal

from preference_tuning import fingerprint
from preference_tuning.registry.folder import CARD, FolderRegistry, Version

Role = Literal["champion", "previous", "challenger"]
LONGEST = 1000


def roles(registry: FolderRegistry) -> dict[Role, str]:
    """Return which version plays which role; a role that nobody plays is left out.

    The challenger is the newest version since the champion was made, whatever its verdict.
    """
    made = {version: registry.version(version).created for version in registry.ids()}
    pointers: dict[Role, str] = {}
    if (champion := registry.champion()) is not None and champion.version in made:
        pointers["champion"] = champion.version
    if (previous := registry.previous()) is not None and previous.version in made:
        pointers["previous"] = previous.version
    since = made.get(pointers.get("champion", ""))
    later = [it for it in made if it not in pointers.values() and (since is None or made[it] > since)]
    return {**pointers, "challenger": max(later, key=made.__getitem__)} if later else pointers


def description(model: Path) -> str:
    """Return the first paragraphs of the card in a model's folder, without its metadata and headings."""
    text = (model / CARD).read_text(encoding="utf-8")
    body = text.split("\n---\n", 1)[1] if text.startswith("---\n") and "\n---\n" in text else text
    prose: list[str] = []
    for paragraph in body.split("\n\n"):
        lines = [line for line in paragraph.strip().splitlines() if not line.startswith("# ")]
        if lines and lines[0].startswith(("##", "|", "```", "- ")):
            break
        prose += [" ".join(lines)] if lines else []
    return "\n\n".join(prose[:3])[:LONGEST]


def labels(version: Version) -> dict[str, str]:
    """Return what tells a version from others and says where it came from."""
    return {
        "version": version.id,
        "digest": fingerprint.of_value(version.model_files),
        "finetuning_type": version.finetuning_type,
        "base_model": str(version.base_model["source"]),
        "base_model_fingerprint": str(version.base_model["fingerprint"]),
        "data_fingerprint": str(version.data["fingerprint"]),
        "verdict": version.verdict.decision,
        **{name: value for name, value in version.run.items() if value},
    }
