"""`run.py registry`: list, show, promote, rollback and gc, as a person or a script uses them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from registries import VERDICT, at_once, consistent, evaluation, opened, publish

import run as command_line
from preference_tuning import interruption, jobs
from preference_tuning.errors import OvertakenError
from preference_tuning.evaluation.gate import Rule, Verdict
from preference_tuning.registry import operations
from preference_tuning.registry.folder import FolderRegistry
from preference_tuning.registry.pushing import Receipt

HOLD = Verdict(
    decision="hold",
    candidate="dpo",
    rules=[Rule(name="loss", measured="0.9", wanted="at most 0.5", outcome="failed")],
)
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def registry(tmp_path: Path) -> FolderRegistry:
    return opened(tmp_path / "registry")


@pytest.fixture
def command(
    registry: FolderRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run a verb of ``run.py registry``; returns the exit code and what it said."""
    config = tmp_path / "run.yaml"
    parameters = {
        "base_model": {"source": "org/base"},
        "data": {"source": "rows.jsonl"},
        "registry": {"folder": registry.place, "name": "m"},
    }
    config.write_text(yaml.safe_dump({"parameters": parameters}))
    monkeypatch.setattr(interruption, "watch", lambda: None)

    def run(verb: str, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["run.py", "registry", verb, "--config", str(config), *words])
        capsys.readouterr()
        try:
            command_line.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return run


def pushed(registry: FolderRegistry, version: str) -> None:
    receipt = Receipt.model_validate(
        {"target": "huggingface:org/m", "version": version, "state": "failed", "asked": "a", "attempts": 2,
         "updated": "2026-11-26T00:00:00Z", "reason": "no such repository", "facts": {"commit": "c0ffee"}}
    )  # fmt: skip
    registry.write(f"receipts/{version}/1.json", receipt.model_dump_json())


def test_every_version_in_a_table(registry: FolderRegistry, tmp_path: Path, command: Command) -> None:
    assert command("list") == (0, f"m: no versions in {registry.place}\n")
    one, two, three = (
        publish(registry, tmp_path, "1"),
        publish(registry, tmp_path, "2"),
        publish(registry, tmp_path, "3", verdict=HOLD),
    )
    registry.promote(one)
    registry.promote(two)
    registry.keep_decision(one, evaluation(tmp_path / "later", two), {}, "7" * 64, HOLD)
    pushed(registry, two)
    code, shown = command("list")
    rows = {line.split()[0]: line for line in shown.splitlines()[3:]}
    assert (code, list(rows)) == (0, [three, two, one]), "the newest first"
    assert shown.splitlines()[2].split("  ")[0] == "VERSION"
    assert rows[two].split()[3:5] == ["dpo", "org/base"]
    assert "0.750 [0.500, 1.000]" in rows[two]
    assert rows[two].endswith("promote  champion  huggingface:org/m failed")
    assert rows[one].endswith("hold     previous"), "its newest verdict"
    assert rows[three].endswith("hold")
    document = json.loads(command("list", "--json")[1])
    assert (document["champion"]["version"], document["previous"]["version"]) == (two, one)
    row = document["versions"][1]
    assert (row["version"], row["state"], row["decision"]) == (two, "champion", "promote")
    assert (row["rewards/accuracies"]["low"], row["pushes"]) == (0.5, {"huggingface:org/m": "failed"})


def test_the_registry_as_a_page(registry: FolderRegistry, tmp_path: Path, command: Command) -> None:
    page = tmp_path / "pages" / "m.html"
    assert command("page", "--to", str(page)) == (0, f"{page}\n")
    assert "none yet" in page.read_text(encoding="utf-8")
    one, two = publish(registry, tmp_path, "1"), publish(registry, tmp_path, "2", verdict=HOLD)
    registry.promote(one, how="despite", reason="<script>alert(1)</script>")
    pushed(registry, one)
    assert command("page", "--to", str(page))[0] == 0
    html = page.read_text(encoding="utf-8")
    for text in (
        f"<b>{one}</b><span>champion</span>",
        "0.750 [0.500, 1.000]",
        "<svg",
        f"<title>{two}: ",
        "<span class='badge hold'>hold</span>",
        "loss: 0.9, wanted at most 0.5",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "huggingface:org/m",
        "<span class='badge failed'>failed</span>",
        "no such repository",
    ):
        assert text in html, text
    assert "<script" not in html
    assert [path.name for path in page.parent.iterdir()] == ["m.html"], "nothing is left beside it"


def test_a_verb_writes_the_page_anew_where_there_is_one(
    registry: FolderRegistry, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = publish(registry, tmp_path, "1"), publish(registry, tmp_path, "2")
    registry.promote(one)
    page = tmp_path / "outputs" / "registry-m.html"
    registry.promote(two)
    assert command("rollback")[0] == 0
    assert not page.exists()
    assert command("page") == (0, "outputs/registry-m.html\n")
    assert f"<b>{one}</b><span>champion</span>" in page.read_text(encoding="utf-8")
    assert command("rollback")[0] == 0
    assert f"<b>{two}</b><span>champion</span>" in page.read_text(encoding="utf-8")


def test_all_of_one_version(registry: FolderRegistry, tmp_path: Path, command: Command) -> None:
    one, two = publish(registry, tmp_path, "1", verdict=HOLD), publish(registry, tmp_path, "2", against="f" * 16)
    registry.promote(two, "5" * 64)
    registry.promote(one, "5" * 64, how="despite", reason="a demonstration")
    pushed(registry, one)
    code, shown = command("show")
    assert code == 0
    for text in (
        f"version    {one} of m, the champion",
        "base model org/base (x)",
        "rows.jsonl: 9 training, 3 held out",
        "run        zenml_run training-1",
        "verdict    hold: loss: 0.9, wanted at most 0.5",
        "failed: loss: 0.9, wanted at most 0.5",
        "model/adapter_model.safetensors",
        "huggingface:org/m: failed, 2026-11-26 00:00:00 UTC",
        "no such repository",
        "commit c0ffee",
        f"{two} -> {one}, despite by ",
        ": a demonstration",
        "0.750 [0.500, 1.000]",
        "not a number",
    ):
        assert text in shown, text
    assert f"against {'f' * 16}" in command("show", two[:5])[1]
    document = json.loads(command("show", "champion", "--json")[1])
    assert document["manifest"]["id"] == one
    assert [verdict["decision"] for verdict in document["verdicts"]] == ["hold"]
    assert [change["how"] for change in document["history"]] == ["despite"]
    assert document["receipts"][0]["target"] == "huggingface:org/m"
    code, said = command("show", "nothing")
    assert (code, said) == (
        2,
        f"error: registry: no version 'nothing' of 'm' in {registry.place}; there are: {', '.join(registry.ids())}\n",
    )
    assert command("show", "../../etc")[0] == 2


def test_a_version_is_promoted_by_hand_as_its_verdict_allows(
    registry: FolderRegistry, tmp_path: Path, command: Command
) -> None:
    one, held = publish(registry, tmp_path, "1"), publish(registry, tmp_path, "2", verdict=HOLD)
    two, three = publish(registry, tmp_path, "3", against=one), publish(registry, tmp_path, "4", against="f" * 16)
    assert command("promote", one) == (0, f"{one} is the champion now; the previous one is none\n")
    assert command("promote", one) == (0, f"{one} is the champion already\n")
    code, said = command("promote", held)
    assert code == 1
    assert "its newest verdict is hold: loss: 0.9" in said
    assert '--despite "REASON"' in said
    code, said = command("promote", three)
    assert (code, f"made against {'f' * 16}, and {one} reigns" in said) == (1, True)
    assert command("promote", two)[0] == 0, "it was compared with the champion"
    # A later comparison with the present champion counts, and only as it was stored.
    folder = registry.keep_decision(three, evaluation(tmp_path / "later", two), {}, "7" * 64, VERDICT)
    report = folder / "evidence/evaluation/report.html"
    kept = report.read_text()
    report.write_text("changed")
    assert "evaluation/report.html was changed" in command("promote", three)[1]
    report.write_text(kept)
    assert command("promote", three)[0] == 0
    assert command("promote", held, "--despite", "a demonstration")[0] == 0
    last = registry.history()[-1]
    assert (last.how, last.reason, last.before, last.after) == ("despite", "a demonstration", three, held)
    assert [change.how for change in registry.history()] == ["hand", "hand", "hand", "despite"]
    assert consistent(registry) == (held, three)


def test_two_people_promote_at_once(registry: FolderRegistry, tmp_path: Path) -> None:
    versions = [publish(registry, tmp_path, weights) for weights in ("1", "2")]
    codes = at_once(
        *(lambda version=version: operations.promote(opened(registry.place), version) for version in versions)
    )
    champion = consistent(registry)[0]
    assert (sorted(codes) in ([0, OvertakenError.exit_code], [0, 1]), champion in versions) == (True, True)


def test_rollback(registry: FolderRegistry, tmp_path: Path, command: Command) -> None:
    one, two = publish(registry, tmp_path, "1"), publish(registry, tmp_path, "2")
    assert command("rollback") == (2, f"error: registry: 'm' in {registry.place} has no previous champion\n")
    registry.promote(one)
    registry.promote(two)
    assert command("rollback", "--reason", "rude") == (
        0,
        f"{one} is the champion again; {two} is the previous one, so rollback would undo this\n",
    )
    assert registry.history()[-1].reason == "rude"
    assert command("rollback")[0] == 0
    assert consistent(registry) == (two, one)


def test_old_versions_are_removed_with_what_belongs_to_them(
    registry: FolderRegistry, tmp_path: Path, command: Command
) -> None:
    ids = [publish(registry, tmp_path, str(number)) for number in range(8)]
    registry.promote(ids[0])
    registry.promote(ids[2])
    registry.keep_decision(ids[1], evaluation(tmp_path / "later"), {}, "7" * 64, VERDICT)
    registry.keep_decision(ids[7], evaluation(tmp_path / "later"), {}, "8" * 64, VERDICT)
    for version in (ids[1], ids[7]):
        pushed(registry, version)
    before = sum(registry.storage.sizes("").values())
    code, said = command("gc", "--keep", "3", "--dry-run")
    assert (code, said.splitlines()[:2]) == (0, [f"would remove  {ids[1]}", f"would remove  {ids[3]}"])
    assert sum(registry.storage.sizes("").values()) == before
    would = said.splitlines()[-1]
    code, said = command("gc", "--keep", "3")
    freed = before - sum(registry.storage.sizes("").values())
    assert said.splitlines()[-1] == f"5 versions kept, freed {freed:,} bytes" == would.replace("would free", "freed")
    assert set(registry.ids()) == {ids[0], ids[2], *ids[5:]}
    assert registry.names("decisions") == [f"{ids[7]}-{'8' * 16}"]
    assert registry.names("receipts") == [ids[7]]
    assert consistent(registry) == (ids[2], ids[0])
    assert command("gc")[1] == "5 versions kept, freed 0 bytes\n"
    assert command("gc", "--keep", "-1")[0] == 2
    assert command("gc", "--keep", "0")[1].endswith("bytes\n")
    assert set(registry.ids()) == {ids[0], ids[2]}
    jobs.write_text(registry.path(ids[0]) / "manifest.json", "{}")
    code, said = command("gc", "--keep", "0")
    assert (code, "manifest.json of" in said) == (1, True)
    assert len(registry.names("versions")) == 2, "what cannot be read is not removed"
