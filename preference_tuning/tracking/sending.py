"""What delivers: a process beside the run that sends while it lives, archives at its end, and the upload later."""

import contextlib
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO, TypeAlias

from preference_tuning import fingerprint
from preference_tuning.errors import ConfigError, PreferenceTuningError, TransientError
from preference_tuning.tracking.delivery import Session
from preference_tuning.tracking.folder import ARCHIVED, RunFolder
from preference_tuning.tracking.trackers import Known

Process: TypeAlias = subprocess.Popen[bytes]

POLL_SECONDS = 0.5
"""Between two looks at what is new."""
LONGEST_PAUSE = 20.0
"""Before Comet is tried again after a failure, at most."""
LINGER_SECONDS = 120.0
"""How long a sender goes on after the end of its run; what is left then waits for `track upload`."""
ARCHIVE_SECONDS = 120.0
AHEAD_SECONDS = 60.0
"""How long a process waits for the archives that it is to write; a run that trains ends after that."""


def start(run: RunFolder) -> None:
    """Start the sender of a run, unless it has one."""
    with run.sole() as free:
        if not free:
            return
    with _log(run) as log:
        _spawn("send", str(run.path), log=log)


_ahead: Process | None = None
"""A process that will write archives and imports comet_ml meanwhile, for a second that a cached run would wait."""


def start_ahead() -> None:
    """Start the process that writes archives before there is anything to write; it waits a minute for its run."""
    global _ahead
    _ahead = _spawn("archive", stdin=subprocess.PIPE)


def start_archives(run: RunFolder) -> Process:
    """Start to write the archives of a run, in a process of its own, which comet_ml may change as it likes."""
    global _ahead
    process, _ahead = _ahead, None
    if process is None or process.poll() is not None:
        process = _spawn("archive", stdin=subprocess.PIPE)
    assert process.stdin
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(str(run.path).encode())
    return process


def written(archives: Process) -> bool:
    """Wait for archives that were started, and return whether they are there."""
    try:
        return archives.wait(ARCHIVE_SECONDS) == 0
    except subprocess.TimeoutExpired:
        return False


def archive(run: RunFolder) -> None:
    """Write what no archive of the run holds yet into new ones, one a stage."""
    from preference_tuning.tracking.comet import Archive
    from preference_tuning.tracking.delivery import deliver, missing

    ledger, closed = run.ledger(ARCHIVED), run.closed()
    for stage in run.stages():
        parcel = missing(stage, stage.points(), ledger)
        if parcel.size:
            tracker, noted = Archive(run, stage.name), ledger.aside()
            deliver(stage, parcel, tracker, noted, Known())
            tracker.end(failed=closed is not None and closed.failed)
            ledger.keep(noted)


def archive_when_asked() -> None:
    """Be the process that writes archives: of the run whose folder comes through stdin, or of none."""
    from preference_tuning.tracking import comet

    comet.prepare()
    asked, _, _ = select.select([sys.stdin], [], [], AHEAD_SECONDS)
    if not asked or not (path := sys.stdin.read()):
        sys.exit(1)
    run = RunFolder(Path(path))
    with _log(run) as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    archive(run)


def upload(run: RunFolder) -> int:
    """Send what Comet does not have of a run, and return how many records that was.

    Raises:
        ConfigError: Comet refuses the key or the experiment.
        TransientError: Comet cannot be reached; what arrived is noted.
        PreferenceTuningError: the run's own sender is at it.
    """
    with run.sole() as free:
        if not free:
            raise PreferenceTuningError("it is being sent at this moment")
        session = _connected(run)
        count = session.send()
        if closed := run.closed():
            session.end(closed.failed)
        return count


def send(run: RunFolder) -> None:
    """Be the sender: deliver what is new until the run is over and everything has arrived, or for as long as allowed.

    Comet may be gone, slow or wrong meanwhile; it is tried again, and asked what it has before anything is repeated.
    """
    with run.sole(patience=1.0) as free:
        if not free:
            return
        threading.Thread(target=_end_in_time, args=(run,), daemon=True).start()
        _Sender(run).run()


class _Sender:
    def __init__(self, run: RunFolder) -> None:
        self._folder = run
        self._session: Session | None = None
        self._pause = POLL_SECONDS

    def run(self) -> None:
        while True:
            closed = self._folder.closed()  # looked at before: what comes later is seen in the next round
            try:
                if self._session is None:
                    self._session = _connected(self._folder)
                self._session.send()
                if closed:
                    self._session.end(closed.failed)
                    return
                self._session.beat()
                self._pause = POLL_SECONDS
            except ConfigError as error:
                self._failed(str(error))
                return
            except Exception as error:  # a tracker must not end the sender, whatever is wrong with it
                self._failed(str(error) if isinstance(error, TransientError) else type(error).__name__)
                self._session = None
                self._pause = min(LONGEST_PAUSE, 2 * max(self._pause, 0.5))
            self._wait(over=closed is not None)

    def _failed(self, problem: str) -> None:
        ledger = self._folder.ledger()
        ledger.problem = problem
        ledger.save()

    def _wait(self, over: bool) -> None:
        """Wait for the next round; the end of the run is a reason to try at once."""
        until = time.monotonic() + self._pause
        while time.monotonic() < until and (over or not self._folder.closed()):
            time.sleep(0.1)


def _connected(run: RunFolder) -> Session:
    from preference_tuning.tracking.comet import Experiment

    ledger = run.ledger()
    tracker = Experiment.connect(run.about)
    ledger.url, ledger.problem = tracker.url or ledger.url, None
    ledger.save()
    return Session(run, tracker, ledger)


def _end_in_time(run: RunFolder) -> None:
    """End this process a while after the run, whatever request it waits for: nothing stays behind for ever."""
    while not run.closed():
        time.sleep(1.0)
    time.sleep(LINGER_SECONDS)
    os._exit(1)


def _log(run: RunFolder) -> BinaryIO:
    return (run.path / "sender.log").open("ab")


def _spawn(*words: str, stdin: int = subprocess.DEVNULL, log: int | BinaryIO = subprocess.DEVNULL) -> Process:
    """Start this module's process: in a session of its own, as Ctrl-C is not meant for it."""
    root = str(fingerprint.PACKAGE.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "preference_tuning.tracking", *words],
        env={**os.environ, "PYTHONPATH": path},
        stdin=stdin,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def main(what: str, *folder: str) -> None:
    """Do what the command line of the process says."""
    with contextlib.suppress(KeyboardInterrupt):
        if what == "send":
            send(RunFolder(Path(*folder)))
        else:
            archive_when_asked()
