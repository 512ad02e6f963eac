"""Pushes to a hub on loopback, by the real client: what arrives, what a fault leaves, and what doing it again does."""

import copy
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import huggingface_hub
import pytest
from hub_server import Hub, Repo, token
from registries import write_weights

from preference_tuning import commandline, config
from preference_tuning.config import HuggingFacePush, RegistryConfig, RunConfig
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.evaluation.gate import Verdict
from preference_tuning.registry import pushing
from preference_tuning.registry.folder import FolderRegistry
from preference_tuning.registry.pushing import Bundle, Receipt, patience, report, targets
from preference_tuning.registry.pushing.targets.huggingface import HuggingFaceTarget, Merge, client
from preference_tuning.registry.pushing.targets.huggingface.files import INDEX

SECRET = "hf_canary_writer"
REPO = "me/model"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were to be waited; nobody does."""
    found: list[float] = []
    monkeypatch.setattr(patience, "pause", found.append)
    return found


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub_server.running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        yield hub


class Bench:
    """A registry with versions to push."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = RegistryConfig(folder=str(folder / "registry"), name="m")
        self.registry = FolderRegistry(self.config)

    def publish(self, weights: str = "w", promote: bool = True, model: Path | None = None, **more: str) -> str:
        if model is None:
            model = self.folder / f"model-{weights}"
            model.mkdir(parents=True, exist_ok=True)
            write_weights(model, weights * 3000)
            for name, text in {"adapter_config": "{}", "tokenizer": '{"v": 1}', **more}.items():
                (model / f"{name}.json").write_text(text)
        facts: dict[str, Any] = {
            "finetuning_type": "dpo", "base_model": {"fingerprint": "x"}, "data": {}, "config": {}, "code": "c",
            "metrics": {}, "verdict": Verdict(decision="promote", candidate="dpo", rules=[]), "run": {},
        }  # fmt: skip
        version = self.registry.publish(
            model, {}, {"README.md": f"---\nlibrary_name: peft\n---\n# {weights}\n"}, facts
        ).id
        if promote:
            self.registry.promote(version)
        return version

    def files(self, version: str) -> dict[str, bytes]:
        """What a repository that has the version holds, apart from the index."""
        folder = self.registry.path(version) / "model"
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def target(self, repo: str = REPO, merge: Merge | None = None, **entry: Any) -> HuggingFaceTarget:
        return HuggingFaceTarget(HuggingFacePush(to="huggingface", repo_id=repo, **entry), self.config, merge)

    def push(self, version: str, *to: Any, again: bool = False) -> Receipt:
        [receipt] = pushing.push(self.registry, version, to or [self.target()], self.folder / "aside", again)
        return receipt

    def receipts(self) -> str:
        return "".join(path.read_text() for path in self.registry.folder.rglob("receipts/**/*.json"))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def shown(repo: Repo, revision: str = "main") -> dict[str, bytes]:
    """The files of a revision without the index, which must say what is there."""
    files = dict(repo.files(revision))
    index = json.loads(files.pop(INDEX, b'{"files": {}}'))
    assert set(index["files"]) == set(files)
    return files


# --- what arrives ---------------------------------------------------------------------------------------------------


def test_a_champion_arrives_as_main_and_under_a_tag(hub: Hub, bench: Bench, waits: list[float]) -> None:
    version = bench.publish()
    receipt = bench.push(version)
    repo = hub.repos[REPO]
    assert (receipt.state, receipt.reason, receipt.attempts) == ("done", None, 1)
    assert repo.private
    assert shown(repo) == shown(repo, f"v-{version}") == bench.files(version)
    assert set(repo.branches) == {"main"}
    assert ".gitattributes" in repo.commits[repo.branches["main"]]
    assert receipt.facts == {
        "url": f"{hub.endpoint}/{REPO}", "tag": f"v-{version}", "commit": repo.tags[f"v-{version}"],
        "main": repo.branches["main"], "compared": receipt.facts["compared"],
    }  # fmt: skip
    assert receipt.facts["compared"].startswith("5 files, ")
    assert [kind for kind in hub.requests if kind == "commit"] == ["commit"] * 2, "one on the branch and one on main"
    assert hub.requests.count("put") == 1, "the weights travel once"
    assert waits == []
    assert json.loads(repo.files("main")[INDEX])["version"] == version
    assert pushing.receipt(bench.registry, version, f"huggingface:{REPO}") == receipt


def test_pushed_again_sends_nothing(hub: Hub, bench: Bench) -> None:
    version = bench.publish()
    first = bench.push(version)
    hub.requests.clear()
    assert bench.push(version) == first
    assert hub.requests == [], "the receipt says that it is there"
    again = bench.push(version, again=True)
    assert again.state == "done"
    assert again.facts == first.facts
    shutil.rmtree(bench.registry.folder / "receipts")
    assert bench.push(version).facts == first.facts
    assert hub.writes() == [], "the hub was looked at, and had everything"


def test_a_version_that_is_not_promoted_leaves_main_alone(hub: Hub, bench: Bench) -> None:
    champion, other = bench.publish(), bench.publish("other", promote=False)
    bench.push(champion)
    before = hub.repos[REPO].branches["main"]
    assert pushing.push(bench.registry, other, [bench.target()], bench.folder) == [], "promoted alone by default"
    assert bench.push(other, bench.target(when="registered")).state == "done"
    repo = hub.repos[REPO]
    assert repo.branches == {"main": before}
    assert shown(repo, f"v-{other}") == bench.files(other)
    hub.requests.clear()
    bench.registry.promote(other)
    assert bench.push(other, bench.target(when="registered")).state == "done"
    assert shown(repo) == bench.files(other)
    assert {"put", "tag", "branch"} & set(hub.requests) == set(), "only main was missing"


def test_main_follows_the_champion_back(hub: Hub, bench: Bench) -> None:
    """The receipt of the first champion says done; but another one was pushed as champion since."""
    first = bench.publish()
    bench.push(first)
    second = bench.publish("second")
    bench.push(second)
    bench.registry.promote(first)
    assert bench.push(first).state == "done"
    assert shown(hub.repos[REPO]) == bench.files(first)
    assert set(hub.repos[REPO].tags) == {f"v-{first}", f"v-{second}"}


def test_a_champion_that_is_dethroned_during_its_push_does_not_become_main(hub: Hub, bench: Bench) -> None:
    bench.push(bench.publish())
    slow, fast = bench.publish("slow"), bench.publish("fast", promote=False)
    hub.fail("tag", lambda: bench.registry.promote(fast))
    receipt = bench.push(slow)
    assert receipt.state == "done"
    assert "main" not in receipt.facts
    repo = hub.repos[REPO]
    assert shown(repo, f"v-{slow}") == bench.files(slow)
    assert len(repo.mains) == 2, "empty, and the first"
    bench.push(fast)
    assert shown(repo) == bench.files(fast)


def test_files_of_ours_that_are_no_longer_part_go_and_those_of_others_stay(hub: Hub, bench: Bench) -> None:
    bench.push(bench.publish("first", special_tokens="{}"))
    repo = hub.repos[REPO]
    repo.edit("main", theirs_txt=b"x", LICENSE=b"y")
    second = bench.publish("second")
    bench.push(second)
    files = repo.files("main")
    assert "special_tokens.json" not in files
    assert (files.pop("theirs.txt"), files.pop("LICENSE")) == (b"x", b"y")
    files.pop(INDEX)
    assert files == bench.files(second)


def test_it_comes_back_as_it_was_and_loads(hub: Hub, tmp_path: Path, tiny_model: Path) -> None:
    """Adapter and merged model by snapshot_download, byte by byte, and through peft and transformers."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(r=4, init_lora_weights=False))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for part in (tuned, tokenizer):
        part.save_pretrained(tmp_path / "adapter")
    made = []

    def merge(bundle: Bundle, folder: Path) -> Path:
        if not folder.is_dir():
            made.append(bundle.version.id)
            base = AutoModelForCausalLM.from_pretrained(tiny_model)
            model = PeftModel.from_pretrained(base, bundle.folder).merge_and_unload().to(torch.bfloat16)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    bench = Bench(tmp_path)
    (tmp_path / "adapter" / "README.md").unlink()
    version = bench.publish(model=tmp_path / "adapter")
    both = bench.target(merge=merge, contents="both")
    hub.fail("tag", 403, 1)
    assert "403" in str(bench.push(version, both).reason)
    assert (bench.folder / "aside" / version / "merged").is_dir(), "kept, so that it is made once"
    receipt = bench.push(version, both)
    assert (receipt.state, made) == ("done", [version])
    assert not (bench.folder / "aside" / version).exists()
    assert len(receipt.facts) == 10, "of both repositories"
    assert receipt.facts["merged url"] == receipt.facts["url"] + "-merged"

    def back(repo: str) -> Path:
        found = huggingface_hub.snapshot_download(
            repo, endpoint=hub.endpoint, token=SECRET, revision=f"v-{version}", local_dir=tmp_path / "back" / repo
        )
        return Path(found)

    adapter, merged = back(REPO), back(f"{REPO}-merged")
    assert {name: (adapter / name).read_bytes() for name in bench.files(version)} == bench.files(version)
    assert AutoTokenizer.from_pretrained(adapter).chat_template == tokenizer.chat_template
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter).eval()
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert whole.dtype == torch.bfloat16
    tokens = tokenizer("It is plain.", return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = tuned.eval()(tokens).logits
        assert torch.equal(loaded(tokens).logits, wanted)
        assert (whole.float()(tokens).logits - wanted).abs().max() < 0.05
    one = huggingface_hub.hf_hub_download(
        REPO, "tokenizer.json", endpoint=hub.endpoint, token=SECRET, cache_dir=tmp_path / "cache"
    )
    assert Path(one).read_bytes() == bench.files(version)["tokenizer.json"]


# --- faults ---------------------------------------------------------------------------------------------------------


def two_versions(hub: Hub, bench: Bench) -> tuple[str, str, Repo]:
    """Return a champion that was pushed, the next one that was not, and what the repository holds."""
    first = bench.publish("first", special_tokens="{}")
    bench.push(first)
    return first, bench.publish("second"), copy.deepcopy(hub.repos[REPO])


def test_whatever_fails_for_a_moment_is_tried_again(hub: Hub, bench: Bench, waits: list[float]) -> None:
    """Each kind of request with each kind of fault: the end is that of a push without any."""
    first, second, base = two_versions(hub, bench)
    bench.push(second)
    kinds = dict.fromkeys(hub.requests)
    assert len(kinds) == 14, kinds
    faults: list[hub_server.Fault] = [503, (429, {"Retry-After": "7"}), "lost"]
    for kind in kinds:
        for number, fault in enumerate([*faults, 500, "cut", "truncated"] if kind in ("put", "commit") else faults):
            repo = f"me/{kind}-{number}"
            if kind != "create_repo":
                hub.repos[repo] = copy.deepcopy(base)
            waits.clear()
            hub.stored.clear()
            hub.fail(kind, fault)
            receipt = bench.push(second, bench.target(repo))
            assert receipt.state == "done", (kind, fault, receipt.reason)
            assert shown(hub.repos[repo]) == shown(hub.repos[repo], f"v-{second}") == bench.files(second), (kind, fault)
            assert set(hub.repos[repo].branches) == {"main"}
            whole = ({}, bench.files(first), bench.files(second))
            assert all({n: c for n, c in main.items() if n != INDEX} in whole for main in hub.repos[repo].mains)
            assert len(waits) == 1, (kind, fault)
            assert waits[0] == 7 if isinstance(fault, tuple) else waits[0] <= 1, "Retry-After is kept to"
    assert not any(hub.faults.values()), "each of them came"


class Killed(BaseException):
    """Nothing in the library catches it, as nothing catches SIGKILL."""


def test_killed_after_each_request_that_changes_something_it_is_continued(
    hub: Hub, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, second, base = two_versions(hub, bench)
    send, left = client._Client.send, 10**9

    def sent(self: Any, request: Any, **how: Any) -> Any:
        nonlocal left
        answer = send(self, request, **how)
        left -= request.method not in ("GET", "HEAD")
        if left == 0:
            raise Killed
        return answer

    monkeypatch.setattr(client._Client, "send", sent)
    killed = 0
    while True:
        repo = f"me/killed-{killed}"
        hub.repos[repo] = copy.deepcopy(base)
        hub.stored.clear()
        left = killed + 1
        try:
            bench.push(second, bench.target(repo))
            break
        except Killed:
            killed += 1
        found = pushing.receipt(bench.registry, second, f"huggingface:{repo}")
        assert found is not None
        assert (found.state, found.reason) == ("pending", "begun")
        left = 10**9
        receipt = bench.push(second, bench.target(repo))
        assert (receipt.state, receipt.attempts) == ("done", 2)
        remote = hub.repos[repo]
        assert shown(remote) == shown(remote, f"v-{second}") == bench.files(second)
        assert set(remote.branches) == {"main"}
        assert len(remote.mains) == 3, "empty, the first version, the second"
    assert killed == 13


@pytest.mark.parametrize(
    ("kind", "fault", "told"),
    [
        ("commit", 503, r"commit/candidate-\w+: 503 Service Unavailable \(6 attempts\)"),
        ("put", (429, {"Retry-After": "3600"}), r"429 .*\(1 attempts; waited long enough, it asks for 3600 s\)"),
        ("refs", (429, {"RateLimit": '"api";r=0;t=900'}), "it asks for 900 s"),
        ("tag", "cut", r"POST .*tag/\w+: .*\(6 attempts\)"),
        ("create_repo", 403, "403 Forbidden: fault 403"),
        ("commit", 400, "400"),
    ],
)
def test_what_does_not_pass_fails_in_bounded_time_and_is_continued(
    hub: Hub, bench: Bench, waits: list[float], kind: str, fault: hub_server.Fault, told: str
) -> None:
    version = bench.publish()
    hub.fail(kind, fault, *range(10))
    receipt = bench.push(version)
    assert receipt.state == "failed"
    assert receipt.reason is not None
    assert re.search(told, receipt.reason), receipt.reason
    assert sum(waits) <= 300
    assert bench.registry.verify(version) == []
    assert SECRET not in bench.receipts()
    with pytest.raises(PreferenceTuningError, match=rf"1 of 1 pushes failed(.|\n)*registry push {version}"):
        report.raise_failed(version, [receipt])
    hub.faults.clear()
    assert bench.push(version).state == "done"
    assert shown(hub.repos[REPO]) == bench.files(version)


def test_a_server_that_says_nothing_is_given_up(hub: Hub, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    monkeypatch.setattr(client, "SILENCE", httpx.Timeout(0.2))
    hub.fail("commit", "silent", 0)
    version = bench.publish()
    assert bench.push(version).state == "done"
    assert hub.requests.count("commit") == 3


def test_a_full_disk_on_either_side(hub: Hub, bench: Bench) -> None:
    version = bench.publish()
    hub.disk = 100
    receipt = bench.push(version)
    assert receipt.state == "failed"
    assert "507 Insufficient Storage: no space left on device" in str(receipt.reason)
    hub.disk = None

    def merge(bundle: Bundle, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "model.safetensors"))

    merged = bench.target("me/whole", merge=merge, contents="merged")
    full, other = pushing.push(bench.registry, version, [merged, bench.target()], bench.folder / "aside")
    assert (full.state, other.state) == ("failed", "done"), "one that fails does not keep the others"
    assert str(full.reason).endswith("model.safetensors: No space left on device")
    assert "me/whole" not in hub.repos
    assert bench.registry.verify(version) == []


def test_a_receipt_that_cannot_be_written(bench: Bench, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    version = bench.publish()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FolderRegistry, "write", full)
    with pytest.raises(PreferenceTuningError, match="cannot write a receipt: No space left on device"):
        bench.push(version)
    assert hub.requests == []


def test_a_mistake_in_a_target_is_one_failed_push(bench: Bench, hub: Hub) -> None:
    class Broken:
        key, when, settings = "broken:x", "promoted", {}

        def push(self, *_: Any) -> dict[str, str]:
            raise KeyError("oops")

    version = bench.publish()
    broken, done = pushing.push(bench.registry, version, [Broken(), bench.target()], bench.folder / "aside")  # type: ignore[list-item]
    assert (broken.state, done.state) == ("failed", "done")
    assert "KeyError: 'oops' (traceback in " in str(broken.reason)
    assert "oops" in (bench.folder / "aside" / version / "error.log").read_text()


def test_a_version_that_was_changed_is_not_pushed(bench: Bench, hub: Hub) -> None:
    version = bench.publish()
    (bench.registry.path(version) / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(PreferenceTuningError, match=r"is not pushed: model/tokenizer\.json was changed"):
        bench.push(version)
    assert hub.requests == []


# --- others ---------------------------------------------------------------------------------------------------------


def test_what_others_do_to_main_meanwhile(hub: Hub, bench: Bench) -> None:
    """412: with their own files they do not disturb; with ours they do, and the next push replaces what they did."""
    bench.push(bench.publish())
    repo = hub.repos[REPO]
    second = bench.publish("second")
    hub.fail("commit", lambda: repo.edit("main", notes_txt=b"theirs") and None, 1)
    assert bench.push(second).state == "done"
    assert repo.files("main")["notes.txt"] == b"theirs"
    third = bench.publish("third")
    hub.fail("commit", lambda: repo.edit("main", README_md=b"theirs") and None, 1)
    receipt = bench.push(third)
    assert (receipt.state, receipt.reason) == (
        "failed", f"{REPO}: somebody else changed README.md in main during the push",
    )  # fmt: skip
    assert repo.files("main")["README.md"] == b"theirs"
    assert bench.push(third).state == "done"
    assert repo.files("main")["README.md"] == bench.files(third)["README.md"]


def test_a_main_that_never_rests_ends_the_push(hub: Hub, bench: Bench) -> None:
    version = bench.publish()
    count = iter(range(100))
    hub.fail("commit", lambda: hub.repos[REPO].edit("main", **{f"n{next(count)}": b"x"}) and None, *range(1, 20))
    receipt = bench.push(version)
    assert (receipt.state, receipt.reason) == ("failed", f"{REPO}: main moved 4 times during the push")
    hub.faults.clear()
    assert bench.push(version).state == "done"


def test_a_tag_that_is_something_else_is_not_moved(hub: Hub, bench: Bench) -> None:
    version = bench.publish()
    bench.push(bench.publish("first"))
    repo = hub.repos[REPO]
    repo.tags[f"v-{version}"] = repo.branches["main"]
    bench.registry.promote(version)
    receipt = bench.push(version)
    assert receipt.state == "failed"
    assert f"the tag v-{version} is there and is not this version" in str(receipt.reason)
    assert shown(repo) != bench.files(version)


def test_two_processes_push_at_once(hub: Hub, bench: Bench) -> None:
    """Both are done, and main has moved once."""
    version = bench.publish()
    script = """
import sys
from pathlib import Path
from preference_tuning.config import HuggingFacePush, RegistryConfig, RunConfig
from preference_tuning.registry.pushing import targets
entry = HuggingFacePush(to="huggingface", repo_id="me/model")
registry = RegistryConfig(folder=sys.argv[1], name="m", push=(entry,))
config = RunConfig.model_validate({"base_model": {"source": "x"}, "data": {"source": "y"}, "registry": registry})
_, [receipt] = targets.push(config, "champion", Path(sys.argv[2]))
print(receipt.state, receipt.reason)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    root = bench.registry.root
    pair = []
    for i in range(2):  # registries of two machines, as their locks are no help
        shutil.copytree(root, bench.folder / f"registry-{i}")
        command = [sys.executable, "-c", script, str(bench.folder / f"registry-{i}"), str(bench.folder / str(i))]
        pair.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    assert [child.communicate(timeout=60)[0].strip() for child in pair] == ["done None"] * 2
    repo = hub.repos[REPO]
    assert shown(repo) == shown(repo, f"v-{version}") == bench.files(version)
    assert set(repo.branches) == {"main"}
    assert len(repo.mains) == 2


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "repo", "told"),
    [
        (token(), "me/x", None),
        (token("read"), "me/x", "the token may only read"),
        (token(), "acme/x", "acme is neither me nor an organisation that me belongs to"),
        (token(orgs={"acme": "write"}), "acme/x", None),
        (token(orgs={"acme": "contributor"}), "acme/x", None),
        (token(orgs={"acme": "read"}), "acme/x", "me has the role read in acme, which may not write"),
        (token("fineGrained", me=["repo.content.read"]), "me/x", r"lacks write access \(repo.write\) to me or me/x"),
        (token("fineGrained", me=["repo.write"]), "me/x", None),
        (token("fineGrained", me=["repo.write"]), "acme/x", "lacks write access"),
        (token("fineGrained", acme=["repo.write"]), "acme/x", None),
        (token("fineGrained", me__x=["repo.write"]), "me/x", "for me/x alone, which does not exist"),
        (token("fineGrained", me__there=["repo.write"]), "me/there", None),
        (token("fineGrained", me__other=["repo.write"]), "me/there", "lacks write access"),
    ],
)
@pytest.mark.parametrize("auth_check", [True, False])
def test_a_token_is_looked_at_before_a_run(
    hub: Hub, bench: Bench, known: dict[str, Any], repo: str, told: str | None, auth_check: bool
) -> None:
    hub.tokens[SECRET], hub.has_auth_check = known, auth_check
    hub.repos["me/there"] = Repo(private=True)
    hub.repos["me/there"].commit("main", {})
    if told is None:
        assert bench.target(repo).check() == f"huggingface:{repo}: the token in HF_TOKEN is me's and may write; private"
    else:
        with pytest.raises(ConfigError, match=told) as caught:
            bench.target(repo).check()
        assert SECRET not in str(caught.value)
    assert hub.writes() == []


def test_a_token_that_is_none(hub: Hub, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary_unknown")
    with pytest.raises(ConfigError, match="refuses the token in HF_TOKEN") as refused:
        bench.target().check()
    receipt = bench.push(bench.publish())
    assert receipt.state == "failed"
    assert "hf_canary" not in str(refused.value) + str(receipt.reason)
    for value, told in (("", "HF_TOKEN is not set"), ("hf_canary\nx", "what HF_TOKEN holds is no token")):
        monkeypatch.setenv("HF_TOKEN", value)
        with pytest.raises(ConfigError, match=told) as caught:
            bench.target().check()
        assert "canary" not in str(caught.value)
    monkeypatch.setenv("ANOTHER", SECRET)
    assert "the token in ANOTHER is me's" in bench.target(token_env="ANOTHER").check()


def test_a_server_that_echoes_the_token(hub: Hub, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    hub.fail("create_repo", (403, {"X-Error-Message": f"no rights for Bearer {SECRET}"}))
    receipt = bench.push(bench.publish())
    assert "no rights for Bearer ***" in str(receipt.reason)
    stored = [path for path in bench.folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert stored == []
    assert SECRET not in "".join(capsys.readouterr())


def test_visibility_is_never_changed(hub: Hub, bench: Bench) -> None:
    version = bench.publish()
    assert bench.push(version, bench.target("me/open", private=False)).state == "done"
    assert not hub.repos["me/open"].private
    told = "me/open is public and the config says private: true"
    with pytest.raises(ConfigError, match=told):
        bench.target("me/open").check()
    receipt = bench.push(version, bench.target("me/open"))
    assert receipt.state == "failed"
    assert told in str(receipt.reason)
    assert not hub.repos["me/open"].private


def test_a_hub_that_is_away_is_a_warning_and_offline_waits(
    hub: Hub, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fail("whoami", 503, 0, 1)
    assert "warning: GET " in bench.target().check()
    with monkeypatch.context() as away:
        away.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        assert "warning: GET http://127.0.0.1:9/api/whoami-v2" in bench.target().check()
        away.setenv("HF_ENDPOINT", "ftp://x")
        with pytest.raises(ConfigError, match="HF_ENDPOINT: "):
            bench.target().check()
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in bench.target().check()
        hub.requests.clear()
        waiting = bench.push(bench.publish())
        assert waiting.state == "pending"
        report.raise_failed(waiting.version, [waiting])
        assert report.render([waiting]).startswith(f"waiting    huggingface:{REPO}: HF_HUB_OFFLINE is set")
    assert hub.requests == []
    assert bench.push(waiting.version).state == "done"


def test_the_clients_own_settings_are_left_as_they_were(hub: Hub, bench: Bench) -> None:
    from huggingface_hub.utils import _http, are_progress_bars_disabled, logging

    before = (_http._GLOBAL_CLIENT_FACTORY, are_progress_bars_disabled(), logging.get_verbosity())
    bench.push(bench.publish())
    assert (_http._GLOBAL_CLIENT_FACTORY, are_progress_bars_disabled(), logging.get_verbosity()) == before


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_continues_what_is_missing(hub: Hub, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    import run

    def command(*words: str) -> str:
        run.registry(commandline.parser().parse_args(["registry", "push", *words]))
        return capsys.readouterr().out

    config = bench.folder / "run.yaml"
    text = f"""
parameters:
  base_model: {{source: x}}
  data: {{source: y}}
  output_dir: {bench.folder}
  registry:
    folder: {bench.registry.root}
    name: m
    push:
      - {{to: huggingface, repo_id: me/one}}
      - {{to: huggingface, repo_id: me/other}}
"""
    config.write_text(text)
    champion, other = bench.publish(), bench.publish("other", promote=False)
    hub.fail("put", 507)
    with pytest.raises(
        PreferenceTuningError, match=r"1 of 2 pushes failed:\n  huggingface:me/one: PUT .*507"
    ) as failed:
        command("--config", str(config))
    assert failed.value.exit_code == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["not", "pushed"]
    told = command("--config", str(config)).splitlines()
    assert [line.partition(", ")[0] for line in told] == [
        f"pushed     huggingface:me/{name}: url {hub.endpoint}/me/{name}" for name in ("one", "other")
    ]
    hub.requests.clear()
    assert command(champion[:6], "--config", str(config)).splitlines() == told
    assert hub.requests == []
    command("--again", "--config", str(config))
    assert hub.requests
    assert hub.writes() == []
    assert "is not the champion, and no target takes every version" in command(other, "--config", str(config))
    with pytest.raises(PreferenceTuningError, match="no version 'nothing'"):
        command("nothing", "--config", str(config))
    with pytest.raises(ConfigError, match=r"names a run config whose registry\.push says where to"):
        command()
    page = report.page(champion, [receipt_of(bench, champion, "me/one")])
    assert "huggingface:me/one" in page
    assert list(report.metadata([receipt_of(bench, champion, "me/one")])) == ["huggingface me/one"]


def receipt_of(bench: Bench, version: str, repo: str) -> Receipt:
    found = pushing.receipt(bench.registry, version, f"huggingface:{repo}")
    assert found is not None
    return found


# --- config ---------------------------------------------------------------------------------------------------------


def loaded(path: Path, push: str) -> RunConfig:
    text = "parameters:\n  base_model: {source: x}\n  data: {source: y}\n  registry:\n    push:\n"
    path.write_text(text + push)
    return config.load(path).config


def test_targets_come_from_the_config(tmp_path: Path) -> None:
    found = loaded(
        tmp_path / "run.yaml",
        "      - {to: huggingface, repo_id: Me/x, contents: both, token_secret: hub, when: registered}\n",
    )
    [target] = targets.of(found)
    assert (target.key, target.when) == ("huggingface:Me/x", "registered")
    assert target.settings == {
        "endpoint": "https://huggingface.co", "repo_id": "Me/x", "private": True, "contents": "both",
    }  # fmt: skip
    assert [tuple(secret) for secret in found.registry.secrets()] == [
        ("registry.push.0.token_secret", "hub", "token", "HF_TOKEN")
    ]


def test_mistakes_in_targets_have_their_line(tmp_path: Path) -> None:
    text = """\
      - to: huggingface
        repo: a/b
      - to: hugginface
        repo_id: a/b
      - to: huggingface
        repo_id: a/b--c
        contents: all
        token_env: hf_canary
      - to: comet
        repo_id: a/b
      - repo_id: a/b
        token: hf_canary
"""
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path / "run.yaml", text)
    lines = [line.strip().removeprefix(f"{tmp_path}/run.yaml:") for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "6: parameters.registry.push.0.repo_id: is required",
        "7: parameters.registry.push.0.repo: unknown key; did you mean 'repo_id'?",
        "8: parameters.registry.push.1: to 'hugginface': `to` must say where to: huggingface, comet or mlflow",
        "11: parameters.registry.push.2.repo_id: 'a/b--c': must be OWNER/NAME; both begin with a letter or digit, hold only "
        "letters, digits, '_' and single '.' and '-' between them, 96 at most",
        "12: parameters.registry.push.2.contents: 'all': input should be 'adapter', 'merged' or 'both'",
        "13: parameters.registry.push.2.token_env: must be the name of an environment variable, in capitals, and not the key itself",
        "15: parameters.registry.push.3.repo_id: unknown key; known here: name, to, when",
        "16: parameters.registry.push.4: `to` must say where to: huggingface, comet or mlflow",
    ]
    with pytest.raises(ConfigError, match=r"run\.yaml:6: .*a token does not belong into a file") as token_caught:
        loaded(tmp_path / "run.yaml", "      - {to: huggingface, repo_id: a/b, token: hf_canary}\n")
    assert "hf_canary" not in str(caught.value) + str(token_caught.value)


def test_targets_that_share_a_place_are_refused(tmp_path: Path) -> None:
    text = """\
      - {to: huggingface, repo_id: a/b, contents: both}
      - {to: huggingface, repo_id: A/B-merged, token_secret: x}
      - {to: mlflow, tracking_uri: http://x}
      - {to: mlflow, tracking_uri: http://x, name: other}
      - {to: mlflow, tracking_uri: http://x, name: preference-tuned}
"""
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path / "run.yaml", text)
    assert [line.partition(": ")[2] for line in str(caught.value).splitlines()[1:]] == [
        "parameters.registry.push.1.to: goes where push.0 goes already; keep one",
        "parameters.registry.push.1.token_env: HF_TOKEN is also that of push.0, with another token_secret; name another variable",
        "parameters.registry.push.4.to: goes where push.2 goes already; keep one",
    ]
