"""What people do to a registry by hand: promote a version, take a promotion back."""

import json
from dataclasses import dataclass
from datetime import datetime

from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.evaluation.gate import Verdict
from preference_tuning.evaluation.job import SUMMARY
from preference_tuning.registry.folder import Decision, FolderRegistry, differences
from preference_tuning.registry.pointers import How
from preference_tuning.registry.versions import decision_id


@dataclass(frozen=True)
class Judged:
    """A verdict on a version."""

    verdict: Verdict
    created: datetime
    seal: str | None
    against: str | None
    """The champion that it was made against."""
    folder: str
    """Of its evidence, in the folder of the registry's name."""
    decision: Decision | None
    """None: the version was published with it."""


def find(registry: FolderRegistry, name: str) -> str:
    """Return the id of a version, as ``FolderRegistry.find`` does.

    Raises:
        ConfigError: there is none.
    """
    version = registry.find(name)
    if version is None:
        known = ", ".join(registry.ids()) or "none yet"
        raise ConfigError(f"registry: no version {name!r} of {registry.name!r} in {registry.place}; there are: {known}")
    return version


def verdicts(registry: FolderRegistry, version: str) -> list[Judged]:
    """Return every verdict on a version, the oldest first: the one it was published with, then the decisions."""
    published = registry.version(version)
    own, seal = f"versions/{version}", published.metrics.get("seal")
    found = [Judged(published.verdict, published.created, seal, _against(registry, own), own, None)]
    for decision in registry.decisions(version):
        place = f"decisions/{decision_id(version, decision.seal)}"
        against = _against(registry, place)
        found.append(Judged(decision.verdict, decision.created, decision.seal, against, place, decision))
    return found


def promote(registry: FolderRegistry, name: str, despite: str | None = None) -> str:
    """Make a version the champion by hand, and say so.

    Args:
        registry: that it is in.
        name: as for ``FolderRegistry.find``.
        despite: why, if its newest verdict does not allow it.

    Raises:
        ConfigError: there is no such version.
        OvertakenError: another one was promoted at the same time.
        PreferenceTuningError: its verdict does not allow it, or its files are not what was published.
    """
    version, champion = find(registry, name), registry.champion()
    reigning = champion.version if champion else None
    if version == reigning:
        return f"{version} is the champion already"
    newest = verdicts(registry, version)[-1]
    refused = _refused(newest, reigning)
    if refused and despite is None:
        raise PreferenceTuningError(
            f"registry: version {version} is not promoted: {refused}\n"
            '  promote it nevertheless: run.py registry promote VERSION --despite "REASON", which is kept'
        )
    if problems := _changed(registry, newest):
        raise PreferenceTuningError(f"registry: version {version} is not promoted: {'; '.join(problems)}")
    how: How = "despite" if refused else "hand"
    registry.promote(version, newest.seal, expected=reigning, how=how, reason=despite)
    return f"{version} is the champion now; the previous one is {reigning or 'none'}"


def rollback(registry: FolderRegistry, reason: str | None = None) -> str:
    """Make the previous champion the champion again, and say so; errors are those of ``FolderRegistry.rollback``."""
    pointer = registry.rollback(reason)
    taken_back = pointer.previous.version if pointer.previous else "none"
    return f"{pointer.version} is the champion again; {taken_back} is the previous one, so rollback would undo this"


def _refused(newest: Judged, reigning: str | None) -> str | None:
    """Return why a version's verdict does not let it replace the champion, with what can be done, or None."""
    if newest.verdict.decision != "promote":
        return f"its newest verdict is {newest.verdict.decision}: {newest.verdict.reason}"
    if newest.against != reigning and reigning is not None:
        return (
            f"its newest verdict was made against {newest.against or 'no champion'}, and {reigning} reigns\n"
            "  compare it with that one: run.py train with the config of its run, in which only the comparison is new\n"
            "  look first: run.py evaluate VERSION --config CONFIG, which keeps nothing"
        )
    return None


def _changed(registry: FolderRegistry, judged: Judged) -> list[str]:
    """Return what differs in the evidence of a later decision; that of the version is looked at anyway."""
    if judged.decision is None:
        return []
    folder = registry.decision(judged.decision.version, judged.decision.seal)
    return differences(folder / "evidence", judged.decision.evidence_files)


def _against(registry: FolderRegistry, place: str) -> str | None:
    """Return the champion that a stored evaluation looked at."""
    text = registry.read(f"{place}/evidence/evaluation/{SUMMARY}")
    champion = json.loads(text)["terms"]["champion"] if text else None
    return str(champion["version"]) if champion else None
