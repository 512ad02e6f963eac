"""A stand-in for Comet on 127.0.0.1: it keeps what arrives, tells what it has, and fails as it is told to."""

import gzip
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY = "canary-key-of-comet-4711"
WORKSPACE = "somebody"
BEATS = ("is_alive_beat_duration_millis", "gpu_monitor_interval_millis", "cpu_monitor_interval_millis")


@dataclass
class Kept:
    """An experiment as Comet has it."""

    project: str
    workspace: str | None
    points: list[tuple[str, int, Any]] = field(default_factory=list)
    """Name, step and value, as they came: what is sent twice is there twice."""
    parameters: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    assets: list[tuple[str, bytes]] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    state: str = ""

    @property
    def metrics(self) -> dict[tuple[str, int], Any]:
        """The points by name and step; none may be there twice."""
        found = {(name, step): value for name, step, value in self.points}
        assert len(found) == len(self.points), "a point was sent twice"
        return found


class CometServer:
    """The server, and how it behaves: ``fail`` is asked before each request what goes wrong with it.

    It returns a status to answer with, ``hang`` (no answer, until the server closes), ``cut`` (no answer, nothing is
    kept), ``lost`` (it is kept, but no answer comes), or None.
    """

    def __init__(self) -> None:
        self.experiments: dict[str, Kept] = {}
        self.paths: list[str] = []
        self.fail: Callable[[str], int | str | None] = lambda path: None
        self.lock, self._open = threading.Lock(), threading.Event()
        handler = type("Handler", (_Handler,), {"comet": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/clientlib/"

    @property
    def environment(self) -> dict[str, str]:
        """What makes comet_ml talk to this server."""
        return {"COMET_API_KEY": KEY, "COMET_URL_OVERRIDE": self.url}

    def close(self) -> None:
        self._open.set()
        self._server.shutdown()
        self._server.server_close()

    def wait_open(self) -> None:
        self._open.wait(60)


class _Handler(BaseHTTPRequestHandler):
    comet: CometServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve({})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            raw = gzip.decompress(raw)
        kind = self.headers.get("Content-Type", "")
        if kind.startswith("multipart/"):
            self._serve({"file": _file_of(raw, self.headers)})
        else:
            self._serve(json.loads(raw) if raw else {})

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self, body: dict[str, Any]) -> None:
        parts = urlsplit(self.path)
        path, query = parts.path, {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.comet.paths.append(path)
        wrong = self.comet.fail(path)
        if wrong == "hang":
            self.comet.wait_open()
        if wrong in ("hang", "cut"):
            self._drop()
            return
        if isinstance(wrong, int):
            self._answer(wrong, {"msg": "in trouble"})
            return
        with self.comet.lock:
            status, answer = _respond(self.comet, path, query, body, self.headers.get("Authorization"))
        if wrong == "lost":
            self._drop()
        else:
            self._answer(status, answer)

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _respond(
    comet: CometServer, path: str, query: dict[str, str], body: dict[str, Any], authorization: str | None
) -> tuple[int, Any]:
    key = query.get("experimentKey") or query.get("experimentId") or body.get("experimentKey") or ""
    kept = comet.experiments.get(key)
    rest = path.partition("/api/rest/v2/")[2]
    if rest and authorization != KEY:
        return 401, {"msg": "unauthorized"}
    if path.endswith(("logger/add/run", "logger/get/run")):
        return _handshake(comet, path, body)
    if path.endswith("batch/logger/experiment/metric"):
        assert kept
        kept.points += [(v["metricName"], v["step"], v["metricValue"]) for v in body["values"] if v["step"] is not None]
    elif path.endswith("batch/logger/experiment/parameter"):
        assert kept
        kept.parameters |= {v["parameterName"]: v["parameterValue"] for v in body["values"]}
    elif path.endswith(("write/experiment/upload-asset", "asset/upload", "visualizations/upload")):
        assert kept
        kept.assets.append((query.get("fileName") or query.get("figName") or "", body["file"]))
        return 200, {"assetId": "x", "link": "http://x"}
    elif path.endswith("status-report/update"):
        return 200, dict.fromkeys(BEATS, 60000)
    elif path.endswith("isAlive/ver"):
        return 200, {"version": "4.40.0", "msg": "4.40.0"}
    elif path.endswith("add-tags-to-experiment"):
        comet.experiments[body.get("experimentKey", key)].tags += body.get("addedTags", [])
    elif rest:
        return _rest(comet, rest, query, body, kept)
    return 200, {"code": 200, "msg": "ok"}


def _handshake(comet: CometServer, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    if body["apiKey"] != KEY:
        return 400, {"sdk_error_code": 90212, "msg": "unknown key"}
    adds = path.endswith("add/run")
    key = body["experimentKey"] if adds else body["previousExperiment"]
    if adds and key in comet.experiments and not body.get("getOrCreateEnabled"):
        return 400, {"sdk_error_code": 90999, "msg": "exists"}
    if adds:
        comet.experiments.setdefault(key, Kept(body["projectName"], body["teamName"]))
    focus = f"http://comet/{WORKSPACE}/{comet.experiments[key].project}/"
    run = {"runId": "r", "project_id": "p", "focusUrl": focus, "lastOffset": 0, "featureToggles": []}
    return 200, run


def _rest(
    comet: CometServer, what: str, query: dict[str, str], body: dict[str, Any], kept: Kept | None
) -> tuple[int, Any]:
    if what == "account-details":
        return 200, {"userName": "u", "defaultWorkspaceName": WORKSPACE}
    if what == "workspaces":
        return 200, {"workspaceNames": [WORKSPACE, "team"]}
    assert kept, what
    if what == "write/experiment/log-other":
        kept.others[body["key"]] = body["value"]
    elif what == "write/experiment/tags":
        kept.tags += body["addedTags"]
    elif what == "write/experiment/update-status":
        kept.state = "crashed" if body["hasCrashed"] else "alive" if body["isAlive"] else "finished"
    elif what == "experiment/metrics/summary":
        return 200, {"values": [{"name": name} for name in sorted({name for name, _, _ in kept.points})]}
    elif what == "experiment/metrics/get-metric":
        found = [(step, value) for name, step, value in kept.points if name == query["metricName"]]
        return 200, {"metrics": [{"step": step, "metricValue": str(value)} for step, value in found]}
    elif what == "experiment/asset/list":
        return 200, {"assets": [{"fileName": name} for name, _ in kept.assets]}
    return 200, {"code": 200, "msg": "ok"}


def _file_of(raw: bytes, headers: Message) -> bytes:
    head = f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode()
    for part in BytesParser().parsebytes(head + raw).get_payload():
        assert isinstance(part, Message)
        if part.get_param("name", header="content-disposition") == "file":
            content = part.get_payload(decode=True)
            assert isinstance(content, bytes)
            return content
    raise AssertionError("no file")
