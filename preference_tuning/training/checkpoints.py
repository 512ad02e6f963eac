"""Checkpoints that can be trusted: sealed with a manifest of hashes, and only verified ones are resumed from."""

import json
from pathlib import Path

from preference_tuning import fingerprint, jobs
from preference_tuning.models import weights

SEAL = "MANIFEST.json"
NEEDED = ("optimizer.pt", "scheduler.pt", "trainer_state.json")
"""Beside the weights, whose files depend on whether they are an adapter's or a full model's."""
SHARDED = {"optimizer.pt": "optimizer.bin"}
"""What a file is called when the weights are shared out over several processes."""


def seal(checkpoint: Path) -> None:
    """Write the manifest of a complete checkpoint; a folder without one is never resumed from."""
    jobs.write_json(checkpoint / SEAL, fingerprint.manifest(checkpoint, skip=[SEAL]))


def problem(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be resumed from, or None if every byte is as it was sealed."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "it was not finished (no readable manifest)"
    found = fingerprint.manifest(checkpoint, skip=[SEAL])
    if changed := sorted(name for name in sealed if found.get(name) != sealed[name]):
        return f"changed since it was written: {', '.join(changed)}"
    needed = (*weights.files(checkpoint), *NEEDED)
    missing = [name for name in needed if not {name, SHARDED.get(name)} & sealed.keys()]
    return f"it has no {', no '.join(missing)}" if missing else None


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and a line for each newer one that does not."""
    rejected: list[str] = []
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        reason = problem(checkpoint)
        if reason is None:
            return checkpoint, rejected
        rejected.append(f"{checkpoint.name}: {reason}")
    return None, rejected


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step in a checkpoint's name."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
