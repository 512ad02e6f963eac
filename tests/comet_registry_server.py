"""A stand-in for Comet on the loopback, as far as experiments with model files and the model registry go.

It speaks what comet_ml 3.58 sends, keeps what it is sent, and can hang, fail, or refuse a status.
"""

import gzip
import json
import re
import threading
import time
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY, WORKSPACE = "right-key-0123456789", "team"


class CometServer:
    """What the server knows, and what it has been asked."""

    def __init__(self) -> None:
        self.experiments: dict[str, dict[str, str]] = {}
        self.assets: list[dict[str, Any]] = []
        self.models: dict[str, dict[str, dict[str, Any]]] = {}
        """By name, then by number."""
        self.statuses = ["None", "Staging", "Production"]
        self.asked: list[tuple[str, dict[str, Any]]] = []
        """Every request's path and its payload."""
        self.hanging: re.Pattern[str] | None = None
        self.failing: dict[str, int] = {}
        """How often a path is answered 503, by the end of the path."""
        self.before: dict[str, Any] = {}
        """What happens before a path is answered, once."""
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Return what leads comet_ml here."""
        return {
            "COMET_URL_OVERRIDE": f"http://127.0.0.1:{self._http.server_port}/clientlib/",
            "COMET_API_KEY": KEY,
            "COMET_GET_OR_ADD_EXPERIMENT_RETRY_TOTAL": "1",
        }

    def close(self) -> None:
        """Stop."""
        self._http.shutdown()
        self._http.server_close()

    def sent(self, end: str) -> list[dict[str, Any]]:
        """Return the payloads of the requests whose path ends so."""
        return [payload for path, payload in self.asked if path.endswith(end)]

    def files(self, group: str) -> dict[str, list[bytes]]:
        """Return the contents that arrived of each file of a model."""
        found: dict[str, list[bytes]] = {}
        for asset in self.assets:
            if asset["group"] == group:
                found.setdefault(asset["name"], []).append(asset["bytes"])
        return found

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._serve({})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                kind = self.headers.get("Content-Type", "")
                if kind.startswith("multipart/"):
                    self._serve({"bytes": _file(kind, body)})
                else:
                    self._serve(json.loads(body) if body else {})

            def _serve(self, payload: dict[str, Any]) -> None:
                parts = urlsplit(self.path)
                path = parts.path.replace("//", "/")
                payload = {**{name: values[0] for name, values in parse_qs(parts.query).items()}, **payload}
                server.asked.append((path, payload))
                key = self.headers.get("Authorization") or self.headers.get("Comet-Sdk-Api") or payload.get("apiKey")
                status, answer = server.answer(path, payload, key)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        return Handler

    def answer(self, path: str, payload: dict[str, Any], key: str | None) -> tuple[int, Any]:
        """Return status and body."""
        if self.hanging and self.hanging.search(path):
            time.sleep(60)
        for end, left in self.failing.items():
            if path.endswith(end) and left > 0:
                self.failing[end] = left - 1
                return 503, {"msg": "overloaded"}
        for end in [end for end in self.before if path.endswith(end)]:
            self.before.pop(end)()
        if key is not None and key != KEY:
            return 401, {"code": 401, "msg": "not authorized"}
        for pattern, method in ROUTES.items():
            if path.endswith(pattern):
                found: tuple[int, Any] = getattr(self, method)(payload)
                return found
        return 200, {"code": 200, "msg": "ok"}

    def alive(self, _: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"version": "4.40.0", "msg": "4.40.0"}

    def account(self, _: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"userName": "someone", "defaultWorkspaceName": WORKSPACE}

    def run(self, payload: dict[str, Any]) -> tuple[int, Any]:
        key = payload.get("experimentKey") or payload.get("previousExperiment")
        if key in self.experiments and payload.get("experimentKey") and not payload.get("getOrCreateEnabled"):
            return 400, {"sdk_error_code": 90999, "msg": "exists"}
        known = {
            "workspaceName": payload.get("teamName") or WORKSPACE,
            "projectName": payload.get("projectName") or "p",
        }
        self.experiments.setdefault(str(key), known)
        return 200, {"runId": "r", "project_id": "p", "focusUrl": "", "lastOffset": 0, "featureToggles": []}

    def beat(self, _: dict[str, Any]) -> tuple[int, Any]:
        names = ("is_alive_beat_duration_millis", "gpu_monitor_interval_millis", "cpu_monitor_interval_millis")
        return 200, dict.fromkeys(names, 60000)

    def upload(self, payload: dict[str, Any]) -> tuple[int, Any]:
        kept = {
            "experiment": payload["experimentId"],
            "group": payload.get("groupingName"),
            "name": payload["fileName"],
        }
        self.assets.append({**kept, "bytes": payload["bytes"], "type": payload["type"]})
        return 200, {"assetId": payload.get("assetId", "x"), "link": "http://x"}

    def metadata(self, payload: dict[str, Any]) -> tuple[int, Any]:
        key = payload["experimentKey"]
        if key not in self.experiments:
            return 400, {"msg": "no such experiment"}
        return 200, {"experimentKey": key, "experimentName": "x", "archived": False, **self.experiments[key]}

    def experiment_models(self, payload: dict[str, Any]) -> tuple[int, Any]:
        groups = {asset["group"] for asset in self.assets if asset["experiment"] == payload["experimentKey"]}
        return 200, {"models": [{"modelName": group} for group in sorted(groups)]}

    def experiment_assets(self, payload: dict[str, Any]) -> tuple[int, Any]:
        found = [asset for asset in self.assets if asset["group"] == payload["modelName"]]
        return 200, {"assets": [{"fileName": a["name"], "fileSize": len(a["bytes"])} for a in found]}

    def model_names(self, payload: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"registryModels": [{"modelName": name} for name in self.models]}

    def compact(self, payload: dict[str, Any]) -> tuple[int, Any]:
        if payload["modelName"] not in self.models:
            return 400, {"msg": "no such model"}
        return 200, {"registryModelId": payload["modelName"]}

    def items(self, payload: dict[str, Any]) -> tuple[int, Any]:
        versions = self.models[payload["modelName"]]
        tag = payload.get("tag")
        return 200, {
            "items": [{"version": n} for n, v in reversed(versions.items()) if tag is None or tag in v["tags"]]
        }

    def details(self, payload: dict[str, Any]) -> tuple[int, Any]:
        versions = self.models[payload["modelName"]]
        if "version" in payload:
            return 200, versions[payload["version"]]
        return 200, {"registryModelId": payload["modelName"], "versions": list(versions.values())}

    def allowed(self, _: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"allowedStatus": self.statuses}

    def create(self, payload: dict[str, Any]) -> tuple[int, Any]:
        versions = self.models.setdefault(payload["registryModelName"], {})
        number = payload["version"]
        if number in versions:
            return 400, {"msg": f"version {number} exists"}
        item = f"{payload['registryModelName']}:{number}"
        versions[number] = {
            "version": number, "registryModelItemId": item, "tags": list(payload["tags"] or []), "status": "None",
            "experimentKey": payload["experimentKey"], "model": payload["experimentModelName"],
            "public": payload["publicModel"], "comment": payload["versionComment"],
        }  # fmt: skip
        return 200, {"registryModelItemId": item}

    def tag(self, payload: dict[str, Any]) -> tuple[int, Any]:
        self._item(payload)["tags"].append(payload["stage"])
        return 200, {}

    def untag(self, payload: dict[str, Any]) -> tuple[int, Any]:
        self._item(payload)["tags"].remove(payload["stage"])
        return 200, {}

    def status(self, payload: dict[str, Any]) -> tuple[int, Any]:
        if payload["status"] not in self.statuses:
            return 400, {"msg": "no such status"}
        self._item(payload)["status"] = payload["status"]
        return 200, {}

    def delete(self, payload: dict[str, Any]) -> tuple[int, Any]:
        name, number = payload["modelItemId"].rsplit(":", 1)
        del self.models[name][number]
        return 200, {}

    def _item(self, payload: dict[str, Any]) -> dict[str, Any]:
        name, number = payload["modelItemId"].rsplit(":", 1)
        return self.models[name][number]


ROUTES = {
    "/isAlive/ver": "alive",
    "/account-details": "account",
    "/logger/add/run": "run",
    "/logger/get/run": "run",
    "/status-report/update": "beat",
    "/asset/upload": "upload",
    "/experiment/metadata": "metadata",
    "/experiment/model": "experiment_models",
    "/experiment/model/asset/list": "experiment_assets",
    "/registry-model": "model_names",
    "/registry-model/compact-details": "compact",
    "/registry-model/items": "items",
    "/registry-model/item/details": "details",
    "/registry-model/details": "details",
    "/registry-model/allowed_status_values": "allowed",
    "/write/registry-model/item/create": "create",
    "/write/registry-model/item/stage": "tag",
    "/write/registry-model/item/stage/delete": "untag",
    "/write/registry-model/item/status": "status",
    "/write/registry-model/item/delete": "delete",
}


def _file(kind: str, body: bytes) -> bytes:
    message = BytesParser(policy=HTTP).parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body)
    for part in message.iter_parts():
        if part.get_param("name", header="content-disposition") == "file":
            found: bytes = part.get_payload(decode=True)
            return found
    return b""
