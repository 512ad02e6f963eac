"""Notifications: what is told, to whom, and that a receiver which fails or hangs harms nobody and tells no secret."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from registries import opened, publish

from pipelines import ending, telling
from preference_tuning import config, continuing, interruption
from preference_tuning.config import RunConfig
from preference_tuning.errors import (
    AlreadyRunningError,
    ConfigError,
    DataError,
    DivergedError,
    InterruptedJobError,
    OvertakenError,
    PreferenceTuningError,
)
from preference_tuning.notifying import message, receivers, sending
from preference_tuning.notifying.message import Message
from preference_tuning.preflight import places
from preference_tuning.registry.folder import FolderRegistry
from preference_tuning.retraining import history
from preference_tuning.retraining.history import Result, Run

SECRET = "T000-canary-of-the-hook"
FAILED = Message(outcome="failed", model="m", trigger="night", started="2026-01-01", exit_code=3, error="no rows <a&b>")


class Hook:
    """A server that takes what is posted; ``answer`` is its code, or None: it never answers."""

    def __init__(self) -> None:
        self.answer: int | None = 200
        self.taken: list[tuple[str, Any]] = []
        self.over = threading.Event()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.taken.append((self.path, json.loads(body)))
                if hook.answer is None:
                    hook.over.wait(30)
                    return
                self.send_response(hook.answer)
                if hook.answer == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/services/{SECRET}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    made = Hook()
    monkeypatch.setenv("HOOK_URL", made.url)
    yield made
    made.close()


def configured(folder: Path, *notify: dict[str, Any]) -> RunConfig:
    """Return the config of a file with such receivers."""
    parameters = {
        "base_model": {"source": "org/base"}, "data": {"source": "rows.jsonl"}, "notify": list(notify),
        "output_dir": str(folder / "outputs"), "registry": {"folder": str(folder / "registry"), "name": "m"},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"parameters": parameters}), encoding="utf-8")
    return config.load(path).config


def send(told: Message, run: RunConfig, alerts: list[str] | None = None) -> list[str]:
    return sending.send(told, run.notify, (alerts if alerts is not None else []).append)


def completed(registry: FolderRegistry, folder: Path, promoted: bool) -> Run:
    version = publish(registry, folder)
    result = Result(
        version=version, promoted=promoted, decision="promote" if promoted else "hold", reason="all 5 rules passed",
        champion=version, run="m-night-1", links={"comet": "https://comet.example/1"},
    )  # fmt: skip
    now = datetime.now(UTC)
    outcome: Any = "promoted" if promoted else "held"
    return Run(name="m", trigger="night", started=now, ended=now, outcome=outcome, exit_code=0, result=result)


def test_a_webhook_gets_what_its_kind_takes(tmp_path: Path, hook: Hook) -> None:
    here = {"to": "webhook", "url_env": "HOOK_URL"}
    run = configured(tmp_path, here, {**here, "format": "slack"}, {**here, "format": "discord"})
    assert send(FAILED, run) == []
    bodies = [body for path, body in hook.taken if path == f"/services/{SECRET}"]
    plain = next(body for body in bodies if "outcome" in body)
    assert (plain["outcome"], plain["exit_code"], plain["error"]) == ("failed", 3, "no rows <a&b>")
    assert next(body for body in bodies if set(body) == {"text"})["text"].endswith("no rows &lt;a&amp;b&gt;")
    discord = next(body for body in bodies if "content" in body)
    assert discord["allowed_mentions"] == {"parse": []}
    assert discord["content"] == FAILED.text() == "m: failed (exit code 3)\nno rows <a&b>"


def test_each_receiver_hears_of_what_it_asked_for(tmp_path: Path, hook: Hook) -> None:
    alerts: list[str] = []
    run = configured(
        tmp_path,
        {"to": "webhook", "url_env": "HOOK_URL", "on": ["promoted"]},
        {"to": "alerter", "on": ["failed", "held"]},
    )
    send(FAILED, run, alerts)
    assert (len(hook.taken), alerts) == (0, [FAILED.text()])
    send(FAILED.model_copy(update={"outcome": "promoted", "version": "v1"}), run, alerts)
    assert (hook.taken[0][1]["title"], len(alerts)) == ("m: v1 is the champion now", 1)


def test_a_command_gets_the_message_and_its_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keep = (
        "import json, os, sys; json.dump([json.load(sys.stdin), "
        "{k: v for k, v in os.environ.items() if k.startswith('PREFERENCE_TUNING_')}, sys.argv[1:]], open('got', 'w'))"
    )
    run = configured(tmp_path, {"to": "command", "run": [sys.executable, "-c", keep, "a b", "$HOME"]})
    assert send(FAILED.model_copy(update={"error": "a\0b"}), run) == []
    told, variables, arguments = json.loads((tmp_path / "got").read_text(encoding="utf-8"))
    assert (told["outcome"], told["error"]) == ("failed", "a\0b")
    assert variables["PREFERENCE_TUNING_EXIT_CODE"] == "3"
    assert variables["PREFERENCE_TUNING_ERROR"] == "a b"
    assert variables["PREFERENCE_TUNING_TEXT"].startswith("m: failed")
    assert "PREFERENCE_TUNING_VERSION" not in variables
    assert arguments == ["a b", "$HOME"], "no shell"


def test_what_fails_or_hangs_is_a_warning_in_time(
    tmp_path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(receivers, "SECONDS", 1.0)
    monkeypatch.setenv("NOWHERE_URL", f"http://127.0.0.1:1/{SECRET}")
    monkeypatch.setenv("ODD_URL", f"http://127.0.0.1:1/{SECRET}\x01 x")
    monkeypatch.setenv("NO_URL", f"ftp://{SECRET}")
    sleep = [sys.executable, "-c", "import subprocess, sys; subprocess.run(['sleep', '30'])"]
    hook.answer = None
    webhooks = [
        {"to": "webhook", "url_env": name} for name in ("HOOK_URL", "NOWHERE_URL", "ODD_URL", "NO_URL", "UNSET_URL")
    ]
    commands = [sleep, [sys.executable, "-c", "raise SystemExit(7)"], ["no-such-program"]]
    run = configured(tmp_path, *webhooks, *({"to": "command", "run": words} for words in commands), {"to": "alerter"})

    def broken(text: str) -> None:
        raise RuntimeError(SECRET)

    before = time.monotonic()
    warnings = sending.send(FAILED, run.notify, broken)
    assert time.monotonic() - before < 4
    said = [warning.partition("): ")[2] for warning in warnings]
    assert said == [
        "ReadTimeout", "ConnectError", "InvalidURL", "NO_URL holds no address that begins with https://",
        "UNSET_URL is not set", "took longer than 1 s", "ended with 7", "'no-such-program' is no program here",
        "RuntimeError",
    ]  # fmt: skip
    shown = capfd.readouterr()
    assert shown.err.count("warning: notify.") == 9
    assert SECRET not in shown.err + shown.out

    hook.answer = 302
    assert send(FAILED, configured(tmp_path, webhooks[0])) == ["notify.0 (webhook): it answered 302"]
    assert not [path for path, _ in hook.taken if path == "/elsewhere"], "a redirect leads nowhere"


def test_a_run_is_told_with_its_figures(tmp_path: Path, hook: Hook, capfd: pytest.CaptureFixture[str]) -> None:
    """From the end of a run to the webhook: the one place that all commands go through."""
    run = configured(tmp_path, {"to": "webhook", "url_env": "HOOK_URL"})
    ended = completed(opened(tmp_path / "registry"), tmp_path, promoted=True)
    ending.after(run, ended)
    ((_, told),) = hook.taken
    assert told["title"] == f"m: {ended.result and ended.result.version} is the champion now"
    assert told["links"]["comet"] == "https://comet.example/1"
    assert told["started"]
    assert "verdict: promote: all 5 rules passed" in told["text"]
    assert (tmp_path / "outputs" / "registry-m.html").is_file()
    for outcome in ("interrupted", "skipped", "locked", "submitted"):
        ending.after(run, ended.model_copy(update={"outcome": outcome}))
    assert len(hook.taken) == 1
    assert capfd.readouterr().err == ""
    ending.after(run, ended.model_copy(update={"result": Result(**{**vars(ended.result), "version": "a" * 8})}))
    assert hook.taken[1][1]["version"] == "a" * 8, "a version that is gone is told without its figures"


def test_the_text_has_what_matters_and_an_end() -> None:
    told = Message(
        outcome="held", model="m", trigger="t", started="s", version="v2", decision="hold", reason="too long",
        champion="v1", figures={"reward accuracy": {"base": "", "dpo": "0.75 [0.5, 1.0]"}},
        worse=[f"w{i}" for i in range(7)], links={"report": "/r"},
    )  # fmt: skip
    assert told.text().splitlines() == [
        "m: v2 held; the champion is v1", "verdict: hold: too long", "reward accuracy: 0.75 [0.5, 1.0]",
        *(f"worse: w{i}" for i in range(message.WORSE)), "and 2 more", "report: /r",
    ]  # fmt: skip
    long = FAILED.model_copy(update={"error": "x" * 5000})
    assert len(long.text()) < 2000


def test_receivers_are_looked_at_before_a_run(tmp_path: Path, hook: Hook) -> None:
    run = configured(
        tmp_path, {"to": "webhook", "url_env": "HOOK_URL", "format": "slack"}, {"to": "command", "run": ["no-such-program"]},
        {"to": "webhook", "url_env": "UNSET_URL"}, {"to": "alerter"},
    )  # fmt: skip
    assert places.notify(run).splitlines() == [
        "4 receivers", "webhook in HOOK_URL (slack)", "warning: notify.1: 'no-such-program' is no program here",
        "warning: notify.2: UNSET_URL is not set",
    ]  # fmt: skip
    assert places.notify(configured(tmp_path)) == "nobody"
    assert not hook.taken


def test_mistakes_have_their_line_and_show_no_address(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as wrong:
        configured(tmp_path, {"to": "webhook", "url_env": f"https://hooks.example/{SECRET}"}, {"to": "pigeon"})
    assert SECRET not in str(wrong.value)
    assert "to 'pigeon': `to` must say who is told: webhook, command or alerter" in str(wrong.value)


def test_what_is_published_of_a_command_names_no_folder(tmp_path: Path) -> None:
    run = configured(tmp_path, {"to": "command", "run": ["/home/me/bin/tell.sh", "night"]})
    assert run.portable().model_dump(mode="json")["notify"][0]["run"] == ["tell.sh", "night"]


# --- the last line of a failure ---------------------------------------------------------------------------------------

LINES = {
    "interrupted": (
        InterruptedJobError("by SIGTERM"),
        "Continue: the same command again, or python run.py resume 'my run'",
    ),
    "diverged": (DivergedError("nan\nmore"), "Change what it names in the config, then: python run.py train CONFIG"),
    "overtaken": (OvertakenError("by v2"), "Continue: the same command again, or python run.py resume 'my run'"),
    "data": (DataError("no rows"), "Mend it, then: python run.py resume 'my run'"),
    "unexpected": (RuntimeError("a bug"), "Mend it, then: python run.py resume 'my run'"),
}


@pytest.mark.parametrize(("error", "after"), LINES.values(), ids=LINES)
def test_the_last_line_says_what_why_and_what_now(
    error: Exception, after: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "watch", lambda: None)
    continuing.note(error, "my run", "train_dpo")
    with pytest.raises(SystemExit) as ended, telling.told():
        raise error
    known = isinstance(error, PreferenceTuningError)
    assert ended.value.code == (error.exit_code if isinstance(error, PreferenceTuningError) else 1)
    shown = capsys.readouterr().err
    why = str(error).splitlines()[0] if known else "RuntimeError: a bug"
    assert shown.splitlines()[-1] == f"failed     train_dpo of my run: {why}. {after}"
    assert ("Traceback" in shown) != known


def test_what_fails_before_a_run_is_done_again_by_the_same_command() -> None:
    error = ConfigError("3 problems in run.yaml\n  a\n  b")
    assert continuing.last_line(error) == (
        "failed     before the run began: 3 problems in run.yaml. Mend it, then: the same command again"
    )
    assert history.facts_of(AlreadyRunningError("already running: pid 3"))["then"].endswith(
        "Later: the same command again"
    )


PIGEON = """
from pathlib import Path
from zenml.alerter import BaseAlerter, BaseAlerterConfig, BaseAlerterFlavor

class PigeonConfig(BaseAlerterConfig):
    to: str

class Pigeon(BaseAlerter):
    def post(self, message, params=None):
        Path(self.config.to).write_text(message)
        return True

class PigeonFlavor(BaseAlerterFlavor):
    name, config_class, implementation_class = "pigeon", PigeonConfig, Pigeon

if __name__ == "__main__":
    from zenml.client import Client
    from zenml.enums import StackComponentType
    client = Client()
    client.create_flavor("pigeon.PigeonFlavor", StackComponentType.ALERTER)
    client.create_stack_component("bird", "pigeon", StackComponentType.ALERTER, {"to": "flown.txt"})
    parts = {kind: "default" for kind in (StackComponentType.ORCHESTRATOR, StackComponentType.ARTIFACT_STORE)}
    client.create_stack("birds", {**parts, StackComponentType.ALERTER: "bird"})
    client.activate_stack("birds")
"""


@pytest.mark.whole
def test_the_alerter_of_the_stack_is_told(tmp_path: Path, tiny_model: Path) -> None:
    """A component of ZenML's active stack, as somebody would write it, and a night whose data is gone."""
    (tmp_path / "pigeon.py").write_text(PIGEON)
    receivers = [{"to": "alerter", "on": ["failed"]}]
    parameters = {"base_model": {"source": str(tiny_model)}, "data": {"source": "gone.jsonl"}, "notify": receivers}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"parameters": parameters}))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "ZENML_CONFIG_PATH": str(tmp_path / "zenml")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)

    alone = run(str(ROOT / "run.py"), "retrain", "run.yaml")
    assert "warning: notify.0 (alerter): the active stack has no alerter" in alone.stderr, alone.stderr
    assert run("pigeon.py").returncode == 0
    assert run(str(ROOT / "run.py"), "retrain", "run.yaml").returncode == 3
    flown = (tmp_path / "flown.txt").read_text()
    assert "preference-tuned" in flown
    assert "gone.jsonl" in flown
