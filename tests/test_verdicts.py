"""The gate on models that were really trained: better, equal and worse ones; and what is stored of a verdict.

One history in one registry, in this order: a champion that has a quarter of the preferences the wrong way round; a rival
that is better than it; an improved model that becomes champion before the rival is registered; three made worse.
"""

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import preference_rows, tiny_parameters
from in_process import Lab
from registries import s3, use
from test_judge import Read, endpoint, say, the_first

import run as command_line
from preference_tuning import assessment, fingerprint, interruption, jobs
from preference_tuning.config import RegistryConfig
from preference_tuning.errors import ConfigError, DataError, OvertakenError, PreferenceTuningError
from preference_tuning.evaluation import job as evaluation_job
from preference_tuning.evaluation.job import Evaluation
from preference_tuning.registry import result, summary, verification, versions
from preference_tuning.registry.champion import to_beat
from preference_tuning.registry.folder import FolderRegistry
from preference_tuning.registry.result import Registered, Result

pytestmark = pytest.mark.whole

HELD_OUT = 48
Rows = list[dict[str, Any]]


def rows() -> Rows:
    """Plain answers over shouted ones, and in every fourth pair plain answers over doubtful ones."""
    made = []
    for number, row in enumerate(preference_rows(4 * HELD_OUT)):
        row.pop("topic")
        doubtful = {"rejected": f"perhaps perhaps or perhaps not, {number % 5}?"} if number % 4 == 0 else {}
        # Every group of sixteen has four held-out pairs, one of them doubtful.
        made.append({**row, **doubtful, "split": "test" if number % 16 < 4 else "train"})
    return made


def swapped(made: Rows, where: Callable[[int, dict[str, Any]], bool]) -> Rows:
    """Return the rows with the labels of some training pairs the other way round; held-out pairs stay right."""
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        if row["split"] == "train" and where(i, row)
        else row
        for i, row in enumerate(made)
    ]


class History:
    """The runs of this module and what became of them."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        right, chance = rows(), random.Random(5)
        self.data = {
            "right": lab.rows("right", right),
            "weak": lab.rows("weak", swapped(right, lambda i, row: i % 4 == 0)),
            "swapped": lab.rows("swapped", swapped(right, lambda i, row: True)),
            "noise": lab.rows("noise", swapped(right, lambda i, row: chance.random() < 0.5)),
        }
        self.weak = lab.run(**self.on("weak"))[1]
        self.rival_trained = lab.train(**self.on("right", dpo={"seed": 7}))
        self.improved = lab.run(**self.on("right"))[1]
        self.rival = result.register(self.rival_trained, self.rival_trained.config.registry)
        self.worse: dict[str, Registered] = {}

    def on(self, data: str, **changes: Any) -> dict[str, Any]:
        return {"data": {"source": self.data[data]}, **changes}

    def made_worse(self, name: str) -> Registered:
        changes = {"too fast": self.on("right", dpo={"learning_rate": 0.1})}.get(name) or self.on(name)
        return self.lab.run(**changes)[1]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[History]:
    import signal

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    parameters = tiny_parameters(tiny_model, Path("none"))
    stage = {"per_device_train_batch_size": 16, "num_train_epochs": 1, "learning_rate": 2e-3, "eval_steps": 0.5}
    parameters["base_model"] |= {"threads": 1, "device": "cpu"}
    parameters["lora"] = {"rank": 4, "alpha": 8}
    parameters["data"] = {}
    parameters["sft"] |= stage
    parameters["dpo"] |= stage
    parameters["evaluation"] = {"samples": 4, "max_new_tokens": 8, "batch_size": 16}
    with pytest.MonkeyPatch.context() as patch:
        yield History(Lab(tmp_path_factory.mktemp("verdicts"), parameters, patch))
    for number, handler in handlers.items():
        signal.signal(number, handler)


def failed(registered: Registered) -> list[str]:
    return [rule.name for rule in registered.verdict.rules if rule.outcome == "failed"]


def evaluation_of(registered: Registered) -> Evaluation:
    return evaluation_job.load_summary(registered.folder / "evidence" / "evaluation")


def test_an_improved_model_replaces_the_champion(history: History) -> None:
    assert history.weak.verdict.rules[-1].name == "first model"
    assert history.weak.promoted
    accuracy = evaluation_of(history.improved).models["champion"]["rewards/accuracies"].value
    assert accuracy < 0.9, "the champion errs where it was taught to"
    assert history.improved.verdict.decision == "promote"
    assert history.improved.verdict.rules[-1].name.endswith(f"champion {history.weak.version.id}")
    assert history.improved.promoted


def test_an_equal_model_is_held_by_the_champion_that_reigns_when_it_is_registered(history: History) -> None:
    """Its run had found it better than the champion of that hour; then another model was promoted."""
    before = evaluation_job.load_summary(history.rival_trained.evaluation)
    assert (before.verdict.decision, before.champion) == ("promote", history.weak.version.id)
    assert evaluation_of(history.rival).champion == history.improved.version.id
    assert history.rival.verdict.decision == "hold"
    assert failed(history.rival) == [history.rival.verdict.rules[-1].name]
    assert f"champion {history.improved.version.id}: 0.000" in history.rival.verdict.reason
    assert not history.rival.promoted


@pytest.mark.parametrize(
    ("name", "reason"),
    [("swapped", "reward accuracy against sft"), ("too fast", "rise of the loss"), ("noise", "reward accuracy less")],
)
def test_a_model_made_worse_is_held_for_the_right_reason(history: History, name: str, reason: str) -> None:
    worse = history.made_worse(name)
    assert worse.verdict.decision == "hold"
    assert [rule for rule in failed(worse) if rule.startswith(reason)], worse.verdict
    assert failed(worse)[-1].endswith(f"champion {history.improved.version.id}")
    assert not worse.promoted


def test_nothing_is_compared_with_a_damaged_champion(history: History) -> None:
    weights = history.improved.folder / "model" / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + b"x")
    try:
        with pytest.raises(PreferenceTuningError, match=r"is not what was published .* was changed"):
            result.register(history.rival_trained, history.rival_trained.config.registry)
    finally:
        weights.write_bytes(kept)


def copy_of(history: History, folder: Path) -> FolderRegistry:
    shutil.copytree(history.lab.registry.root, folder / "registry")
    return FolderRegistry(RegistryConfig(folder=str(folder / "registry")))


def test_a_later_verdict_on_the_same_model_is_kept_with_its_evidence(history: History, tmp_path: Path) -> None:
    """The rival was held; the champion that held it goes, and it is promoted by the evaluation against the other."""
    registry = copy_of(history, tmp_path)
    rival = history.rival.version.id
    registry.promote(history.weak.version.id)
    again: Result = history.rival_trained
    config = RegistryConfig(folder=str(registry.root))
    registered = result.register(again, config)
    assert registered.promoted
    assert registered.version.verdict.decision == "hold", "what was published stays as it was"
    pointer = registry.champion()
    assert pointer is not None
    assert pointer.seal == evaluation_job.load_summary(registered.evaluation).seal
    found = verification.verify(registry, "champion")
    assert (found.title.startswith(f"version {rival}"), "verdict promote" in found.title) == (True, True)
    assert str(found).splitlines()[-1] == "holds", found
    before = {path.name for path in (registry.folder / "decisions").iterdir()}
    result.register(again, config)
    assert {path.name for path in (registry.folder / "decisions").iterdir()} == before
    path = registry.decision(rival, pointer.seal) / "evidence" / "evaluation" / "scores.parquet"
    path.write_bytes(path.read_bytes() + b"x")
    assert "evaluation/scores.parquet was changed" in str(verification.verify(registry, "champion"))


def test_a_run_that_is_overtaken_stores_its_version_and_says_so(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one becomes champion after the comparison and before the promotion; then only the former is repeated."""
    registry = copy_of(history, tmp_path)
    registry.promote(history.weak.version.id)
    again, config = history.rival_trained, RegistryConfig(folder=str(registry.root))
    publish, improved = FolderRegistry.publish, history.improved.version.id

    def overtaken(self: FolderRegistry, *what: Any, **more: Any) -> Any:
        registry.promote(improved)
        return publish(self, *what, **more)

    with monkeypatch.context() as patch:
        patch.setattr(FolderRegistry, "publish", overtaken)
        with pytest.raises(OvertakenError, match=f"{improved} became champion .* against {history.weak.version.id}"):
            result.register(again, config)
    assert registry.verify(history.rival.version.id) == []
    assert registry.find("champion") == improved
    registered = result.register(again, config)
    assert (registered.verdict.decision, registered.promoted) == ("hold", False)
    assert evaluation_job.load_summary(registered.evaluation).champion == improved


def test_a_rollback_is_not_undone_by_the_same_run(history: History, tmp_path: Path) -> None:
    registry = copy_of(history, tmp_path)
    registry.promote(history.weak.version.id)
    again, config = history.rival_trained, RegistryConfig(folder=str(registry.root))
    assert result.register(again, config).promoted
    assert verification.verify(registry, "champion").problems == []
    registry.rollback("answers in Latin")
    registered = result.register(again, config)
    assert (registered.verdict.decision, registered.promoted) == ("promote", False)
    assert registered.taken_back
    assert "answers in Latin" in registered.metadata()["taken_back"]
    assert "not promoted: it was taken back on" in summary.render(again, registered, "off")


def test_a_registry_in_an_object_store(history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result is stored there, is the champion, is found again from another machine, and is what the next has to beat."""
    with s3() as address:
        config = RegistryConfig(folder=use(address, monkeypatch, tmp_path))
        first = result.register(history.rival_trained, config)
        assert first.promoted
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
        registry = FolderRegistry(config)
        assert str(verification.verify(registry, "champion")).splitlines()[-1] == "holds"
        champion = to_beat(registry, "another")
        assert champion is not None
        assert champion.folder.is_relative_to(tmp_path / "another machine")
        run = history.lab.config(**history.on("right"), registry={"folder": config.folder})
        assert f"version {first.version.id}" in assessment.assess("champion", run)


# --- what else is measured ------------------------------------------------------------------------------------------


def calmer(read: Read, _: int) -> str:
    """The answer that shouts less is the better one."""
    shouting = [sum(letter.isupper() for letter in read.quoted(f"ANSWER {name}")) for name in "AB"]
    return say("tie" if shouting[0] == shouting[1] else "A" if shouting[0] < shouting[1] else "B")


@pytest.mark.parametrize("able", [True, False])
def test_a_judge_and_general_text_are_part_of_the_evidence(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    """Trained nothing anew; a judge at chance is asked, told of, and not heeded."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    text = tmp_path / "general.txt"
    text.write_text("Water is wet.\n\nIt is old and useful.\n\nSalt, bread and wool.\n", encoding="utf-8")
    with endpoint(calmer if able else the_first) as there:
        asked = {"url": there.url, "model": "m", "prompts": 6, "calibration_pairs": 40, "requests_per_minute": 60_000}
        outcome = history.lab.train(**history.on("right", evaluation={"judge": asked, "general": str(text)}))
        assert len(there.read) > 80, "both orders of each labelled pair"
    found = evaluation_job.load_summary(outcome.evaluation)
    figures = found.models["dpo"]
    assert figures["judge/calibrated"].value == able, found.notes
    assert figures["judge/requests"].value == len(there.read)
    assert ("the judge is listened to" in found.notes[0]) == able
    (rule,) = [rule for rule in found.verdict.rules if rule.name.startswith("win rate")]
    assert (rule.outcome == "skipped") == (not able)
    if able:
        assert "judge/win_rate_vs_champion" in figures
    for model in ("base", "sft", "dpo", "champion"):
        assert found.models[model]["general/ppl"].value > 1
    change = found.models["sft"]["general/nll"].value - found.models["base"]["general/nll"].value
    assert found.models["sft"]["general/nll_change"].value == pytest.approx(change)
    assert {"files/judged.json", "files/general.parquet", "files/answers.parquet"} <= found.bonds.keys()
    report = (outcome.evaluation / evaluation_job.REPORT).read_text(encoding="utf-8")
    assert ("win rate" in report.lower(), "perplexity" in report.lower()) == (True, True)


# --- what --verify finds --------------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    jobs.write_json(path, document)


def mend(version: Path) -> None:
    """Make the manifest agree with what lies in the folder, as a careful forger would."""

    def change(document: dict[str, Any]) -> None:
        for part in ("model", "evidence"):
            document[f"{part}_files"] = fingerprint.manifest(version / part)
        document["seal"] = versions.seal_of(document)

    rewrite(version / "manifest.json", change)


def of_summary(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda version: rewrite(version / "evidence/evaluation/evaluation.json", change)


def of_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda version: rewrite(version / "manifest.json", change)


def of_table(name: str, change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def damage(version: Path) -> None:
        path = version / "evidence" / name
        pq.write_table(change(pq.read_table(path)), path)

    return damage


def a_score(table: pa.Table) -> pa.Table:
    values = table["dpo/chosen"].to_numpy().copy()
    values[0] -= 1
    return table.set_column(table.column_names.index("dpo/chosen"), "dpo/chosen", pa.array(values))


def an_answer(table: pa.Table) -> pa.Table:
    texts = [text + "!" for text in table["text"].to_pylist()]
    return table.set_column(table.column_names.index("text"), "text", pa.array(texts))


def a_side(table: pa.Table) -> pa.Table:
    sides = np.array(table["side"].to_pylist(), dtype=object)
    sides[list(sides).index("held_out")] = "train"
    return table.set_column(table.column_names.index("side"), "side", pa.array(sides.tolist()))


def a_byte(version: Path) -> None:
    path = version / "model" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def an_outcome(evaluation: dict[str, Any]) -> None:
    evaluation["verdict"]["rules"][2]["outcome"] = "failed"


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a score": (of_table("evaluation/scores.parquet", a_score), "what was measured: scores.parquet is not"),
    "an answer": (of_table("evaluation/answers.parquet", an_answer), "what was measured: answers.parquet is not"),
    "a judged reply": (
        lambda version: (version / "evidence/evaluation/judged.json").write_text("{}"), "judged.json was not there",
    ),
    "a figure": (
        of_summary(lambda e: e["models"]["dpo"]["nll/chosen"].update(value=0.1)), "figures, computed again: dpo nll/chosen is 0.1",
    ),
    "a rule's outcome": (of_summary(an_outcome), "verdict, decided again: reward accuracy against sft: failed, and"),
    "the decision": (
        of_summary(lambda e: e["verdict"].update(decision="hold")), "verdict, decided again: it is hold, and from what",
    ),
    "the terms": (
        of_summary(lambda e: e["terms"]["config"]["gate"].update(margin=0.2)), "terms of the verdict: they are not",
    ),
    "a bond": (of_summary(lambda e: e["bonds"].update(beta="x")), "config: dpo.beta"),
    "the seal": (of_summary(lambda e: e.update(seal="x")), "seal: it is not that of these figures"),
    "a byte of the adapter": (a_byte, "model and training records: its weights are not"),
    "the rules of the config": (
        of_manifest(lambda m: m["config"]["evaluation"]["gate"].update(margin=0.1)), "config: evaluation",
    ),
    "the training's config": (of_manifest(lambda m: m["config"]["sft"].update(learning_rate=1.0)), "config: sft"),
    "the base model": (of_manifest(lambda m: m["base_model"].update(fingerprint="x")), "base model: it is another one"),
    "the split": (of_table("data/split.parquet", a_side), "data and split: its split is another one"),
    "a training record": (
        lambda version: rewrite(version / "evidence/dpo/record.json", lambda r: r["identity"]["dpo"].update(seed=3)),
        "config: the record of DPO has other settings than its job",
    ),
    "the record of other weights": (
        lambda version: rewrite(version / "evidence/sft/record.json", lambda r: r.update(adapter_hash="x")),
        "model and training records: the record of SFT is that of other weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "told"), CHANGES.values(), ids=CHANGES)
def test_every_single_change_is_named(
    history: History, tmp_path: Path, change: Callable[[Path], Any], told: str
) -> None:
    """Both without and with a manifest that was made to agree."""
    registry = copy_of(history, tmp_path)
    version = registry.path(history.improved.version.id)
    change(version)
    found = verification.verify(registry, "champion")
    assert found.checks[0][1], "the files are not what was published"
    mend(version)
    found = verification.verify(registry, "champion")
    assert told in str(found), str(found)
    assert str(found).splitlines()[-1].startswith("does not hold: ")


# --- the command line -----------------------------------------------------------------------------------------------


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str, verb: str = "evaluate"
) -> tuple[int, str]:
    """Return the exit code of a command of ``run.py`` and what it printed."""
    monkeypatch.setattr(interruption, "watch", lambda: None)
    monkeypatch.setattr(sys, "argv", ["run.py", verb, *words])
    capsys.readouterr()
    try:
        command_line.main()
    except SystemExit as ended:
        return int(ended.code or 0), "".join(capsys.readouterr())
    return 0, "".join(capsys.readouterr())


def test_the_command(history: History, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = history.lab.config(**history.on("right"))
    path = history.lab.folder / "run.yaml"
    path.write_text(yaml.safe_dump({"parameters": config.model_dump(mode="json")}), encoding="utf-8")

    def evaluate(*words: str) -> tuple[int, str]:
        return command(monkeypatch, capsys, *words)

    code, told = evaluate("--verify", history.rival.version.id[:6], "--config", str(path))
    assert (code, told.splitlines()[-1]) == (0, "holds")
    code, told = evaluate(history.rival.version.id[:6], "--config", str(path))
    assert code == 0, told
    assert len(told.splitlines()) < 40, "one screen"
    assert f"model      version {history.rival.version.id} of preference-tuned (DPO)" in told
    assert f"champion   {history.improved.version.id}" in told
    assert "verdict    hold: " in told
    report = Path(told.splitlines()[-1].split()[-1])
    assert f"reward accuracy less that of the champion {history.improved.version.id}" in report.read_text()
    code, told = evaluate("champion", "--config", str(path))
    assert (code, f"champion   {history.weak.version.id}" in told) == (0, True), "it is judged against the one before"
    code, told = evaluate(str(history.rival_trained.adapters["sft"]), "--config", str(path))
    assert (code, "what it was trained on is not known here" in told) == (0, True)
    for words, expected, message in (
        (["champion"], 2, "needs --config"),
        ([], 2, "name a model or version"),
        (["nothing", "--config", str(path)], 2, "'nothing' is no folder, and no version of 'preference-tuned'"),
        (["--verify", "nothing", "--config", str(path)], 2, "no version 'nothing'"),
        (["champion", "--config", str(path), "--set", "data.splits.train=test"], 2, "unknown key"),
    ):
        code, told = evaluate(*words)
        assert (code, message in told) == (expected, True), told


def test_what_cannot_be_evaluated_is_refused(history: History, tmp_path: Path, tiny_model: Path) -> None:
    lab, version = history.lab, history.improved.version.id
    turned = [{**row, "split": "test" if row["split"] == "train" else "train"} for row in rows()]
    with pytest.raises(DataError, match=f"version {version} .* was trained on 144 of 144 held-out prompts"):
        assessment.assess("champion", lab.config(data={"source": lab.rows("turned", turned)}))
    other = shutil.copytree(tiny_model, tmp_path / "other")
    (other / "more.txt").touch()
    config = lab.config(**history.on("right", base_model={"source": str(other)}))
    for what in ("champion", str(history.rival_trained.adapters["sft"])):
        with pytest.raises(ConfigError, match=r"base_model\.source: .* was tuned from .*tiny-model"):
            assessment.assess(what, config)
    with pytest.raises(ConfigError, match="neither an adapter"):
        assessment.assess(str(tmp_path), lab.config(**history.on("right")))
