"""Pushing versions outward, to any number of targets, each with a receipt.

A receipt lies in the registry beside its version and says how far a push came, so that doing it again continues only
what is missing. What a target has already got is not sent twice. A push that fails changes nothing in the registry.

    targets/    one module for each outside service, and each the only one that knows it
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel

from preference_tuning import fingerprint
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.registry.folder import FolderRegistry, Version


class Receipt(BaseModel):
    """How far the push of a version to a target came."""

    target: str
    """What and where, such as ``huggingface:org/name``."""
    version: str
    state: Literal["pending", "done", "failed"]
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

    Args:
        registry: that the version is in.
        version: its id.
        targets: where to.
        aside: a folder for what has to be made.
        again: also to targets whose receipt says that they have it.
    """
    pointer = registry.champion()
    bundle = Bundle(
        registry=registry,
        version=registry.version(version),
        folder=registry.path(version) / "model",
        champion=pointer is not None and pointer.version == version,
        aside=aside / version,
    )
    wanted = [target for target in targets if bundle.champion or target.when == "registered"]
    return [_push(bundle, target, again) for target in wanted]


def receipt(registry: FolderRegistry, version: str, target: str) -> Receipt | None:
    """Return the receipt of a version's push to a target, or None if none was begun."""
    text = registry.read(_place(version, target))
    return Receipt.model_validate_json(text) if text else None


def _push(bundle: Bundle, target: Target, again: bool) -> Receipt:
    registry, version = bundle.registry, bundle.version.id
    asked = fingerprint.of_value([bundle.version.model_files, target.settings, bundle.champion])
    found = receipt(registry, version, target.key)
    before = found if found is not None and found.asked == asked else None
    if before is not None and before.state == "done" and not again:
        return before
    facts = dict(before.facts) if before else {}

    def keep(state: Literal["pending", "done", "failed"], reason: str | None = None) -> Receipt:
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
        registry.write(_place(version, target.key), kept.model_dump_json(indent=2) + "\n")
        return kept

    def note(found: dict[str, str]) -> None:
        facts.update(found)
        keep("pending", "begun")

    keep("pending", "begun")
    try:
        facts.update(target.push(bundle, dict(facts), note))
    except Pending as waiting:
        return keep("pending", str(waiting))
    except PreferenceTuningError as error:
        return keep("failed", str(error))
    return keep("done")


def _place(version: str, target: str) -> str:
    return f"receipts/{version}/{fingerprint.of_value(target)[:16]}.json"
