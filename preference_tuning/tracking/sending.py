"""What delivers: a process beside the run that sends while it lives, archives at its end, and the upload later."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from preference_tuning import fingerprint
from preference_tuning.errors import ConfigError, PreferenceTuningError, TransientError
from preference_tuning.tracking.delivery import Session
from preference_tuning.tracking.folder import ARCHIVED, RunFolder
from preference_tuning.tracking.trackers import Known

POLL_SECONDS = 0.5
"""Between two looks at what is new."""
LONGEST_PAUSE = 20.0
"""Before Comet is tried again after a failure, at most."""
LINGER_SECONDS = 120.0
"""How long a sender goes on after the end of its run; what is left then waits for `track upload`."""
ARCHIVE_SECONDS = 120.0


def start(run: RunFolder) -> None:
    """Start the sender of a run, unless it has one."""
    with run.sole() as free:
        if not free:
            return
    _spawn("send", run)


def start_archives(run: RunFolder) -> "subprocess.Popen[bytes]":
    """Start to write the archives of a run, in a process of its own, which comet_ml may change as it likes."""
    return _spawn("archive", run)


def written(archives: "subprocess.Popen[bytes]") -> bool:
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


def _spawn(what: str, run: RunFolder) -> "subprocess.Popen[bytes]":
    """Start this module's process for a run: in a session of its own, as Ctrl-C is not meant for it."""
    root = str(fingerprint.PACKAGE.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with (run.path / "sender.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "preference_tuning.tracking", what, str(run.path)],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


COMMANDS: dict[str, Callable[[RunFolder], None]] = {"send": send, "archive": archive}


def main(what: str, folder: Path) -> None:
    """Do what the command line of the process says."""
    with contextlib.suppress(KeyboardInterrupt):
        COMMANDS[what](RunFolder(folder))
