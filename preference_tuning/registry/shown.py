"""The registry on a screen, or as JSON: every version in a table, and all of one."""

from collections.abc import Iterator
from typing import Any

from preference_tuning.evaluation import catalogue
from preference_tuning.evaluation.screen import entry
from preference_tuning.evaluation.statistics import Figure
from preference_tuning.registry import operations
from preference_tuning.registry.folder import Champion, FolderRegistry, Version
from preference_tuning.registry.operations import Judged
from preference_tuning.registry.pointers import Pointer
from preference_tuning.registry.pushing import Receipt

KEY = "rewards/accuracies"
HEADINGS = ("VERSION", "CREATED (UTC)", "TYPE", "BASE MODEL", "REWARD ACCURACY", "VERDICT", "NOW", "PUSHES")


def overview(registry: FolderRegistry) -> dict[str, Any]:
    """Return the pointers and every version, the newest first, as JSON-like values."""
    champion, previous = registry.champion(), registry.previous()
    versions = sorted(map(registry.version, registry.ids()), key=lambda version: version.created, reverse=True)
    return {
        "registry": registry.place,
        "name": registry.name,
        "champion": champion and champion.model_dump(mode="json"),
        "previous": previous and previous.model_dump(mode="json", include=set(Pointer.model_fields)),
        "versions": [_row(registry, version, champion, previous) for version in versions],
    }


def table(registry: FolderRegistry) -> str:
    """Return every version, one a line, the newest first."""
    found = overview(registry)
    if not found["versions"]:
        return f"{registry.name}: no versions in {registry.place}"
    rows = [HEADINGS, *(_cells(row) for row in found["versions"])]
    return "\n".join([f"{registry.name} in {registry.place}", "", *_aligned(rows)])


def document(registry: FolderRegistry, name: str) -> dict[str, Any]:
    """Return all that is known of a version, as JSON-like values.

    Raises:
        ConfigError: there is no such version.
    """
    version = registry.version(operations.find(registry, name))
    return {
        "registry": registry.place,
        "state": _state(version.id, registry.champion(), registry.previous()),
        "manifest": version.model_dump(mode="json"),
        "verdicts": [
            {
                "created": judged.created.isoformat(),
                "against": judged.against,
                "seal": judged.seal,
                "folder": judged.folder,
                **judged.verdict.model_dump(mode="json"),
            }
            for judged in operations.verdicts(registry, version.id)
        ],
        "receipts": [receipt.model_dump(mode="json") for receipt in receipts(registry, version.id)],
        "history": [
            change.model_dump(mode="json")
            for change in registry.history()
            if version.id in (change.before, change.after)
        ],
    }


def screen(registry: FolderRegistry, name: str) -> str:
    """Return all that is known of a version, to be read.

    Raises:
        ConfigError: there is no such version.
    """
    version = registry.version(operations.find(registry, name))
    lines = [
        *_of_version(registry, version),
        "",
        *_figures(version),
        "",
        *(line for judged in operations.verdicts(registry, version.id) for line in _of_verdict(judged)),
        *_files(version),
        "",
    ]
    for receipt in receipts(registry, version.id):
        lines += entry("push", f"{receipt.target}: {receipt.state}, {receipt.updated:%Y-%m-%d %H:%M:%S} UTC")
        facts = [receipt.reason or "", *(f"{fact} {value}" for fact, value in receipt.facts.items())]
        lines += [line for fact in facts if fact for line in entry("", fact)]
    lines += [
        line
        for change in registry.history()
        if version.id in (change.before, change.after)
        for line in entry("history", str(change))
    ]
    return "\n".join(lines).rstrip()


def receipts(registry: FolderRegistry, version: str) -> list[Receipt]:
    """Return the receipts of a version's pushes, by their targets."""
    names = [f"receipts/{version}/{name}" for name in registry.names(f"receipts/{version}")]
    found = [Receipt.model_validate_json(registry.read(name) or "") for name in names]
    return sorted(found, key=lambda receipt: receipt.target)


def _row(
    registry: FolderRegistry, version: Version, champion: Champion | None, previous: Pointer | None
) -> dict[str, Any]:
    newest = [version.verdict, *(decision.verdict for decision in registry.decisions(version.id))][-1]
    return {
        "version": version.id,
        "created": version.created.isoformat(),
        "finetuning_type": version.finetuning_type,
        "base_model": version.base_model.get("source"),
        KEY: version.metrics.get("models", {}).get(version.verdict.candidate, {}).get(KEY),
        "decision": newest.decision,
        "reason": newest.reason,
        "state": _state(version.id, champion, previous),
        "pushes": {receipt.target: receipt.state for receipt in receipts(registry, version.id)},
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["version"],
        row["created"][:16].replace("T", " "),
        row["finetuning_type"],
        row["base_model"] or "",
        accuracy(row),
        row["decision"],
        row["state"] or "",
        ", ".join(f"{target} {state}" for target, state in row["pushes"].items()),
    )


def accuracy(row: dict[str, Any]) -> str:
    """Return the reward accuracy of a version in the overview, with its interval."""
    return catalogue.in_line(KEY, _figure(row[KEY])) if row[KEY] else ""


def _state(id: str, champion: Champion | None, previous: Pointer | None) -> str | None:
    if champion and champion.version == id:
        return "champion"
    return "previous" if previous and previous.version == id else None


def _of_version(registry: FolderRegistry, version: Version) -> Iterator[str]:
    state = _state(version.id, registry.champion(), registry.previous())
    base, data = version.base_model, version.data
    yield from entry("version", f"{version.id} of {version.name}{', the ' + state if state else ''}")
    yield from entry("created", f"{version.created:%Y-%m-%d %H:%M:%S} UTC, {version.finetuning_type.upper()}")
    yield from entry("folder", f"{registry.place}/{version.name}/versions/{version.id}")
    revision = f" at {base['revision']}" if base.get("revision") else ""
    yield from entry("base model", f"{base.get('source')}{revision} ({base.get('fingerprint')})")
    if data:
        yield from entry("data", f"{data.get('source')}: {data.get('train')} training, {data.get('held_out')} held out")
        yield from entry("", f"fingerprint {data.get('fingerprint')}", f"with sides {data.get('split_fingerprint')}")
    yield from entry("code", version.code)
    for name, value in version.run.items():
        yield from entry("run", f"{name} {value}")


def _figures(version: Version) -> list[str]:
    """Return the main figures of every model with their intervals."""
    models = figures_of(version)
    rows = [
        (words, *(catalogue.in_line(name, figures.get(name)) for figures in models.values()))
        for name, words in catalogue.main(models).items()
    ]
    return _aligned([("figures", *models), *rows]) if rows else ["no figures"]


def figures_of(version: Version) -> dict[str, dict[str, Figure]]:
    """Return the figures of every model that a version was measured beside, and its own."""
    models = version.metrics.get("models", {})
    return {model: {name: _figure(value) for name, value in figures.items()} for model, figures in models.items()}


def _figure(stored: dict[str, float | None]) -> Figure:
    """Return a figure of a manifest; JSON has null for nan."""
    return Figure(**{key: float("nan") if value is None else value for key, value in stored.items()})


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _of_verdict(judged: Judged) -> Iterator[str]:
    verdict = judged.verdict
    yield from entry("verdict", f"{verdict.decision}: {verdict.reason}")
    yield from entry(
        "",
        f"of {judged.created:%Y-%m-%d %H:%M:%S} UTC, against {judged.against or 'no champion'}, seal {judged.seal}",
    )
    for rule in verdict.rules:
        yield from entry("", f"{rule.outcome}: {rule.name}: {rule.measured}, wanted {rule.wanted}")
    yield ""


def _files(version: Version) -> list[str]:
    sizes = {f"model/{name}": file["bytes"] for name, file in version.model_files.items()}
    sizes |= {f"evidence/{name}": file["bytes"] for name, file in version.evidence_files.items()}
    width = max([len(f"{size:,}") for size in sizes.values()], default=0)
    lines = [f"{size:>{width},}  {name}" for name, size in sizes.items()]
    return [f"{'' if number else 'files':11}{line}" for number, line in enumerate(lines)]
