"""What of each run was delivered and what is missing: for the summary of a run, `track list` and `track upload`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.tracking import sending
from preference_tuning.tracking.delivery import missing
from preference_tuning.tracking.folder import ARCHIVED, ARCHIVES, RunFolder, runs
from preference_tuning.tracking.ledger import Ledger


def line(run: RunFolder) -> str:
    """Return where the metrics of a run are, and what to do about those that are not in Comet."""
    about = run.about
    if about.mode == "off":
        return "off"
    if about.mode == "offline":
        if run.archives():
            return f"comet upload {short(run.path / ARCHIVES)}/*.zip"
        return f"no archive; {_upload(run)}"
    ledger = run.ledger()
    where = ledger.url or f"experiment {about.id}"
    total, left = counted(run, ledger)
    if not left:
        return where
    return f"{where}: {left} of {total} records are not there yet{_because(ledger)}; {_upload(run)}"


def counted(run: RunFolder, ledger: Ledger) -> tuple[int, int]:
    """Return how many records a run has, and how many of them a ledger lacks."""
    stages = [(stage, stage.points()) for stage in run.stages()]
    total = sum(missing(stage, points, Ledger()).size for stage, points in stages)
    return total, sum(missing(stage, points, ledger).size for stage, points in stages)


def listing(root: Path) -> Iterator[str]:
    """Yield a line for each run, the newest first: how it stands, and what Comet has of it."""
    found = runs(root)
    if not found:
        yield f"no run is tracked in {short(root)}"
        return
    yield f"{'run':10}{'mode':9}{'stands':10}{'records':>9}{'in Comet':>10}{'archived':>10}  name"
    for run in reversed(found):
        about, closed = run.about, run.closed()
        total, left = counted(run, run.ledger())
        archived = total - counted(run, run.ledger(ARCHIVED))[1]
        stands = "runs" if closed is None else "failed" if closed.failed else "finished"
        yield f"{about.id[:8]:10}{about.mode:9}{stands:10}{total:9}{total - left:10}{archived:10}  {about.name}"
        if problem := run.ledger().problem:
            yield f"{'':10}{problem}"


def upload(root: Path, wanted: Sequence[str]) -> Iterator[str]:
    """Send to Comet what it lacks of some runs, or of all that are not off, and yield a line for each.

    Raises:
        ConfigError: there is no such run, or Comet refuses the key.
        PreferenceTuningError: something did not arrive; the lines said what.
    """
    found = runs(root)
    chosen = [_find(name, found, root) for name in wanted] or [run for run in found if run.about.mode != "off"]
    if not chosen:
        yield f"no run is tracked in {short(root)}"
    failed = 0
    for run in chosen:
        title = f"{run.about.id[:8]} {run.about.name}"
        total, left = counted(run, run.ledger())
        if not left and run.ledger().complete:
            yield f"{title}: nothing is missing, {total} records"
            continue
        try:
            count = sending.upload(run)
        except ConfigError:
            raise
        except PreferenceTuningError as error:
            failed += 1
            left = counted(run, run.ledger())[1]
            yield f"{title}: {left} of {total} records are missing still: {error}"
        else:
            yield f"{title}: {count} records sent, {run.ledger().url or 'experiment ' + run.about.id}"
    if failed:
        raise PreferenceTuningError(f"{failed} of {len(chosen)} runs are not complete in Comet; try again later")


def short(path: Path) -> str:
    """Return a path as it is seen from here."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _find(name: str, found: Sequence[RunFolder], root: Path) -> RunFolder:
    fitting = [run for run in found if run.about.id.startswith(name) or run.about.name == name]
    if len(fitting) == 1:
        return fitting[0]
    problem = f"{len(fitting)} runs begin with it" if fitting else f"{len(found)} runs are tracked in {short(root)}"
    raise ConfigError(f"track: {name!r} is no run ({problem}); `run.py track list` shows them")


def _because(ledger: Ledger) -> str:
    return f" ({ledger.problem})" if ledger.problem else ""


def _upload(run: RunFolder) -> str:
    return f"python run.py track upload {run.about.id[:8]}"
