"""Pushing versions outward, to any number of targets, each with a receipt.

A receipt lies in the registry beside its version and says how far a push came, so that doing it again continues only
what is missing. What a target has already got is not sent twice. A push that fails changes nothing in the registry.

    targets/      one module for each outside service, and each the only one that knows it
    patience      trying again, in a bounded time
    report        receipts on the screen, in the dashboard, and as the end of a run
"""

import contextlib
import shutil
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel

from preference_tuning import failures, fingerprint
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.registry.folder import FolderRegistry, Version

State = Literal["pending", "done", "failed"]
BEGUN = "begun"


class Receipt(BaseModel):
    """How far the push of a version to a target came."""

    target: str
    """What and where, such as ``huggingface:org/name``."""
    version: str
    state: State
    """pending: begun, or waiting for something that ``reason`` names; failed: ``reason`` says why."""
    asked: str
    """Hash of what was to be pushed: the version's files, the settings of the target, whether it is the champion."""
    attempts: int
    updated: datetime
    reason: str | None = None
    facts: dict[str, str] = {}
    """What the target answered: addresses, commits, tags; of a pending push what is done already."""


@dataclass(frozen=True)
class Bundle:
    """A version on its way out."""

    registry: FolderRegistry
    version: Version
    folder: Path
    """Of its model: weights, tokenizer, template, card; read only."""
    champion: bool
    """Whether it is the champion now."""
    aside: Path
    """A folder for what has to be made for the push, such as a merged model; kept, so that it is made once."""

    def reigns(self) -> bool:
        """Return whether it was the champion when the push began, and still is."""
        return self.champion and _is_champion(self.registry, self.version.id)


class Pending(Exception):  # noqa: N818 (no failure)
    """A target cannot take a version yet; the message says what it waits for."""


class Target(Protocol):
    """Somewhere that versions go."""

    @property
    def key(self) -> str:
        """What and where; receipts go by it."""

    @property
    def when(self) -> Literal["promoted", "registered"]:
        """Which versions it takes."""

    @property
    def settings(self) -> dict[str, object]:
        """What of its config decides on what arrives there."""

    def check(self) -> str:
        """Look before anything is trained whether it could take a version, and say what was found.

        Raises:
            ConfigError: it could not: no token, a token that may not write, no such server.
        """

    def push(self, bundle: Bundle, done: dict[str, str], note: Callable[[dict[str, str]], None]) -> dict[str, str]:
        """Make the target have the version, and return where it is there.

        Args:
            bundle: the version.
            done: the facts of an earlier attempt at the same.
            note: keeps facts in the receipt while it is pending.

        Raises:
            Pending: it has to wait.
            PreferenceTuningError: it failed.
        """


def push(
    registry: FolderRegistry, version: str, targets: Iterable[Target], aside: Path, again: bool = False
) -> list[Receipt]:
    """Push a version to every target that takes it and return their receipts, in their order.

    A target that fails does not keep the others from being tried. What was made aside is removed when all have it.

    Args:
        registry: that the version is in.
        version: its id.
        targets: where to.
        aside: a folder for what has to be made.
        again: also to targets whose receipt says that they have it.

    Raises:
        PreferenceTuningError: there is no such version, its files are not what was published, or a receipt cannot be
            written.
    """
    bundle = Bundle(
        registry=registry,
        version=registry.version(version),
        folder=registry.path(version) / "model",
        champion=_is_champion(registry, version),
        aside=aside / version,
    )
    wanted = [target for target in targets if bundle.champion or target.when == "registered"]
    missing = [target.key for target in wanted if again or not _has_it(bundle, target)]
    if missing and (problems := registry.verify(version)):
        raise PreferenceTuningError(f"registry: version {version} is not pushed: {'; '.join(problems)}")
    receipts = [_push(bundle, target) if target.key in missing else _kept(bundle, target) for target in wanted]
    if all(receipt.state == "done" for receipt in receipts):
        shutil.rmtree(bundle.aside, ignore_errors=True)
    return receipts


def receipt(registry: FolderRegistry, version: str, target: str) -> Receipt | None:
    """Return the receipt of a version's push to a target, or None if none was begun."""
    text = registry.read(_place(version, target))
    return Receipt.model_validate_json(text) if text else None


def _is_champion(registry: FolderRegistry, version: str) -> bool:
    pointer = registry.champion()
    return pointer is not None and pointer.version == version


def _has_it(bundle: Bundle, target: Target) -> bool:
    """Return whether a target has the version, and as champion if it is: another may have been champion there since."""
    found = receipt(bundle.registry, bundle.version.id, target.key)
    if found is None or found.state != "done" or found.asked != _asked(bundle, target):
        return False
    return not bundle.champion or bundle.registry.read(_champion_at(target.key)) == bundle.version.id


def _kept(bundle: Bundle, target: Target) -> Receipt:
    found = receipt(bundle.registry, bundle.version.id, target.key)
    assert found is not None
    return found


def _asked(bundle: Bundle, target: Target) -> str:
    return fingerprint.of_value([bundle.version.model_files, target.settings, bundle.champion])


def _push(bundle: Bundle, target: Target) -> Receipt:
    version, asked = bundle.version.id, _asked(bundle, target)
    found = receipt(bundle.registry, version, target.key)
    before = found if found is not None and found.asked == asked else None
    facts = dict(before.facts) if before else {}

    def keep(state: State, reason: str | None = None) -> Receipt:
        kept = Receipt(
            target=target.key,
            version=version,
            state=state,
            asked=asked,
            attempts=(before.attempts if before else 0) + 1,
            updated=datetime.now(UTC),
            reason=reason,
            facts=facts,
        )
        _write(bundle.registry, _place(version, target.key), kept.model_dump_json(indent=2) + "\n")
        return kept

    def note(found: dict[str, str]) -> None:
        facts.update(found)
        keep("pending", BEGUN)

    keep("pending", BEGUN)
    if bundle.champion:
        _write(bundle.registry, _champion_at(target.key), version)
    try:
        arrived = target.push(bundle, dict(facts), note)
    except Pending as waiting:
        return keep("pending", str(waiting))
    except Exception as error:
        return keep("failed", _reason(error, bundle.aside))
    facts = {**arrived, **{name: value for name, value in facts.items() if name not in arrived}}
    return keep("done")


def _reason(error: Exception, aside: Path) -> str:
    """Return what is told of a failure; of one that should not be, a log has more."""
    if isinstance(error, PreferenceTuningError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or aside}: {error.strerror}"
    log = aside / "error.log"
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc(), encoding="utf-8")
    return failures.account(error, log).message


def _write(registry: FolderRegistry, name: str, text: str) -> None:
    try:
        registry.write(name, text)
    except OSError as error:
        raise PreferenceTuningError(f"registry: cannot write a receipt: {error.strerror or error}") from None


def _place(version: str, target: str) -> str:
    return f"receipts/{version}/{fingerprint.of_value(target)[:16]}.json"


def _champion_at(target: str) -> str:
    """Return the file that names the version which was last pushed to a target as champion."""
    return f"receipts/champion-{fingerprint.of_value(target)[:16]}"
