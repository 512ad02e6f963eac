"""The registry when processes die or work at the same moment: readers see the old state or the new, reruns complete."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from registries import (
    VERDICT,
    at_once,
    consistent,
    copied,
    empty_folders,
    evaluation,
    forked,
    killed_before,
    left,
    let_leases_end,
    opened,
    publish,
    trained,
)

from preference_tuning.registry import collecting
from preference_tuning.registry.folder import FolderRegistry

ENOUGH = 300


@dataclass
class Change:
    """Something that changes a registry, and what a reader may find while it happens."""

    act: Callable[[FolderRegistry], Any]
    before: tuple[str | None, str | None]
    after: tuple[str | None, str | None]
    ids: list[set[str]]


def publication(registry: FolderRegistry, folder: Path) -> None:
    """What a run does at its end: publish, and promote over the champion that it was compared with."""
    version = publish(registry, folder, "new")
    champion = registry.champion()
    registry.promote(version, "5" * 64, expected=champion.version if champion and champion.version != version else None)


def state(registry: FolderRegistry) -> tuple[Any, ...]:
    """Everything that is the same after an undisturbed change and after one that was killed and done again."""
    texts = [registry.read(name) for name in ("champion.json", "previous.json")]
    pointers = [json.loads(text)["version"] if text else None for text in texts]
    return left(registry), pointers, [(c.number, c.before, c.after) for c in registry.history()]


def killed_everywhere(template: Path, folder: Path, change: Change, act: Callable[[FolderRegistry], Any]) -> int:
    """Kill a change before each of its operations in turn, and return how many there are."""
    undisturbed = copied(template, folder / "undisturbed")
    act(undisturbed)
    for number in range(1, ENOUGH):
        registry = copied(template, folder / f"killed-{number}")
        if not killed_before(number, partial(act, registry)):
            assert consistent(registry) == change.after
            return number - 1
        reader = opened(registry.place)
        assert consistent(reader) in (change.before, change.after), number
        assert set(reader.ids()) in change.ids, number
        act(reader)
        assert consistent(reader) == change.after, number
        assert state(reader) == state(undisturbed), number
        assert empty_folders(reader) == empty_folders(undisturbed), number
    raise AssertionError("it never ended")


def test_the_first_publication_killed_before_each_operation(tmp_path: Path) -> None:
    known = publish(opened(tmp_path / "other"), tmp_path, "new")
    change = Change(partial(publication, folder=tmp_path), (None, None), (known, None), [set(), {known}])
    assert killed_everywhere(tmp_path / "nothing", tmp_path, change, change.act) > 30


def test_a_publication_killed_before_each_operation(tmp_path: Path) -> None:
    registry = opened(tmp_path / "template")
    one, two = publish(registry, tmp_path, "1"), publish(registry, tmp_path, "2")
    for version in (one, two):
        registry.promote(version)
    new = publish(opened(tmp_path / "other"), tmp_path, "new")

    def act(registry: FolderRegistry) -> None:
        registry.promote(publish(registry, tmp_path, "new"), "5" * 64, expected=two)

    change = Change(act, (two, one), (new, two), [{one, two}, {one, two, new}])
    assert killed_everywhere(tmp_path / "template", tmp_path, change, act) > 30


def test_a_rollback_killed_before_each_operation(tmp_path: Path) -> None:
    registry = opened(tmp_path / "template")
    one, two = publish(registry, tmp_path, "1"), publish(registry, tmp_path, "2")
    for version in (one, two):
        registry.promote(version)

    def act(registry: FolderRegistry) -> None:
        """What a person does who looks first."""
        if registry.find("champion") == two:
            registry.rollback()
        else:
            with registry.exclusive():
                pass  # the next writer, whoever it is

    change = Change(act, (two, one), (one, two), [{one, two}])
    assert killed_everywhere(tmp_path / "template", tmp_path, change, act) > 10


def test_a_decision_killed_before_each_operation(tmp_path: Path) -> None:
    registry = opened(tmp_path / "template")
    version = publish(registry, tmp_path)
    evidence = evaluation(tmp_path / "later")

    def act(registry: FolderRegistry) -> None:
        registry.keep_decision(version, evidence, {}, "7" * 64, VERDICT)

    def read(registry: FolderRegistry) -> None:
        assert len(registry.decisions(version)) in (0, 1)

    change = Change(act, (None, None), (None, None), [{version}])
    assert (
        killed_everywhere(tmp_path / "template", tmp_path, change, lambda registry: (read(registry), act(registry)))
        > 10
    )


def test_a_collection_killed_before_each_operation(tmp_path: Path) -> None:
    registry = opened(tmp_path / "template")
    ids = [publish(registry, tmp_path, str(number)) for number in range(4)]
    registry.promote(ids[0])
    registry.keep_decision(ids[1], evaluation(tmp_path / "later"), {}, "7" * 64, VERDICT)
    registry.write(f"receipts/{ids[1]}/1.json", "{}")
    seen = [set(ids), set(ids) - {ids[1]}, {ids[0], ids[3]}]
    change = Change(partial(collecting.collect, keep=1), (ids[0], None), (ids[0], None), seen)
    assert killed_everywhere(tmp_path / "template", tmp_path, change, change.act) > 15


@pytest.mark.parametrize("number", range(20))
def test_two_publications_at_once(tmp_path: Path, number: int) -> None:
    """Of two models one becomes champion, and the other run says that it was overtaken; the same model is one version."""

    def act(weights: str) -> None:
        registry = opened(tmp_path / "registry")
        registry.promote(publish(registry, tmp_path, weights), expected=None)

    trained(tmp_path, "same", "one", "two")
    if number % 2:
        codes = at_once(partial(act, "same"), partial(act, "same"))
        assert (codes, len(opened(tmp_path / "registry").ids())) == ([0, 0], 1)
    else:
        codes = at_once(partial(act, "one"), partial(act, "two"))
        assert (sorted(codes), len(opened(tmp_path / "registry").ids())) == ([0, 5], 2)
    registry = opened(tmp_path / "registry")
    champion, previous = consistent(registry)
    assert champion
    assert previous is None
    assert len(registry.history()) == 1
    assert not [name for name in left(registry) if "/." in name]


# --- in an object store ---------------------------------------------------------------------------------------------


def killed_before_request(number: int, act: Callable[[], Any]) -> bool:
    """Do something in a forked process that dies before its ``number``-th write to S3; False: it came so far."""

    def watched() -> None:
        import os

        from s3fs import S3FileSystem

        call, counted = S3FileSystem._call_s3, 0

        async def counting(self: Any, method: str, *arguments: Any, **named: Any) -> Any:
            nonlocal counted
            counted += method not in ("get_object", "head_object", "list_objects_v2")
            if counted == number:
                os._exit(9)
            return await call(self, method, *arguments, **named)

        S3FileSystem._call_s3 = counting
        act()

    code = forked(watched)
    assert code in (0, 9)
    return code == 9


@pytest.mark.faults
def test_a_publication_to_s3_killed_before_each_write(bucket: str, tmp_path: Path) -> None:
    new = publish(opened(tmp_path / "other"), tmp_path, "new")

    def prepared(folder: str) -> tuple[FolderRegistry, str]:
        registry = opened(f"{bucket}/{folder}")
        old = publish(registry, tmp_path, "old")
        registry.promote(old)
        return registry, old

    def act(folder: str) -> None:
        registry = opened(f"{bucket}/{folder}")
        registry.promote(publish(registry, tmp_path, "new"), "5" * 64, expected=old)

    undisturbed, old = prepared("undisturbed")
    act("undisturbed")
    for number in range(1, ENOUGH):
        registry, _ = prepared(str(number))
        if not killed_before_request(number, partial(act, str(number))):
            break
        assert consistent(registry) in ((old, None), (new, old)), number
        assert set(registry.ids()) in ({old}, {old, new}), number
        let_leases_end(registry)
        act(str(number))
        assert consistent(opened(registry.place)) == (new, old)
        assert state(registry) == state(undisturbed), number
    assert number > 12


def _collect(place: str) -> None:
    collecting.collect(opened(place), 1)


@pytest.mark.faults
def test_a_collection_on_s3_killed_before_each_write(bucket: str, tmp_path: Path) -> None:
    for number in range(1, ENOUGH):
        registry = opened(f"{bucket}/{number}")
        ids = [publish(registry, tmp_path, weights) for weights in ("1", "2")]
        registry.promote(ids[1])
        registry.write(f"receipts/{ids[0]}/1.json", "{}")
        if not killed_before_request(number, partial(_collect, registry.place)):
            break
        assert consistent(registry) == (ids[1], None), number
        let_leases_end(registry)
        collecting.collect(registry, 1)
        assert registry.ids() == [ids[1]]
        assert not [name for name in left(registry) if ids[0] in name or "/.begun" in name], number
    assert number > 8


@pytest.mark.parametrize("number", [pytest.param(n, marks=[pytest.mark.faults] if n > 1 else []) for n in range(20)])
def test_two_publications_to_s3_at_once(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def act(weights: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{number}-{weights}"))  # as if on two machines
        registry = opened(bucket)
        registry.promote(publish(registry, tmp_path, weights), expected=None)

    trained(tmp_path, "same", "one", "two")
    names = ("same", "same") if number % 2 else ("one", "two")
    codes = at_once(*(partial(act, name) for name in names))
    registry = opened(bucket)
    assert (sorted(codes), len(registry.ids())) == (([0, 0], 1) if number % 2 else ([0, 5], 2))
    assert consistent(registry)[1] is None
    assert len(registry.history()) == 1


def test_an_upload_that_was_killed_does_not_exist_and_is_cleared(bucket: str, tmp_path: Path) -> None:
    registry = opened(bucket)
    registry.check_writable()
    assert killed_before_request(9, lambda: publish(opened(bucket), tmp_path, "new"))
    assert [name for name in left(registry) if name.startswith("m/versions/")], "it had begun"
    assert registry.ids() == []
    let_leases_end(registry)
    other = publish(registry, tmp_path, "other")
    assert registry.ids() == [other]
    assert {name.split("/")[2] for name in left(registry) if name.startswith("m/versions/")} == {other}
    assert not [name for name in left(registry) if ".begun" in name]
