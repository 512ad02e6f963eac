"""What a tracker is: something that takes what the spool and the run's folder hold."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from preference_tuning.tracking.spool import Point

Kind = Literal["file", "chart"]
Fact = str | int | float | bool


@dataclass(frozen=True)
class Known:
    """What a tracker has already."""

    steps: Mapping[str, Collection[int]] = field(default_factory=dict)
    """Of each metric."""
    assets: Collection[str] = ()


class Tracker(Protocol):
    """Takes what a run leaves. A method that returns has delivered; one that did not raises.

    Raises (all methods):
        TransientError: it could not be delivered now, or it is not known whether it was.
        ConfigError: it never can be.
    """

    def known(self, names: Collection[str]) -> Known:
        """Return what is there already, of these metrics."""

    def metrics(self, points: Sequence[Point]) -> None:
        """Take points under their full names."""

    def parameters(self, values: Mapping[str, str]) -> None:
        """Take settings."""

    def others(self, values: Mapping[str, Fact]) -> None:
        """Take facts that are no measurements: hashes, counts, the verdict, links."""

    def asset(self, path: Path, name: str, kind: Kind) -> None:
        """Take a file: as it is (tables are CSV), or as a picture (SVG)."""

    def beat(self) -> None:
        """Say that the run still lives."""

    def end(self, failed: bool) -> None:
        """Take note that this was all."""


class Null:
    """Takes everything and keeps nothing: tracking is off."""

    def known(self, names: Collection[str]) -> Known:
        """Return nothing."""
        return Known()

    def metrics(self, points: Sequence[Point]) -> None:
        """Do nothing, as all methods from here on."""

    def parameters(self, values: Mapping[str, str]) -> None:  # noqa: D102
        pass

    def others(self, values: Mapping[str, Fact]) -> None:  # noqa: D102
        pass

    def asset(self, path: Path, name: str, kind: Kind) -> None:  # noqa: D102
        pass

    def beat(self) -> None:  # noqa: D102
        pass

    def end(self, failed: bool) -> None:  # noqa: D102
        pass
