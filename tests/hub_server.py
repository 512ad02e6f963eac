"""A Hugging Face hub on loopback: repositories with branches, tags and commits, git LFS, tokens with scopes, and faults.

Speaks what huggingface_hub 1.33 asks of a hub (the calls in docs/pushing.md), so the real client pushes to it and
downloads from it. Every state that main ever had is kept, and every request is counted by its kind.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
PAGE = 4
LARGE = (".safetensors", ".gguf")
WRITES = ("create_repo", "preupload", "batch", "put", "verify", "commit", "branch", "remove_branch", "tag")

Fault = int | str | tuple[int, dict[str, str]] | Callable[[], None]
"""A status; `cut` before or `lost` after the work is done; `truncated`: half of an answer; `silent`: none; a status
with headers; or something that happens on the server before the request is answered."""


@dataclass(frozen=True)
class Blob:
    """A file at a commit."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
        )

    @property
    def oid(self) -> str:
        stored = self.pointer if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()


Tree = dict[str, Blob]


@dataclass
class Repo:
    """A repository: all commits, and where branches and tags are."""

    private: bool
    commits: dict[str, Tree] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    mains: list[dict[str, bytes]] = field(default_factory=list)
    """The files of main, each time that it moved."""

    def commit(self, branch: str, tree: Tree) -> str:
        names = json.dumps([len(self.commits), branch, sorted((name, blob.oid) for name, blob in tree.items())])
        oid = hashlib.sha1(names.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = tree, oid
        if branch == "main":
            self.mains.append(self.files("main"))
        return oid

    def edit(self, branch: str, **files: bytes | None) -> str:
        """Commit as somebody else would; `README_md` is README.md, and None removes."""
        tree = dict(self.commits[self.branches[branch]])
        for name, content in files.items():
            path = re.sub(r"_(md|json|txt)$", r".\1", name)
            if content is None:
                tree.pop(path, None)
            else:
                tree[path] = Blob(content, large=False)
        return self.commit(branch, tree)

    def files(self, revision: str) -> dict[str, bytes]:
        tree = self.commits[self.resolve(revision) or ""]
        return {name: blob.content for name, blob in tree.items() if name != ".gitattributes"}

    def resolve(self, revision: str) -> str | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return oid if oid in self.commits else None


def token(
    role: str = "write", name: str = "me", orgs: dict[str, str] | None = None, **scopes: list[str]
) -> dict[str, Any]:
    """What whoami-v2 tells of a token; scopes are `me=["repo.write"]`, or `me__model` for one repository."""
    access: dict[str, Any] = {"displayName": "t", "role": role}
    if role == "fineGrained":
        scoped = [{"entity": {"type": "x", "name": n.replace("__", "/")}, "permissions": p} for n, p in scopes.items()]
        access["fineGrained"] = {"global": [], "scoped": scoped}
    members = [{"type": "org", "name": org, "roleInOrg": member} for org, member in (orgs or {}).items()]
    return {"type": "user", "name": name, "orgs": members, "auth": {"type": "access_token", "accessToken": access}}


class Hub:
    """The server and what it knows."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        """Large files, by sha256."""
        self.tokens: dict[str, dict[str, Any]] = {"hf_canary_writer": token()}
        self.requests: list[str] = []
        self.faults: dict[str, dict[int, Fault]] = {}
        self.disk: int | None = None
        """Bytes that fit on the server's disk."""
        self.has_auth_check = True
        self.lock = threading.RLock()
        self.endpoint = ""

    def fail(self, kind: str, fault: Fault, *which: int) -> None:
        """Let the requests of a kind fail that come now; `which` are counted from 0, without one it is the next."""
        seen = self.requests.count(kind)
        for number in which or (0,):
            self.faults.setdefault(kind, {})[seen + number] = fault

    def writes(self) -> list[str]:
        return [kind for kind in self.requests if kind in WRITES]

    def may_write(self, who: dict[str, Any] | None, repo_id: str) -> bool:
        if who is None:
            return False
        owner, access = repo_id.split("/")[0], who["auth"]["accessToken"]
        if access["role"] == "fineGrained":
            scopes = access["fineGrained"]["scoped"]
            return any(s["entity"]["name"] in (owner, repo_id) and "repo.write" in s["permissions"] for s in scopes)
        roles = {who["name"]: "admin", **{org["name"]: org["roleInOrg"] for org in who["orgs"]}}
        return access["role"] == "write" and roles.get(owner) in ("admin", "write", "contributor")


@contextmanager
def running() -> Iterator[Hub]:
    """Serve a hub on a free port."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True)
class _Reply:
    content: bytes
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


class _RefusedError(Exception):
    def __init__(self, status: int, message: str = "", code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", MODEL + r"/auth-check/write", "auth_check"),
    ("GET", MODEL + r"/refs", "refs"),
    ("GET", MODEL + r"/tree/(?P<revision>[^/]+)", "tree"),
    ("POST", MODEL + r"/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", MODEL + r"/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", MODEL + r"/branch/(?P<name>[^/]+)", "branch"),
    ("DELETE", MODEL + r"/branch/(?P<name>[^/]+)", "remove_branch"),
    ("POST", MODEL + r"/tag/(?P<revision>[^/]+)", "tag"),
    ("GET", MODEL + r"(/revision/(?P<revision>[^/]+))?", "info"),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "put"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "verify"),
    ("HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):
            self.close_connection = True

    def do(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        for method, pattern, kind in ROUTES:
            if self.command == method and (match := re.fullmatch(pattern, path)):
                found = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                return self._do(kind, found)
        self._answer(404, {"error": "Not Found"})

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do  # noqa: N815 (http.server looks for these names)

    def _do(self, kind: str, found: dict[str, str]) -> None:
        with self.hub.lock:
            fault = self.hub.faults.get(kind, {}).pop(self.hub.requests.count(kind), None)
            self.hub.requests.append(kind)
        if callable(fault):
            fault()
        elif isinstance(fault, int):
            return self._answer(fault, {"error": f"fault {fault}"})
        elif isinstance(fault, tuple):
            return self._answer(fault[0], {"error": f"fault {fault[0]}"}, fault[1])
        elif fault == "cut":
            return self._cut()
        elif fault == "silent":
            self.connection.settimeout(30)
            self.rfile.read(1)  # until the client goes
            return None
        try:
            with self.hub.lock:
                answer = getattr(self, "_" + kind)(**found)
        except _RefusedError as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            return self._answer(refusal.status, {"error": refusal.message}, {k: v for k, v in headers.items() if v})
        if fault == "lost":
            return self._cut()
        reply = answer if isinstance(answer, _Reply) else _Reply(json.dumps(answer).encode())
        return self._send(reply, cut=fault == "truncated")

    def _cut(self) -> None:
        """End the connection with a reset, as a dying peer does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(_Reply(json.dumps(value).encode(), headers or {}, status))

    def _send(self, reply: _Reply, cut: bool = False) -> None:
        self.send_response(reply.status)
        for name, text in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(reply.content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.content[: len(reply.content) // 2] if cut else reply.content)
        self.wfile.flush()
        if cut:
            self._cut()

    # --- who asks, and what for -------------------------------------------------------------------------------------

    def _who(self) -> dict[str, Any] | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in self.hub.tokens:
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(given)

    def _repo(self, repo: str, write: bool = False) -> Repo:
        who, found = self._who(), self.hub.repos.get(repo)
        owner = repo.split("/")[0]
        names = {who["name"], *(org["name"] for org in who["orgs"])} if who else set()
        if found is None or (found.private and owner not in names):
            raise _RefusedError(404, "Repository not found", "RepoNotFound")
        if write and not self.hub.may_write(who, repo):
            raise _RefusedError(403, "you may not write here")
        return found

    def _at(self, repo: Repo, revision: str) -> tuple[str, Tree]:
        oid = repo.resolve(revision)
        if oid is None:
            raise _RefusedError(404, "Invalid rev id", "RevisionNotFound")
        return oid, repo.commits[oid]

    def _json(self) -> Any:
        return json.loads(self.body)

    def _whoami(self) -> Any:
        who = self._who()
        if who is None:
            raise _RefusedError(401, "Invalid username or password.")
        return who

    def _create_repo(self) -> Any:
        asked = self._json()
        repo_id = f"{asked['organization']}/{asked['name']}"
        if not self.hub.may_write(self._who(), repo_id):
            raise _RefusedError(403, "you may not make a repository there")
        if repo_id in self.hub.repos:
            raise _RefusedError(409, "You already created this model repo")
        repo = self.hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": Blob(ATTRIBUTES, large=False)})
        return {"url": f"{self.hub.endpoint}/{repo_id}"}

    def _validate(self) -> Any:
        if "---" not in self._json()["content"]:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        return {"errors": [], "warnings": []}

    def _auth_check(self, repo: str) -> Any:
        if not self.hub.has_auth_check:
            raise _RefusedError(404, "Not Found")
        self._repo(repo, write=True)
        return {}

    def _info(self, repo: str, revision: str = "main") -> Any:
        found = self._repo(repo)
        oid, tree = self._at(found, revision)
        siblings = [{"rfilename": name} for name in tree]
        return {"id": repo, "modelId": repo, "sha": oid, "private": found.private, "tags": [], "siblings": siblings}

    def _refs(self, repo: str) -> Any:
        found = self._repo(repo)

        def refs(kind: str, known: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in known.items()]

        return {"branches": refs("heads", found.branches), "tags": refs("tags", found.tags), "converts": []}

    def _tree(self, repo: str, revision: str) -> _Reply:
        """A few entries a page: a client that reads the first page only sees too little."""
        _, tree = self._at(self._repo(repo), revision)
        entries = []
        for name, blob in sorted(tree.items()):
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(blob.content), "oid": blob.oid}
            if blob.large:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
            entries.append(entry)
        parts = urlsplit(self.path)
        cursor = int(parse_qs(parts.query).get("cursor", ["0"])[0])
        more = cursor + PAGE < len(entries)
        link = (
            {"Link": f'<{self.hub.endpoint}{parts.path}?recursive=true&cursor={cursor + PAGE}>; rel="next"'}
            if more
            else {}
        )
        return _Reply(json.dumps(entries[cursor : cursor + PAGE]).encode(), link)

    # --- writing ----------------------------------------------------------------------------------------------------

    def _preupload(self, repo: str, revision: str) -> Any:
        _, tree = self._at(self._repo(repo, write=True), revision)
        files = []
        for file in self._json()["files"]:
            large, there = file["path"].endswith(LARGE), tree.get(file["path"])
            oid = None if there is None else there.sha256 if there.large else there.oid
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def _batch(self, repo: str) -> Any:
        self._repo(repo, write=True)
        assert self.headers["Content-Type"] == "application/vnd.git-lfs+json"
        objects = []
        for file in self._json()["objects"]:
            href = f"{self.hub.endpoint}/lfs/{file['oid']}"
            actions = {"upload": {"href": href + "?signature=x"}, "verify": {"href": href + "/verify"}}
            objects.append(file if file["oid"] in self.hub.stored else {**file, "actions": actions})
        return {"transfer": "basic", "objects": objects}

    def _put(self, oid: str) -> Any:
        assert "Authorization" not in self.headers, "a token must not go to where large files are stored"
        if self.hub.disk is not None and len(self.body) > self.hub.disk:
            raise _RefusedError(507, "no space left on device")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _RefusedError(400, "checksum mismatch")
        self.hub.stored[oid] = self.body
        return {}

    def _verify(self, oid: str) -> Any:
        self._who()
        if len(self.hub.stored.get(oid, b"")) != self._json()["size"]:
            raise _RefusedError(404, "Not Found")
        return {}

    def _commit(self, repo: str, revision: str) -> Any:
        found = self._repo(repo, write=True)
        head = found.branches.get(revision)
        if head is None:
            raise _RefusedError(404, "Invalid rev id", "RevisionNotFound")
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", head) != head:
            raise _RefusedError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(found.commits[head])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    raise _RefusedError(400, f"LFS object {value['oid']} was not uploaded")
                tree[value["path"]] = Blob(self.hub.stored[value["oid"]], large=True)
            elif line["key"] == "deletedFile" and tree.pop(value["path"], None) is None:
                raise _RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
        oid = found.commit(revision, tree)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}"}

    def _branch(self, repo: str, name: str) -> Any:
        found = self._repo(repo, write=True)
        if name in found.branches:
            raise _RefusedError(409, "Reference already exists")
        found.branches[name] = self._at(found, self._json().get("startingPoint", "main"))[0]
        return {}

    def _remove_branch(self, repo: str, name: str) -> Any:
        if self._repo(repo, write=True).branches.pop(name, None) is None:
            raise _RefusedError(404, "Invalid rev id", "RevisionNotFound")
        return {}

    def _tag(self, repo: str, revision: str) -> Any:
        found, asked = self._repo(repo, write=True), self._json()
        if asked["tag"] in found.tags:
            raise _RefusedError(409, "Tag reference exists already.")
        found.tags[asked["tag"]] = self._at(found, revision)[0]
        return {}

    # --- reading ----------------------------------------------------------------------------------------------------

    def _resolve(self, repo: str, revision: str, path: str) -> _Reply:
        oid, tree = self._at(self._repo(repo), revision)
        blob = tree.get(path)
        if blob is None:
            raise _RefusedError(404, "Entry not found", "EntryNotFound")
        headers = {
            "X-Repo-Commit": oid,
            "ETag": f'"{blob.sha256 if blob.large else blob.oid}"',
            "Accept-Ranges": "bytes",
        }
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        first = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or ["", "0"])[1])
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(blob.content) - 1}/{len(blob.content)}"
        headers["Content-Type"] = "application/octet-stream"
        return _Reply(blob.content[first:], headers, 206 if first else 200)
