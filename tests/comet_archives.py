"""Comet's offline archives, opened: what lies in them, every message checked against Comet's own schemas."""

import json
import zipfile
from pathlib import Path
from typing import Any

import comet_ml
import jsonschema

from preference_tuning.tracking.folder import RunFolder

SCHEMAS = Path(comet_ml.__file__).parent / "schemas"
SCHEMA_OF = {
    "metric_msg": "metric-msg", "parameter_msg": "parameter-msg", "log_other": "log-other-msg", "file_upload": "file-upload-msg",
}  # fmt: skip


class Opened:
    """What lies in an archive, every message checked against Comet's own schemas."""

    def __init__(self, path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            self.about = json.loads(archive.read("experiment.json"))
            messages = [json.loads(line) for line in archive.read("messages.json").decode().splitlines()]
            self.raw = b"".join(archive.read(name) for name in archive.namelist())
            check("experiment", self.about)
            self.types = {message["type"] for message in messages}
            of_type: dict[str, list[Any]] = {name: [] for name in SCHEMA_OF}
            for message in messages:
                check(SCHEMA_OF[message["type"]], message["payload"])
                of_type[message["type"]].append(message["payload"])
            self.files = {
                payload["additional_params"].get("fileName") or payload["additional_params"]["figName"]: archive.read(payload["file_path"])
                for payload in of_type["file_upload"]
            }  # fmt: skip
        logged = [payload["metric"] for payload in of_type["metric_msg"]]
        own = [m for m in logged if m["metricName"] != "process duration"]  # Comet's
        self.metrics = {(m["metricName"], m["step"]): m["metricValue"] for m in own}
        assert len(self.metrics) == len(own), "a point is there once"
        self.parameters = {p["param"]["paramName"]: p["param"]["paramValue"] for p in of_type["parameter_msg"]}
        self.others = {payload["key"]: payload["value"] for payload in of_type["log_other"]}


def check(kind: str, payload: Any) -> None:
    jsonschema.validate(payload, json.loads((SCHEMAS / f"offline-{kind}.schema.json").read_text(encoding="utf-8")))


def opened(run: RunFolder) -> dict[str, Opened]:
    return {path.stem: Opened(path) for path in run.archives()}
