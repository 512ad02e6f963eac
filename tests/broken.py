"""Broken sources, each with the parts of the one error that it must lead to.

``stage`` says who finds the fault: ``read`` while rows are read from the source, ``rows`` when the rows become pairs.
"""

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

Rows = list[dict[str, Any]]
GOOD: Rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"NO {i}"} for i in range(3)]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def second(**change: Any) -> bytes:
    """Three rows as JSON Lines, of which the second has a field that is not as it should be."""
    return lines([GOOD[0], {**GOOD[1], **change}, GOOD[2]])


def raw_second(line: str) -> bytes:
    return lines(GOOD[:1]) + line.encode() + b"\n" + lines(GOOD[2:])


def zst(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@dataclass(frozen=True)
class Broken:
    """A broken source. ``name`` is its path below a folder, ``make`` its bytes or what makes it in that folder."""

    id: str
    name: str
    make: bytes | Callable[[Path], object]
    message: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    """Of DataConfig, beside the source."""
    stage: Literal["read", "rows"] = "read"
    environment: dict[str, str] = field(default_factory=dict)
    """``{folder}`` in a value stands for the folder."""
    source: str | None = None
    """In place of the path; ``{folder}`` stands for the folder."""

    def write(self, folder: Path) -> str:
        """Make the source below ``folder`` and return what the config calls it."""
        if isinstance(self.make, bytes):
            (folder / self.name).write_bytes(self.make)
        else:
            self.make(folder)
        return (self.source or "{folder}/" + self.name).replace("{folder}", str(folder))

    def variables(self, folder: Path) -> dict[str, str]:
        """Return the environment variables that belong to the source."""
        return {name: value.replace("{folder}", str(folder)) for name, value in self.environment.items()}


def parquet(change: Callable[[bytes], bytes] = bytes, rows: Rows = GOOD, **options: Any) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        path = folder / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, compression="none", **options)
        path.write_bytes(change(path.read_bytes()))

    return make


def later_group_broken(folder: Path) -> None:
    """Overwrite the data of the last row group; the footer, and so the schema and the first groups, stay whole."""
    path = folder / "rows.parquet"
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"NO {i}"} for i in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000, compression="zstd")
    group = pq.read_metadata(path).row_group(2)
    start = min(group.column(i).dictionary_page_offset or group.column(i).data_page_offset for i in range(3))
    size = sum(group.column(i).total_compressed_size for i in range(3))
    data = bytearray(path.read_bytes())
    data[start : start + size] = b"\xff" * size
    path.write_bytes(data)


def saved(*names: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        import datasets

        splits = {name: datasets.Dataset.from_list(GOOD) for name in names}
        datasets.DatasetDict(splits).save_to_disk(str(folder / "saved"))

    return make


def saved_with_a_cut_table(folder: Path) -> None:
    saved("train")(folder)
    (table,) = (folder / "saved" / "train").glob("*.arrow")
    table.write_bytes(table.read_bytes()[:100])


def folder_with(**contents: bytes) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / "data").mkdir()
        for name, data in contents.items():
            (folder / "data" / name.replace("__", "-").replace("_", ".").replace("-", "_")).write_bytes(data)

    return make


def outside(link: bool) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / "allowed").mkdir()
        (folder / "rows.jsonl").write_bytes(lines(GOOD))
        if link:
            (folder / "allowed" / "rows.jsonl").symlink_to(folder / "rows.jsonl")

    return make


def nothing(folder: Path) -> None:
    """The source is not there, or not a file."""


ROOTS = {"PREFERENCE_TUNING_DATA_ROOTS": "{folder}/allowed"}
TEXT = lines(GOOD)
HEADER = b"prompt,chosen,rejected\n"
COLUMNAR = {key: [row[key] for row in GOOD] for key in GOOD[0]}
NESTED = {"data": {"train": GOOD, "test": GOOD[:1]}, "version": 1}
CONVERSATION = [said("user", "Who?"), said("assistant", "Me.")]

FILES = [
    Broken("missing-file", "none.jsonl", nothing, ("no such file",)),
    Broken("unknown-suffix", "rows.xlsx", b"PK", ("unknown kind of file", ".jsonl")),
    Broken("no-suffix", "rows", b"x", ("unknown kind of file",)),
    Broken("packed-parquet", "rows.parquet.gz", gzip.compress(b"x"), ("unknown kind of file",)),
    Broken("empty", "rows.jsonl", b"", ("is empty",)),
    Broken("empty-parquet", "rows.parquet", b"", ("is empty",)),
    Broken("empty-gz", "rows.jsonl.gz", gzip.compress(b""), ("is empty",)),
    Broken("only-a-mark", "rows.jsonl", b"\xef\xbb\xbf", ("there are no rows",)),
    Broken("only-white-space", "rows.jsonl", b"\n  \n\t\n", ("there are no rows",)),
    Broken("a-pipe", "rows.jsonl", lambda folder: os.mkfifo(folder / "rows.jsonl"), ("neither a file nor a directory",)),
    Broken("name-too-long", "x" * 300 + ".jsonl", nothing, ("cannot read", "too long")),
    Broken("truncated-gz", "rows.jsonl.gz", gzip.compress(TEXT * 50)[:-20], (".gz data is cut off",)),
    Broken("truncated-json-gz", "rows.json.gz", gzip.compress(json.dumps(GOOD * 9).encode())[:-20], (".gz data is cut off",)),
    Broken("json-zst-cut-in-a-text", "rows.json.zst", zst(json.dumps([{"a": os.urandom(90_000).hex()}]).encode())[:-9000], (".zst data is cut off",)),
    Broken("not-a-gz", "rows.jsonl.gz", TEXT, ("not valid .gz data",)),
    Broken("damaged-gz", "rows.jsonl.gz", gzip.compress(TEXT)[:15] + b"\xff" * 40, (".gz data",)),
    Broken("truncated-zst", "rows.jsonl.zst", zst(TEXT * 50)[:-9], (".zst data is cut off",)),
    Broken("not-a-zst", "rows.csv.zst", TEXT, ("not valid .zst data",)),
    Broken("utf-16-le", "rows.jsonl", TEXT.decode().encode("utf-16-le"), ("is UTF-16, not UTF-8", "save it as UTF-8")),
    Broken("utf-16-be", "rows.csv", HEADER.decode().encode("utf-16-be"), ("is UTF-16, not UTF-8",)),
    Broken("utf-16-mark", "rows.json", b"\xff\xfe" + "[]".encode("utf-16-le"), ("is UTF-16, not UTF-8",)),
    Broken("utf-32", "rows.jsonl", TEXT.decode().encode("utf-32"), ("is UTF-32, not UTF-8",)),
    Broken("latin-1", "rows.jsonl", lines(GOOD[:1]) + b'{"prompt": "caf\xe9"}\n', ("line 2", "not UTF-8 text (byte 16")),
    Broken("latin-1-csv", "rows.csv", HEADER + b"a,caf\xe9,c\n", ("line 2", "not UTF-8 text")),
    Broken("latin-1-json", "rows.json", b'[{"prompt": "caf\xe9"}]', ("line 1", "not UTF-8 text")),
]  # fmt: skip
JSON_LINES = [
    Broken("truncated-last-line", "rows.jsonl", TEXT[:-20], ("line 3", "not JSON", "What is 2")),
    Broken("broken-line", "rows.ndjson", raw_second("{'prompt': 1}"), ("line 2", "not JSON", "double quotes")),
    Broken("two-rows-on-a-line", "rows.jsonl", raw_second("{} {}"), ("line 2", "more text behind the end")),
    Broken("a-list-over-many-lines", "rows.jsonl", json.dumps(GOOD, indent=1).encode(), ("line 1", "not JSON")),
    Broken("duplicate-key", "rows.jsonl", raw_second('{"prompt": "a", "prompt": "b"}'), ("line 2", "'prompt' occurs twice")),
    Broken("duplicate-nested-key", "rows.jsonl", raw_second('{"chosen": [{"role": "a", "role": "b"}]}'), ("line 2", "'role' occurs twice")),
    Broken("row-is-a-list", "rows.jsonl", raw_second("[1]"), ("line 2", "object with named fields, not list")),
    Broken("row-is-a-text", "rows.jsonl", raw_second('"a"'), ("line 2", "object with named fields, not text")),
    Broken("nan", "rows.jsonl", raw_second('{"score": NaN}'), ("line 2", "NaN is not finite")),
    Broken("infinity", "rows.jsonl", raw_second('{"score": -Infinity}'), ("line 2", "-Infinity is not finite")),
    Broken("number-overflows", "rows.jsonl", raw_second('{"score": 1e999}'), ("line 2", "1e999 is not finite")),
    Broken("huge-integer", "rows.jsonl", raw_second('{"score": ' + "9" * 5000 + "}"), ("line 2", "too many digits")),
    Broken("bottomless", "rows.jsonl", raw_second('{"a": ' * 50_000), ("line 2", "nested too deeply")),
    Broken("deep", "rows.jsonl", raw_second('{"a": ' + "[" * 150 + "]" * 150 + "}"), ("line 2", "nested too deeply")),
    Broken("control-character", "rows.jsonl", raw_second('{"a": "\x01"}'), ("line 2", "Invalid control character")),
]  # fmt: skip
JSON = [
    Broken("json-object", "rows.json", b'{"a": 1, "b": "c"}', ("the top level must be a list of rows", "'a', 'b'")),
    Broken("json-scalar", "rows.json", b'"text"', ("the top level must be a list of rows", "single value")),
    Broken("json-two-lists", "rows.json", json.dumps(NESTED).encode(), ("several lists", "data.records", "data.train (3 rows), data.test (1 rows)")),
    Broken("json-no-such-records", "rows.json", json.dumps(NESTED).encode(), ("data.records", "no list at 'data.valid'", "data.train (3 rows)"), {"records": "data.valid"}),
    Broken("json-columnar", "rows.json", json.dumps(COLUMNAR).encode(), ("is columnar", "prompt, chosen, rejected")),
    Broken("json-broken-middle", "rows.json", json.dumps(GOOD, indent=1).encode().replace(b"},", b"}", 1), ("line 7", "not JSON")),
    Broken("json-missing-value", "rows.json", b"[\n{]\n", ("line 2", "not JSON")),
    Broken("json-cut", "rows.json", json.dumps(GOOD).encode()[:-30], ("row 3", "not JSON")),
    Broken("json-trailing-garbage", "rows.json", json.dumps(GOOD).encode() + b" x", ("not JSON", "behind the end")),
    Broken("json-is-json-lines", "rows.json", TEXT, ("not JSON", "name it .jsonl")),
    Broken("json-list-of-texts", "rows.json", b'[{"a": 1}, "b"]', ("row 2", "object with named fields, not text")),
    Broken("json-duplicate-key", "rows.json", b'[{"a": 1}, {"b": {"c": 1, "c": 2}}]', ("row 2", "'c' occurs twice")),
    Broken("json-duplicate-list", "rows.json", b'{"a": [{"b": 1}], "a": [{"b": 2}]}', ("'a' occurs twice",)),
    Broken("json-deep", "rows.json", b'[{"a": ' + b"[" * 50_000, ("row 1", "nested too deeply")),
    Broken("json-nan", "rows.json", b'[{"a": 1},\n{"a": NaN}]', ("line 2, row 2", "NaN is not finite")),
    Broken("json-overflow", "rows.json", b'[{"a": 1}, {"a": -1e999}]', ("row 2", "not finite")),
    Broken("json-huge-integer", "rows.json", b'[{"a": 1},\n{"a": ' + b"9" * 5000 + b"}]", ("line 2, row 2", "too many digits")),
    Broken("json-empty-list", "rows.json", b"[]", ("there are no rows",)),
    Broken("json-only-white-space", "rows.json", b" \n", ("there are no rows",)),
    Broken("json-key-is-no-text", "rows.json", b'{"a": [{}], 1: 2}', ("line 1", "a key must be a text")),
]  # fmt: skip
TABLES = [
    Broken("csv-only-header", "rows.csv", HEADER, ("there are no rows",)),
    Broken("csv-too-many-fields", "rows.csv", HEADER + b'a,"b\nb",c\na,b,c,d\n', ("line 4", "more fields than the header has columns")),
    Broken("csv-duplicate-header", "rows.csv", b"prompt,chosen,chosen\na,b,c\n", ("line 1", "'chosen' twice")),
    Broken("csv-blank-header", "rows.csv", b",prompt,chosen\n0,a,b\n", ("line 1", "column 1 has no name")),
    Broken("csv-unclosed-quote", "rows.csv", HEADER + b'a,b,c\na,"b,c\na,b,c\n', ("line 3", "not CSV", "never closed")),
    Broken("csv-text-after-quote", "rows.csv", HEADER + b'a,"b"b,c\n', ("line 2", "not CSV")),
    Broken("csv-nul", "rows.csv", HEADER + b"a,b\0b,c\n", ("line 2", "NUL")),
    Broken("parquet-bad-magic", "rows.parquet", b"PAR?", ("not a readable Parquet file",)),
    Broken("parquet-cut-off", "rows.parquet", parquet(lambda data: data[:-40]), ("not a readable Parquet file",)),
    Broken("parquet-later-group", "rows.parquet", later_group_broken, ("not a readable Parquet file", "after row ")),
]  # fmt: skip
PLACES = [
    Broken("no-dataset", "data", folder_with(notes_txt=b"x"), ("not a directory saved by datasets",)),
    Broken("directory-of-files", "data", folder_with(b_jsonl=TEXT, a_jsonl=TEXT), ("not a directory saved by datasets", "it holds a.jsonl, b.jsonl", "data.sources")),
    Broken("dataset-without-state", "data", folder_with(dataset__info_json=b"{}"), ("not a directory saved by datasets",)),
    Broken("dataset-cut", "saved", saved_with_a_cut_table, ("saved",)),
    Broken("split-missing", "saved", saved("train", "test"), ("data.split", "no split 'dev'", "train, test"), {"split": "dev"}),
    Broken("test-split-missing", "saved", saved("train", "test"), ("data.test_split", "no split 'dev'", "train, test"), {"test_split": "dev"}),
    Broken("test-split-is-split", "saved", saved("train", "test"), ("data.test_split", "'train'"), {"test_split": "train"}),
    Broken("test-split-of-a-file", "rows.jsonl", TEXT, ("data.test_split", "no splits"), {"test_split": "test"}),
    Broken("outside-the-roots", "rows.jsonl", outside(link=False), ("outside the allowed data roots", "PREFERENCE_TUNING_DATA_ROOTS"), environment=ROOTS),
    Broken("up-and-out", "rows.jsonl", outside(link=False), ("outside the allowed data roots",), environment=ROOTS, source="{folder}/allowed/../rows.jsonl"),
    Broken("link-out-of-the-roots", "allowed/rows.jsonl", outside(link=True), ("outside the allowed data roots",), environment=ROOTS),
    Broken("linked-folder", "allowed", outside(link=True), ("outside the allowed data roots",), environment=ROOTS),
    Broken("address-and-roots", "rows.jsonl", nothing, ("outside the allowed data roots",), {"allow_urls": True}, environment=ROOTS, source="http://127.0.0.1:9/rows.jsonl"),
    Broken("file-address", "rows.jsonl", nothing, ("file addresses are not read",), {"allow_urls": True}, source="file:///etc/rows.jsonl"),
    Broken("s3-address", "rows.jsonl", nothing, ("s3 addresses are not read",), source="s3://bucket/rows.jsonl"),
    Broken("address-not-enabled", "rows.jsonl", nothing, ("address on the web", "data.allow_urls: true"), source="http://127.0.0.1:9/rows.jsonl"),
    Broken("address-nobody-answers", "rows.jsonl", nothing, ("cannot download",), {"allow_urls": True}, source="http://127.0.0.1:9/rows.jsonl"),
    Broken("address-malformed", "rows.jsonl", nothing, ("cannot ",), {"allow_urls": True}, source="http://[::1/rows.jsonl"),
    Broken("address-of-unknown-kind", "page", nothing, ("unknown kind of file",), {"allow_urls": True}, source="http://127.0.0.1:9/page"),
]  # fmt: skip
ROWS = [
    Broken("lone-surrogate", "rows.jsonl", raw_second('{"prompt": "a", "chosen": "\\ud800", "rejected": "c"}'), ("line 2", "`chosen`", "surrogate"), stage="rows"),
    Broken("lone-surrogate-in-json", "rows.json", b'[{"prompt": "a", "chosen": "\\udfff", "rejected": "c"}]', ("row 1", "`chosen`", "surrogate"), stage="rows"),
    Broken("wrong-columns", "rows.jsonl", lines([{"question": "a", "good": "b", "bad": "c"}]), ("rows.jsonl", "question"), stage="rows"),
    Broken("named-column-missing", "rows.jsonl", TEXT, ("better",), {"columns": {"chosen": "better"}}, stage="rows"),
    Broken("null-chosen", "rows.jsonl", second(chosen=None), ("line 2", "`chosen`", "missing"), stage="rows"),
    Broken("null-prompt", "rows.jsonl", second(prompt=None), ("line 2", "`prompt`", "missing"), stage="rows"),
    Broken("no-rejected", "rows.jsonl", lines([GOOD[0], {"prompt": "a", "chosen": "b"}, GOOD[2]]), ("line 2", "`rejected`", "missing"), stage="rows"),
    Broken("csv-too-few-fields", "rows.csv", HEADER + b"a,b,c\nd,e\nf,g,h\n", ("line 3", "`rejected`", "missing"), stage="rows"),
    Broken("number", "rows.jsonl", second(chosen=3), ("line 2", "`chosen`", "not_text"), stage="rows"),
    Broken("boolean", "rows.jsonl", second(rejected=True), ("line 2", "`rejected`", "not_text"), stage="rows"),
    Broken("list-of-numbers", "rows.jsonl", second(chosen=[1, 2]), ("line 2", "`chosen`", "not_text"), stage="rows"),
    Broken("dict-for-text", "rows.jsonl", second(prompt={"x": 1}), ("line 2", "`prompt`"), stage="rows"),
    Broken("mixed-types", "rows.jsonl", lines([GOOD[0], {**GOOD[1], "chosen": 1}, {**GOOD[2], "chosen": {"a": 1}}]), ("line 2", "`chosen`", "not_text"), stage="rows"),
    Broken("30-mb-row", "rows.jsonl", second(chosen="x" * 30_000_000), ("line 2", "too_large", "data.max_row_bytes"), stage="rows"),
    Broken("30-mb-row-of-json", "rows.json", json.dumps([GOOD[0], {**GOOD[1], "chosen": "x" * 30_000_000}]).encode(), ("row 2", "too_large", "data.max_row_bytes"), stage="rows"),
    Broken("30-mb-row-of-csv", "rows.csv", HEADER + b"a,b,c\nd,e," + b"x" * 30_000_000 + b"\n", ("line 3", "too_large", "data.max_row_bytes"), stage="rows"),
    Broken("empty-conversation", "rows.jsonl", second(chosen=[]), ("line 2", "`chosen`", "missing"), stage="rows"),
    Broken("unknown-role", "rows.jsonl", second(prompt=[said("banana", "x")]), ("line 2", "banana"), stage="rows"),
    Broken("prompt-ends-with-an-answer", "rows.jsonl", second(prompt=CONVERSATION), ("line 2", "role_order"), stage="rows"),
    Broken("answer-of-the-user", "rows.jsonl", second(chosen=[said("user", "x")]), ("line 2", "diverging"), stage="rows"),
    Broken("turn-is-a-text", "rows.jsonl", second(prompt=[said("user", "x"), "y"]), ("line 2", "`prompt`", "not_text"), stage="rows"),
    Broken("turn-without-content", "rows.jsonl", second(chosen=[{"role": "assistant"}]), ("line 2", "`chosen`"), stage="rows"),
    Broken("blank-answer", "rows.jsonl", second(chosen=" \n\t"), ("line 2", "`chosen`", "blank"), stage="rows"),
    Broken("all-identical", "rows.jsonl", lines([{**row, "rejected": row["chosen"]} for row in GOOD]), ("line 1", "identical"), stage="rows"),
    Broken("binary-column", "rows.parquet", parquet(rows=[{**row, "chosen": b"\xff\xfe"} for row in GOOD]), ("row 1", "`chosen`", "not_text"), stage="rows"),
    Broken("only-good-answers", "rows.jsonl", lines([{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in GOOD]), ("line 1", "unpaired"), stage="rows"),
    Broken("ambiguous-columns", "rows.jsonl", lines([{**row, "question": "a", "instruction": "b"} for row in [{k: r[k] for k in ("chosen", "rejected")} for r in GOOD]]), ("rows.jsonl", "question", "instruction", "data.columns.prompt"), stage="rows"),
    Broken("sft-data", "rows.jsonl", lines([{"prompt": r["prompt"], "completion": r["chosen"]} for r in GOOD]), ("rows.jsonl", "completion"), stage="rows"),
]  # fmt: skip
BROKEN: list[Broken] = [*FILES, *JSON_LINES, *JSON, *TABLES, *PLACES, *ROWS]
