"""Which version is the champion, which was it before, and how it came to that.

    champion.json          the champion, the one before, and the change that made it so: one file is the whole change
    previous.json          the one before once more, for whoever reads files by hand
    history/000001.json    every change, one file each

``champion.json`` alone decides. The other two follow from it and are completed by the next writer if a process died
between them.
"""

from datetime import UTC, datetime
from typing import Final, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from preference_tuning.config.section import Name
from preference_tuning.errors import OvertakenError, PreferenceTuningError
from preference_tuning.registry.storage import Storage
from preference_tuning.registry.storage.locking import Holder

CHAMPION, PREVIOUS, HISTORY = "champion.json", "previous.json", "history"
How = Literal["verdict", "hand", "despite", "rollback"]
Model = TypeVar("Model", bound=BaseModel)


class Anyone:
    """Whoever reigns; a verdict is made against somebody."""


ANYONE: Final = Anyone()


class Pointer(BaseModel):
    """A version that is or was the champion."""

    version: Name
    since: datetime
    seal: str | None = None
    """Of the evaluation whose verdict promoted it."""


class Change(BaseModel):
    """How the champion came to be another one."""

    number: int
    at: datetime
    by: str
    """User and host."""
    how: How
    """verdict: at the end of its run; hand: on its verdict, later; despite: against it, for ``reason``."""
    before: Name | None
    after: Name
    reason: str | None = None
    seal: str | None = None
    """Of the evaluation that the verdict is from."""

    def __str__(self) -> str:
        reason = f": {self.reason}" if self.reason else ""
        at = f"{self.at:%Y-%m-%d %H:%M:%S} UTC"
        return f"{at}: {self.before or 'none'} -> {self.after}, {self.how} by {self.by}{reason}"


class Champion(Pointer):
    """The pointer to the version in use."""

    previous: Pointer | None = None
    change: Change | None = None
    """None in pointers from before there was a history."""


class Pointers:
    """The pointers of one name in a registry."""

    def __init__(self, storage: Storage, name: str) -> None:
        """Take the storage and the name."""
        self._storage, self._name = storage, name

    def champion(self) -> Champion | None:
        """Return the pointer to the champion, or None if nothing was promoted yet."""
        return _parsed(Champion, self._storage.read(self._at(CHAMPION)), self._at(CHAMPION))

    def previous(self) -> Pointer | None:
        """Return the pointer to the champion before, or None if there was none."""
        champion = self.champion()
        if champion is None or champion.change is not None:
            return champion.previous if champion else None
        return _parsed(Pointer, self._storage.read(self._at(PREVIOUS)), self._at(PREVIOUS))

    def history(self) -> list[Change]:
        """Return every change, the first one first."""
        places = [self._at(f"{HISTORY}/{file}") for file in self._storage.names(self._at(HISTORY))]
        found = [_parsed(Change, self._storage.read(place), place) for place in places]
        champion = self.champion()
        if champion and champion.change:
            found.append(champion.change)
        return list({change.number: change for change in found if change}.values())

    def move(
        self,
        id: str,
        how: How,
        seal: str | None = None,
        reason: str | None = None,
        expected: str | Anyone | None = ANYONE,
    ) -> Champion:
        """Make a version the champion, and the present one the previous one; needs the lock.

        Args:
            id: of the version.
            how: and ``reason``: for the history.
            seal: of the evaluation whose verdict this is.
            reason: in words.
            expected: the version that has to reign (None: none), or ``ANYONE``.

        Raises:
            OvertakenError: another one reigns.
        """
        text = self._storage.read(self._at(CHAMPION))
        now = _parsed(Champion, text, self._at(CHAMPION))
        reigning = now.version if now else None
        if now and now.version == id:
            return now
        if not isinstance(expected, Anyone) and reigning != expected:
            raise OvertakenError(_overtaken(self._name, id, now, expected))
        at, who = datetime.now(UTC), Holder.this()
        change = Change(
            number=self._last() + 1,
            at=at,
            by=f"{who.user}@{who.host}",
            how=how,
            before=reigning,
            after=id,
            reason=reason,
            seal=seal,
        )
        previous = Pointer(**now.model_dump(include=set(Pointer.model_fields))) if now else None
        pointer = Champion(version=id, since=at, seal=seal, previous=previous, change=change)
        if not self._storage.swap(self._at(CHAMPION), text, _json(pointer)):
            raise OvertakenError(_overtaken(self._name, id, self.champion(), reigning))
        self.complete()
        return pointer

    def complete(self) -> None:
        """Make what follows from the champion's pointer follow from it; needs the lock."""
        champion = self.champion()
        if champion is None or champion.change is None:
            return
        self._storage.create(self._at(f"{HISTORY}/{champion.change.number:06}.json"), _json(champion.change))
        place = self._at(PREVIOUS)
        if champion.previous is not None and self._storage.read(place) != (text := _json(champion.previous)):
            self._storage.write(place, text)

    def _last(self) -> int:
        """Return the number of the last change."""
        numbers = [int(name.partition(".")[0]) for name in self._storage.names(self._at(HISTORY))]
        return max(numbers, default=0)

    def _at(self, name: str) -> str:
        return f"{self._name}/{name}"


def _parsed(kind: type[Model], text: bytes | None, place: str) -> Model | None:
    """Return what a pointer file says, or None if there is none."""
    try:
        return None if text is None else kind.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise PreferenceTuningError(f"registry: {place} is not what was written: {where} {problem['msg']}") from None


def _json(model: BaseModel) -> bytes:
    return (model.model_dump_json(indent=2) + "\n").encode()


def _overtaken(name: str, id: str, now: Champion | None, expected: str | None) -> str:
    by = f" by {now.change.by}" if now and now.change else ""
    became = f"{now.version} became champion on {now.since:%Y-%m-%d at %H:%M:%S} UTC{by}" if now else "none reigns now"
    return (
        f"registry: version {id} of {name} is stored, and not promoted: {became}, while the verdict was made against "
        f"{expected or 'no champion'}. Run the same command again: only the comparison is repeated"
    )
