"""The registry as a page of HTML, for whoever has no terminal: a file that is made anew after every change."""

import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from preference_tuning import reports
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.evaluation import catalogue
from preference_tuning.evaluation.metrics import Figures
from preference_tuning.registry import shown
from preference_tuning.registry.folder import FolderRegistry, Version
from preference_tuning.registry.pushing import Receipt
from preference_tuning.reports import Html, Interval

CHARTS = 9
"""Figures that are drawn over the versions."""


def place(output_dir: str | Path, name: str) -> Path:
    """Return where the page of a registry's name lies unless somebody says otherwise."""
    return Path(output_dir).expanduser() / f"registry-{name}.html"


def write(registry: FolderRegistry, path: Path) -> Path:
    """Write the page; a reader finds the old one or the new one. Return its path.

    Raises:
        ConfigError: it cannot be written.
    """
    text = render(registry)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise ConfigError(f"registry: cannot write the page {path}: {error.strerror}") from None
    return path


def refresh(registry: FolderRegistry, path: Path) -> None:
    """Write the page anew where there is one, after something that is done: what keeps it from that is a warning."""
    try:
        if path.is_file():
            write(registry, path)
    except PreferenceTuningError as error:
        sys.stderr.write(f"warning: {error}\n")


def render(registry: FolderRegistry) -> str:
    """Return the page."""
    found = shown.overview(registry)
    versions = [registry.version(row["version"]) for row in found["versions"]]
    reigned = {change.after for change in registry.history()}
    champion = found["champion"] and found["champion"]["version"]
    known = {version.id: version for version in versions}
    told = {version.id: shown.receipts(registry, version.id) for version in versions}
    return reports.page(
        f"Models of {registry.name}",
        f"{registry.place}; every version with its verdict, the newest first",
        reports.facts(
            {
                "champion": champion or "none",
                "since": _minute(found["champion"]["since"]) if champion else "",
                "previous champion": found["previous"]["version"] if found["previous"] else "none",
                "versions": len(versions),
            }
        ),
        *([_champion(known[champion])] if champion in known else []),
        *_over_versions(versions[::-1], reigned),
        reports.section("Versions", _versions(found["versions"])),
        reports.section("Champions", _history(registry)),
        reports.section("Pushes", _pushes(told)),
    )


def _champion(version: Version) -> Html:
    """Return what the champion's card says of it."""
    models = shown.figures_of(version)
    base, data = version.base_model, version.data
    rows = {
        "verdict": f"{version.verdict.decision}: {version.verdict.reason}",
        "base model": f"{base.get('source')} ({base.get('fingerprint')})",
        "data": f"{data.get('source')}: {data.get('train')} training, {data.get('held_out')} held out",
        "data's fingerprint": data.get("fingerprint", ""),
        **{name.replace("_", " "): value for name, value in version.run.items()},
    }
    return reports.section(
        f"The champion: {version.id}, {version.finetuning_type.upper()}",
        _figures(models) if models else reports.muted("no figures"),
        reports.table(("of it", ""), rows.items()),
    )


def _figures(models: Mapping[str, Figures]) -> Html:
    rows = [
        (words, *(catalogue.in_line(name, figures.get(name)) for figures in models.values()))
        for name, words in catalogue.main(models).items()
    ]
    return reports.table(("held-out pairs", *models), rows, numeric=True)


def _over_versions(versions: list[Version], reigned: set[str]) -> Iterator[Html]:
    """Yield the main figures of the tuned models with their intervals, the oldest version first."""
    tuned = [shown.figures_of(version).get(version.verdict.candidate, {}) for version in versions]
    words = catalogue.main({version.id: figures for version, figures in zip(versions, tuned, strict=True)})
    charts = []
    for name, title in [*words.items()][:CHARTS]:
        intervals = [
            Interval(
                version.id, figure.low, figure.value, figure.high, catalogue.in_line(name, figure),
                "good" if version.id in reigned else "unclear",
            )
            for version, figures in zip(versions, tuned, strict=True)
            if (figure := figures.get(name))
        ]  # fmt: skip
        charts.append(reports.upright(title, intervals, "version, the oldest first"))
    if any(charts):
        lead = "Green: a champion, then or now. Each version on the held-out pairs of its day."
        yield reports.section("Figures over versions", reports.paragraph(lead), reports.charts(*charts))


def _versions(rows: list[dict[str, object]]) -> Html:
    if not rows:
        return reports.muted("none yet")
    header = ("version", "created (UTC)", "type", "base model", "reward accuracy", "verdict", "reason", "now")
    return reports.table(
        header,
        [
            (
                row["version"],
                _minute(str(row["created"])),
                row["finetuning_type"],
                row["base_model"] or "",
                shown.accuracy(row),
                reports.badge(str(row["decision"])),
                row["reason"],
                reports.badge(str(row["state"])) if row["state"] else "",
            )
            for row in rows
        ],
    )


def _history(registry: FolderRegistry) -> Html:
    changes = registry.history()[::-1]
    if not changes:
        return reports.muted("none yet")
    rows = [(f"{c.at:%Y-%m-%d %H:%M}", c.before or "none", c.after, c.how, c.by, c.reason or "") for c in changes]
    return reports.table(("when (UTC)", "before", "champion", "how", "by", "reason"), rows)


def _pushes(told: dict[str, list[Receipt]]) -> Html:
    rows = [
        (
            version,
            receipt.target,
            reports.badge(receipt.state),
            f"{receipt.updated:%Y-%m-%d %H:%M}",
            receipt.reason or ", ".join(f"{name} {value}" for name, value in receipt.facts.items()),
        )
        for version, receipts in told.items()
        for receipt in receipts
    ]
    return reports.table(("version", "target", "state", "when (UTC)", "what"), rows) if rows else reports.muted("none")


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")
