"""A look at preference data before anything is trained: of a run config, or of a path alone."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from preference_tuning import jobs
from preference_tuning.config import load, load_data
from preference_tuning.data import findings, job, report, table
from preference_tuning.data.table import Dataset, Finding
from preference_tuning.errors import ConfigError
from preference_tuning.models.source import locate


def inspect(what: str, overrides: Sequence[str], out: Path | None, as_json: bool) -> str:
    """Prepare data and return what is in it, as text or JSON.

    Args:
        what: a run config (.yaml), or a data file, a folder or a hub id.
        overrides: such as ``data.held_out=0.1``.
        out: where the dataset is copied to, if anywhere.
        as_json: the manifest with all findings instead of text.

    Raises:
        DataError: the data cannot be trained on.
        ConfigError: the config is wrong, or ``out`` is not free.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: {out} is there already; name a new or empty folder")
    dataset, of_run = _prepared(what, overrides)
    if of_run:
        jobs.write_text(dataset.folder.parent / table.REPORT, report.render(dataset, of_run))
    shown = (dataset.folder.parent if of_run else dataset.folder) / table.REPORT
    if out is not None:
        shutil.copytree(dataset.folder, out, dirs_exist_ok=True)
        shutil.copyfile(shown, out / table.REPORT)
        shown = out / table.REPORT
    if as_json:
        found = [finding.model_dump() for finding in of_run]
        return json.dumps({**dataset.manifest.model_dump(mode="json"), "of_run": found, "report": str(shown)}, indent=2)
    return f"{report.text(dataset.manifest, of_run)}\n\n  report      {shown}"


def _prepared(what: str, overrides: Sequence[str]) -> tuple[Dataset, list[Finding]]:
    if Path(what).suffix in (".yaml", ".yml"):
        config = load(Path(what), overrides).config
        dataset = job.prepare(job.of_run(config, locate(config.base_model)))
        return dataset, list(findings.of_run(dataset.manifest, config))
    return job.prepare(job.of_data(load_data(what, overrides))), []
