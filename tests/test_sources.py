"""Rows from sources: every kind gives the same rows at the right places, every broken one gives one clear error."""

import csv
import gzip
import io
import json
import logging
import os
import threading
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from broken import BROKEN, GOOD, Broken, lines, zst
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from preference_tuning import fingerprint
from preference_tuning.config import DataConfig, SFTSourceConfig
from preference_tuning.data import sources
from preference_tuning.data.pair import Row
from preference_tuning.data.sources import json_rows, origins, tabular
from preference_tuning.errors import ConfigError, DataError

# Python prints what goes wrong while objects are torn down, which a user would see as a traceback.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")

READING = [broken for broken in BROKEN if broken.stage == "read"]
LATER = [broken for broken in BROKEN if broken.stage == "rows"]
LIMIT = 1_000_000


def opened(source: Path | str, limit: int = LIMIT, **settings_: Any) -> sources.Reading:
    config = DataConfig(source=str(source), **settings_)
    return sources.open_source(config, None, limit, config.allow_urls)


def read(source: Path | str, limit: int = LIMIT, **settings_: Any) -> list[Row]:
    return list(opened(source, limit, **settings_).rows())


def values(rows: list[Row]) -> list[dict[str, Any]]:
    assert all(type(row.values) is dict for row in rows)
    return [row.values for row in rows]


@pytest.mark.parametrize("broken", READING, ids=lambda broken: broken.id)
def test_a_broken_source_gets_one_message(broken: Broken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = broken.write(tmp_path)
    for name, value in broken.variables(tmp_path).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError) as caught:
        read(source, **broken.settings)
    text = str(caught.value)
    for part in broken.message:
        assert part in text
    if "[::1" not in source:
        assert Path(broken.name).name[:100] in text
    assert len(text.splitlines()) == 1
    assert len(text) < 1000
    assert "Traceback" not in text
    assert "Error" not in text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("broken", LATER, ids=lambda broken: broken.id)
def test_rows_that_a_later_stage_refuses_can_be_read(broken: Broken, tmp_path: Path) -> None:
    settings_ = {name: value for name, value in broken.settings.items() if name != "columns"}
    rows = read(broken.write(tmp_path), **settings_)
    assert all(row.flaw is None or row.flaw.problem == "too_large" for row in rows)
    assert any(row.flaw for row in rows) is ("too_large" in broken.message)


def test_the_corpus_is_large() -> None:
    assert len(READING) >= 60
    assert len({broken.id for broken in BROKEN}) == len(BROKEN) >= 90


RICH = [{**row, "prompt": f'"{row["prompt"]}"\nLine two, é 日本 😀', "topic": ""} for row in GOOD] * 3


def text_as(kind: str) -> tuple[bytes, list[int]]:
    """The rows as a text file, and the numbers they must have."""
    if kind in ("jsonl", "ndjson"):
        made = [json.dumps(row, ensure_ascii=False) for row in RICH]
        return ("\n \n".join(made) + "\r\n").encode(), list(range(1, 18, 2))
    if kind == "json":
        return json.dumps(RICH, indent=1).encode(), list(range(1, 10))
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(RICH[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(RICH)
    return stream.getvalue().encode(), list(range(2, 20, 2))


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv"])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "mark"])
def test_every_kind_of_file_gives_the_same_rows(kind: str, packing: str, mark: bytes, tmp_path: Path) -> None:
    text, numbers = text_as(kind)
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zst}[packing]
    # Two members of gzip, two frames of zstd: both are one stream.
    half = len(text) // 2
    path = tmp_path / f"rows.{kind.upper() if packing else kind}{packing}"
    path.write_bytes(pack(mark + text[:half]) + pack(text[half:]))
    reading = opened(path)
    assert (reading.unit, reading.total, reading.position) == ("B", path.stat().st_size, 0)
    assert reading.place == ("row" if kind == "json" else "line")
    assert (reading.name, reading.test_split) == (str(path), None)
    rows = list(reading.rows())
    assert values(rows) == RICH
    assert [row.number for row in rows] == numbers
    assert {(row.held_out, row.flaw) for row in rows} == {(None, None)}
    assert reading.position == reading.total
    assert sources.fingerprint_of(DataConfig(source=str(path))) == fingerprint.of_file(path)


def test_parquet_and_saved_datasets_give_the_same_rows(tmp_path: Path) -> None:
    import datasets

    nested = [{**row, "chosen": [{"role": "assistant", "content": row["chosen"]}], "score": 0.5} for row in RICH]
    pq.write_table(pa.Table.from_pylist(nested), tmp_path / "rows.parquet", row_group_size=4)
    whole = datasets.Dataset.from_list(nested)
    whole.with_format("numpy", columns=["score"]).save_to_disk(str(tmp_path / "saved"))
    for name in ("rows.parquet", "saved"):
        reading = opened(tmp_path / name)
        assert (reading.unit, reading.total, reading.position, reading.place) == ("rows", 9, 0, "row")
        rows = list(reading.rows())
        assert values(rows) == nested
        assert [row.number for row in rows] == list(range(1, 10))
        assert reading.position == 9
        assert len(sources.fingerprint_of(DataConfig(source=str(tmp_path / name)))) == 64


def test_position_follows_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, "rows": GOOD * 5000}))
    reading = opened(path)
    seen = [reading.position for _ in reading.rows()]
    assert seen == sorted(seen)
    assert 0 < seen[0] < reading.total / 10, "the pass that looks for the list does not count"


def test_large_lines_are_passed_over_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as stream:
        stream.write(lines(GOOD[:1]))
        for _ in range(30):
            stream.write(b"x" * (1 << 20))
        stream.write(b"\n" + lines(GOOD[1:2]) + b"x" * 2_000_000)
    tracemalloc.start()
    rows = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000
    assert values(rows) == [GOOD[0], {}, GOOD[1], {}]
    flaws = [(row.number, row.flaw.problem, row.flaw.detail) for row in rows if row.flaw]
    assert flaws == [
        (2, "too_large", "the line has 31,457,280 bytes, more than data.max_row_bytes = 1,000,000"),
        (4, "too_large", "the line has 2,000,000 bytes, more than data.max_row_bytes = 1,000,000"),
    ]


def test_a_json_value_too_large_to_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (json_rows, tabular):
        monkeypatch.setattr(module, "MAX_PIECE", 1_000_000)
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a": "' + "x" * 2_000_000)
    with pytest.raises(DataError, match=r"rows.json, line 1, row 2: one value of more than 1,000,000 characters"):
        read(path)
    path = tmp_path / "rows.csv"
    path.write_text('a\n1\n"' + "x\n" * 1_000_000)
    with pytest.raises(DataError, match=r"rows.csv, line \d+: a row of more than 1,000,000 bytes; is a quote never"):
        read(path)


def test_json_is_held_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"a": "x" * 1000}] * 20_000))
    tracemalloc.start()
    assert sum(1 for _ in opened(path).rows()) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_a_row_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for ending in (b"\n", b"\r\n", b""):
        path.write_bytes(b'{"a": "' + b"x" * 191 + b'"}' + ending)
        assert len(values(read(path, 200))[0]["a"]) == 191
    assert read(path, 199)[0].flaw is not None


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.parquet", "saved"])
def test_large_rows_of_other_kinds_are_flaws_too(name: str, tmp_path: Path) -> None:
    import datasets

    rows = [GOOD[0], {**GOOD[1], "chosen": "x" * 2000}, GOOD[2]]
    path = tmp_path / name
    if name == "rows.json":
        path.write_text(json.dumps(rows))
    elif name == "rows.csv":
        path.write_text("prompt,chosen,rejected\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    elif name == "rows.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    found = read(path, 1000)
    assert values(found) == [GOOD[0], {}, GOOD[2]]
    assert [row.flaw.problem for row in found if row.flaw] == ["too_large"]


def test_words_that_look_missing_are_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("\na,b,c,d\nNA,null,None,\n\nx\n")
    rows = read(path)
    assert values(rows) == [
        {"a": "NA", "b": "null", "c": "None", "d": ""},
        {"a": "x", "b": None, "c": None, "d": None},
    ]
    assert [row.number for row in rows] == [3, 5]


def test_lists_inside_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(
        json.dumps({"about": {"tags": ["a"], "n": 1}, "data": {"train": GOOD, "test": [{"x": [{"y": 1}]}]}})
    )
    assert values(read(path, records="data.train")) == GOOD
    assert values(read(path, records="data.test")) == [{"x": [{"y": 1}]}]
    path.write_text(json.dumps({"tags": ["a", "b"], "data": {"rows": GOOD}, "n": None}))
    assert values(read(path)) == GOOD, "the only list of objects needs no name"


def test_json_values_arrive_as_they_are(tmp_path: Path) -> None:
    row = {"i": 2**70, "f": -0.5, "e": 1e-7, "t": [True, False, None, [], {}], "u": '\ud800 \\ " / \b\f\n\r\t \0é😀'}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    for name in ("rows.json", "rows.jsonl"):
        (found,) = values(read(tmp_path / name))
        assert found == row
        assert [type(value) for value in found.values()] == [int, float, float, list, str]


@pytest.mark.parametrize(
    ("splits", "split", "test_split", "expected"),
    [
        (["train", "validation", "test"], "train", "auto", "test"),
        (["train", "validation"], "train", "auto", "validation"),
        (["train", "other"], "train", "auto", None),
        (["train_prefs", "test_prefs", "test_sft"], "train_prefs", "auto", "test_prefs"),
        (["train_sft", "test"], "train_sft", "auto", None),
        (["train", "test"], "test", "auto", None),
        (["train", "test"], "train", "none", None),
        (["train", "test", "dev"], "train", "dev", "dev"),
    ],
)
def test_the_held_out_split_of_a_saved_dataset(
    splits: list[str], split: str, test_split: str, expected: str | None, tmp_path: Path
) -> None:
    import datasets

    made = {name: datasets.Dataset.from_list([{"of": name}] * 2) for name in splits}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    reading = opened(tmp_path / "saved", split=split, test_split=test_split)
    rows = list(reading.rows())
    assert reading.test_split == expected
    assert reading.position == reading.total == len(rows)
    found = [(row.number, row.values["of"], row.held_out) for row in rows]
    if expected is None:
        assert found == [(1, split, None), (2, split, None)]
    else:
        assert found == [(1, split, False), (2, split, False), (1, expected, True), (2, expected, True)]


def test_sft_sources_read_their_split_only(tmp_path: Path) -> None:
    import datasets

    made = {name: datasets.Dataset.from_list([{"of": name}]) for name in ("train", "test")}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    reading = sources.open_source(SFTSourceConfig(source=str(tmp_path / "saved")), None, LIMIT)
    assert [(row.values, row.held_out) for row in reading.rows()] == [({"of": "train"}, None)]


def test_an_empty_saved_dataset_has_no_rows(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"prompt": []}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"saved: there are no rows"):
        read(tmp_path / "saved")


def test_the_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"cannot load 'nobody/nothing' from the hub: ") as caught:
        opened("nobody/nothing")
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="cannot reach the hub"):
        sources.fingerprint_of(DataConfig(source="nobody/nothing"))


def test_a_path_has_no_revision(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(GOOD))
    with pytest.raises(ConfigError, match=r"data.revision: .* is a local path, which has no revision"):
        sources.fingerprint_of(DataConfig(source=str(tmp_path / "rows.jsonl"), revision="main"))


def test_files_that_go_away_or_are_closed_to_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(GOOD))
    reading = opened(path)
    path.unlink()
    with pytest.raises(DataError, match=r"rows.jsonl: cannot be read: No such file"):
        list(reading.rows())
    path.write_bytes(lines(GOOD))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    for look in (opened, lambda source: sources.fingerprint_of(DataConfig(source=str(source)))):
        with pytest.raises(DataError, match=r"cannot read .*rows.jsonl: Permission denied"):
            look(path)


def test_sources_inside_the_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_bytes(lines(GOOD))
    (tmp_path / "a" / "link.jsonl").symlink_to(tmp_path / "b" / "rows.jsonl")
    monkeypatch.setenv("PREFERENCE_TUNING_DATA_ROOTS", os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert values(read(tmp_path / "a" / "link.jsonl")) == GOOD
    monkeypatch.chdir(tmp_path / "a")
    assert values(read("rows.jsonl")) == GOOD
    monkeypatch.setenv("PREFERENCE_TUNING_DATA_ROOTS", str(tmp_path / "a"))
    for look in (read, lambda source: sources.fingerprint_of(DataConfig(source=str(source)))):
        with pytest.raises(DataError, match="outside the allowed data roots"):
            look(tmp_path / "a" / "link.jsonl")


class Pages(BaseHTTPRequestHandler):
    """A few pages; ``hits`` has the paths that were asked for."""

    hits: ClassVar[list[str]] = []
    pages: ClassVar[dict[str, bytes]] = {
        "/rows.jsonl": lines(GOOD),
        "/rows.jsonl.gz": gzip.compress(lines(GOOD)),
        "/empty.jsonl": b"",
    }

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hits.append(path)
        moved = {"/moved.jsonl": "/rows.jsonl", "/round.jsonl": "/round.jsonl", "/local.jsonl": "file:///etc/passwd"}
        page = self.pages.get(path)
        self.send_response(302 if path in moved else 404 if page is None else 200)
        if path in moved:
            self.send_header("Location", moved[path])
        if path.endswith(".gz"):
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(page or b"") + (5 if "cut" in self.path else 0)))
        self.end_headers()
        self.wfile.write(page or b"")

    def log_message(self, *_: Any) -> None:
        """Stay quiet."""


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Pages.hits = []
    server = HTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_addresses_are_downloaded_once(
    web: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Signed ones too, which no config holds: what is signed is nowhere to be seen."""
    caplog.set_level(logging.DEBUG)
    for name in ("rows.jsonl", "moved.jsonl", "rows.jsonl.gz"):
        url = f"http://me:secret@{web}/{name}?token=secret"
        monkeypatch.setenv("ROWS_URL", url)
        reading = opened("env:ROWS_URL", allow_urls=True)
        assert values(list(reading.rows())) == GOOD
        assert reading.name == f"http://{web}/{name}"
        found = sources.fingerprint_of(DataConfig(source="env:ROWS_URL", allow_urls=True), allow_urls=True)
        assert found == fingerprint.of_file(origins.DOWNLOADS.paths[url])
    assert "secret" not in caplog.text
    monkeypatch.delenv("ROWS_URL")
    with pytest.raises(DataError, match="the environment variable ROWS_URL is not set"):
        opened("env:ROWS_URL", allow_urls=True)
    assert Pages.hits == ["/rows.jsonl", "/moved.jsonl", "/rows.jsonl", "/rows.jsonl.gz"]


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("none.jsonl", "the server answers 404"),
        ("round.jsonl", "Exceeded maximum allowed redirects"),
        ("local.jsonl", "cannot download"),
        ("empty.jsonl", "is empty"),
        ("rows.jsonl?cut", "cannot download"),
    ],
)
def test_addresses_that_fail(web: str, page: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWS_URL", f"http://me:secret@{web}/{page}")
    with pytest.raises(DataError) as caught:
        opened("env:ROWS_URL", allow_urls=True)
    text = str(caught.value)
    assert reason in text
    assert page.partition("?")[0] in text
    assert "secret" not in text
    assert len(text.splitlines()) == 1


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
anything = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
many = st.lists(st.dictionaries(st.text(), anything, max_size=4), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=many, chunk=st.integers(1, 40), indent=st.sampled_from([None, 1]), ascii_=st.booleans())
def test_json_is_the_same_wherever_it_is_cut_into_pieces(
    rows: list[dict[str, Any]], chunk: int, indent: int | None, ascii_: bool, tmp_path: Path
) -> None:
    path = tmp_path / "rows.json"
    text = json.dumps({"n": [1.5e-7], "all": {"rows": rows}, "z": 12345}, indent=indent, ensure_ascii=ascii_)
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "CHUNK", chunk)
        assert values(read(path)) == rows
        path.write_text(text[:-1], encoding="utf-8")
        assert refusal(path) is not None, "a cut file is always noticed"


def refusal(path: Path) -> DataError | None:
    """Return the one error there may be; any other kind of exception fails the test."""
    try:
        assert values(read(path))
    except DataError as error:
        return error
    return None


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.one_of(
        st.binary(max_size=200),
        st.text('[]{}":,\\u0d8a-+.eEnN19 \n\rtrufals\ufeff\u0661', max_size=80).map(str.encode),
    ),
    name=st.sampled_from(["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz", "rows.json.zst", "rows.parquet"]),
)
@example(data=b"[\xc3", name="rows.json")
@example(data=b"[\xe0\x80", name="rows.json")
@example(data=b'[{"a":"', name="rows.json")
@example(data=b'[{"a":"\\u12', name="rows.json")
@example(data=b"", name="rows.csv")
@example(data=b"\n", name="rows.csv")
def test_no_bytes_lead_to_anything_but_rows_or_the_one_error(data: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert name in str(refusal(path) or name)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    place=st.integers(0, 5000), byte=st.integers(0, 255), packing=st.sampled_from(["jsonl.gz", "json.zst", "parquet"])
)
def test_damage_anywhere_is_an_error_or_harmless(place: int, byte: int, packing: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{packing}"
    if packing == "parquet":
        pq.write_table(pa.Table.from_pylist(RICH), path)
    else:
        text = json.dumps(RICH).encode() if "json." in packing else lines(RICH)
        path.write_bytes(gzip.compress(text) if "gz" in packing else zst(text))
    data = bytearray(path.read_bytes())
    data[place % len(data)] = byte
    path.write_bytes(data)
    assert path.name in str(refusal(path) or path.name)
