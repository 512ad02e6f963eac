"""The end of a run on one screen."""

from pathlib import Path

from preference_tuning.evaluation import screen
from preference_tuning.evaluation.job import load_summary
from preference_tuning.registry.result import Registered, Result


def render(result: Result, registered: Registered, tracked: str) -> str:
    """Return what was trained on what, the figures before and after, the verdict, and where everything lies.

    Args:
        result: of the run.
        registered: what became of it.
        tracked: where its metrics are.
    """
    evaluation = load_summary(registered.evaluation)
    manifest = result.dataset.manifest
    stages = ", ".join(
        f"{stage.upper()} {record.steps} steps in {record.seconds:.0f} s" for stage, record in result.records().items()
    )
    lines = [
        f"{result.base_model.source}",
        f"  tuned on {manifest.source}: {manifest.train} pairs, {evaluation.pairs} held out; {stages}",
        "",
        *screen.render(evaluation),
        f"version    {registered.version.id} of {registered.version.name}, {_standing(registered)}",
        f"model      {_short(registered.folder / 'model')}",
        f"report     {_short(registered.folder / 'evidence' / 'evaluation' / 'report.html')}",
        f"comet      {tracked}",
        f"dashboard  python run.py dashboard {result.run.get('zenml_run', '')}".rstrip(),
    ]
    return "\n".join(lines)


def _standing(registered: Registered) -> str:
    if registered.promoted:
        return "now the champion"
    if registered.verdict.decision == "promote" and registered.taken_back:
        return f"not promoted: it was taken back on {registered.taken_back.at:%Y-%m-%d} (run.py registry promote)"
    return f"not promoted; the champion is {registered.champion}" if registered.champion else "not promoted"


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
