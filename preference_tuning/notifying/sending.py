"""Sending: everybody at the same time, in a bounded time, and never to the harm of the run."""

import sys
import threading
import time
from collections.abc import Callable, Sequence

from preference_tuning.config import CommandNotify, Receiver, WebhookNotify
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.notifying import receivers
from preference_tuning.notifying.message import Message

Alert = Callable[[str], None]
"""Tells a text through ZenML's alerter, which the library does not know."""


def send(message: Message, to: Sequence[Receiver], alert: Alert) -> list[str]:
    """Tell a message to those who want it; return, and print as warnings, what went wrong.

    Args:
        message: of a run.
        to: the receivers in the config.
        alert: stands for receivers that are ``alerter``.
    """
    wrong: dict[int, str] = {}
    wanted = {place: receiver for place, receiver in enumerate(to) if message.outcome in receiver.on}
    threads = {
        place: threading.Thread(target=_try, args=(message, receiver, alert, place, wrong), daemon=True)
        for place, receiver in wanted.items()
    }
    for thread in threads.values():
        thread.start()
    end = time.monotonic() + receivers.SECONDS + 1  # one more, for a program to be ended
    for place, thread in threads.items():
        thread.join(max(0.0, end - time.monotonic()))
        if thread.is_alive():
            wrong.setdefault(place, f"took longer than {receivers.SECONDS:.0f} s")
    warnings = [f"notify.{place} ({wanted[place].to}): {reason}" for place, reason in sorted(wrong.items())]
    for warning in warnings:
        sys.stderr.write(f"warning: {warning}; the run is not touched by it\n")
    return warnings


def _try(message: Message, receiver: Receiver, alert: Alert, place: int, wrong: dict[int, str]) -> None:
    try:
        if isinstance(receiver, WebhookNotify):
            receivers.post(message, receiver)
        elif isinstance(receiver, CommandNotify):
            receivers.start(message, receiver)
        else:
            alert(message.text())
    except PreferenceTuningError as error:
        wrong[place] = str(error)
    except Exception as error:  # of the alerter: its text may hold an address that is a secret
        wrong[place] = type(error).__name__
