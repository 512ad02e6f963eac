"""After the end of every run, whatever started it: who wants to know is told, and the registry's page is made anew.

Neither changes what became of the run: what goes wrong here is a warning.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from preference_tuning.config import RunConfig
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.notifying import message, sending
from preference_tuning.registry import page
from preference_tuning.registry.folder import FolderRegistry
from preference_tuning.retraining.history import COMPLETED, Run


def after(config: RunConfig, run: Run) -> None:
    """Do what comes after the end of a run.

    Args:
        config: of the run.
        run: as its history has it.
    """
    if run.outcome in (*COMPLETED, "failed"):
        with _harmless("the registry's page"):
            registry = FolderRegistry(config.registry)
            if registry.ids():  # a run whose push failed has registered its version
                page.write(registry, page.place(config.output_dir, config.registry.name))
    if config.notify:
        with _harmless("notify"):
            told = message.of(run, config.registry)
            if told:
                sending.send(told, config.notify, _alert)


def _alert(text: str) -> None:
    """Tell a text through the alerter of ZenML's active stack.

    Raises:
        PreferenceTuningError: there is none, or it did not take it.
    """
    from zenml.client import Client  # a night without news does not import it

    alerter = Client().active_stack.alerter
    if alerter is None:
        raise PreferenceTuningError(
            "the active stack has no alerter; make one with `zenml alerter register`, and a stack that has it with "
            "`zenml stack register STACK -o default -a default -al ALERTER --set` (ZenML's default stack never has one)"
        )
    if not alerter.post(text):
        raise PreferenceTuningError(f"{alerter.name} did not take it")


@contextmanager
def _harmless(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a full disk, a registry that is gone: the run is what it is
        reason = str(error).splitlines()[0] if isinstance(error, PreferenceTuningError | OSError) else ""
        print(f"warning: {what}: {reason or type(error).__name__}", file=sys.stderr)
