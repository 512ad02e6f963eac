"""Sources, checks, the split and its fingerprint."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import preference_rows, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preference_tuning.config import DataConfig
from preference_tuning.data import prepare, sources
from preference_tuning.data.table import Dataset
from preference_tuning.errors import DataError

ROWS = preference_rows(40)
PLAIN = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ROWS]


def prepared(path: Path, folder: Path, **settings_: Any) -> Dataset:
    config = DataConfig(source=str(path), **{"held_out": 0.25, **settings_})
    return prepare.prepare(config, sources.fingerprint_of(config), folder)


def write_as(kind: str, folder: Path) -> Path:
    import datasets

    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        return write_jsonl(path, PLAIN)
    if kind == "json":
        path.write_text(json.dumps(PLAIN, indent=1), encoding="utf-8-sig")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["rejected", "prompt", "chosen"])
            writer.writeheader()
            writer.writerows(PLAIN)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(PLAIN), path)
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(PLAIN)}).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved"])
def test_every_kind_of_source_gives_the_same_dataset(kind: str, tmp_path: Path) -> None:
    dataset = prepared(write_as(kind, tmp_path), tmp_path / "out")
    expected = prepared(write_jsonl(tmp_path / "expected.jsonl", PLAIN), tmp_path / "expected")
    assert dataset.manifest.fingerprint == expected.manifest.fingerprint
    assert (dataset.manifest.rows_in, dataset.manifest.dropped) == (40, {})


def test_text_and_messages_become_one_form(tmp_path: Path) -> None:
    question = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    answer = [{"role": "assistant", "content": "yes"}]
    rows = [
        {"prompt": question, "chosen": answer, "rejected": "no"},
        {"prompt": question, "chosen": [*question, *answer], "rejected": [*question, {"role": "assistant", "content": "N"}]},
        *PLAIN,
    ]  # fmt: skip
    dataset = prepared(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    found = {row["row"]: row for split in ("train", "held_out") for row in dataset.rows(split)}
    assert found[1]["prompt"] == question
    assert found[1]["rejected"] == [{"role": "assistant", "content": "no"}]
    assert found[2]["chosen"] == answer, "the prompt repeated in an answer is taken off"


def test_words_that_look_missing_are_text(tmp_path: Path) -> None:
    """Readers that guess types turn "NA" and "null" of a CSV into nothing."""
    path = tmp_path / "rows.csv"
    rows = [{"prompt": f"p{i}", "chosen": word, "rejected": "no"} for i, word in enumerate(["NA", "null", "None"] * 4)]
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        writer.writerows(rows)
    dataset = prepared(path, tmp_path / "out", held_out=0.5)
    chosen = {row["chosen"][0]["content"] for split in ("train", "held_out") for row in dataset.rows(split)}
    assert chosen == {"NA", "null", "None"}


def test_rows_that_teach_nothing_are_left_out_and_kept_apart(tmp_path: Path) -> None:
    same = {"prompt": "p", "chosen": "same", "rejected": "same"}
    path = write_jsonl(tmp_path / "rows.jsonl", [*PLAIN, same, PLAIN[0], PLAIN[0]])
    dataset = prepared(path, tmp_path / "out", max_dropped=0.2)
    assert dataset.manifest.dropped == {"chosen equals rejected": 1, "exact duplicate": 2}
    assert dataset.manifest.train + dataset.manifest.held_out == 40
    left_out = [json.loads(line) for line in (dataset.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["row"], row["reason"]) for row in left_out] == [
        (41, "chosen equals rejected"),
        (42, "exact duplicate"),
        (43, "exact duplicate"),
    ]
    with pytest.raises(DataError, match=r"3 of 43 rows teach nothing .* more than data\.max_dropped = 0\.05"):
        prepared(path, tmp_path / "strict")
    assert not (tmp_path / "strict").exists(), "nothing half-written"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no such file"),
        ("empty.jsonl", "", "is empty"),
        ("blank.jsonl", "\n \n", "there are no rows"),
        ("rows.txt", "x", "unknown kind of file; known: .csv, .json, .jsonl"),
        ("cut.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "ch', "line 2: not JSON"),
        ("list.jsonl", "[1]\n", "line 1: a row must be an object with named fields, not list"),
        ("deep.jsonl", "[" * 100_000 + "\n", "line 1: not JSON"),
        ("object.json", '{"a": 1}', "the top level must be a list of rows"),
        ("broken.json", "[\n{]\n", "line 2: not JSON"),
        ("column.jsonl", '{"question": "a", "chosen": "b"}\n', "no column 'prompt' (data.columns.prompt), 'rejected'"),
        ("null.jsonl", '{"prompt": null, "chosen": "b", "rejected": "c"}\n', "row 1: prompt: is missing or null"),
        ("blank2.jsonl", '{"prompt": "a", "chosen": " ", "rejected": "c"}\n', "row 1: chosen: is blank"),
        ("number.jsonl", '{"prompt": "a", "chosen": 3, "rejected": "c"}\n', "row 1: chosen: must be text or a list"),
        ("role.jsonl", '{"prompt": [{"role": "banana", "content": "x"}], "chosen": "b", "rejected": "c"}\n', "unknown role 'banana'"),
        ("turn.jsonl", '{"prompt": [{"role": "assistant", "content": "x"}], "chosen": "b", "rejected": "c"}\n', "must end with a user turn"),
        ("answer.jsonl", '{"prompt": "a", "chosen": [{"role": "user", "content": "x"}], "rejected": "c"}\n', "must be an assistant's answer"),
        ("content.jsonl", '{"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": "c"}\n', "needs a role and a text content"),
        ("surrogate.jsonl", '{"prompt": "a", "chosen": "\\ud800", "rejected": "c"}\n', "half of a surrogate pair"),
        ("latin.jsonl", b'{"prompt": "\xe9"}\n', "not UTF-8 text"),
        ("utf16.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "not UTF-8 text"),
        ("header.csv", "prompt,chosen,rejected\n", "there are no rows"),
        ("wide.csv", "prompt,chosen,rejected\na,b,c,d\n", "line 2: more fields than the header"),
        ("short.csv", "prompt,chosen,rejected\na,b\n", "row 2: rejected: is missing or null"),
        ("no.parquet", "PAR?", "not a readable Parquet file"),
        ("one.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "neither side may be empty"),
    ],
)  # fmt: skip
def test_broken_sources_get_one_message(tmp_path: Path, name: str, content: str | bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        prepared(path, tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_all_bad_rows_are_named_at_once(tmp_path: Path) -> None:
    rows = [*PLAIN[:3], {**PLAIN[3], "chosen": ""}, *PLAIN[4:8], {**PLAIN[8], "rejected": None}]
    with pytest.raises(DataError) as caught:
        prepared(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    assert str(caught.value).splitlines()[0].endswith("2 of 9 rows cannot be used")
    assert "row 4: chosen: is blank" in str(caught.value)
    assert "row 9: rejected: is missing or null" in str(caught.value)


def test_a_directory_that_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").touch()
    with pytest.raises(DataError, match="not a directory saved by datasets"):
        prepared(tmp_path / "folder", tmp_path / "out")


prompts = st.lists(st.sampled_from([f"question {i}" for i in range(30)]), min_size=30, max_size=60)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=prompts, order=st.randoms())
def test_the_split_never_shares_a_prompt_and_never_moves(
    tmp_path: Path, asked: list[str], order: random.Random
) -> None:
    rows = [{"prompt": p, "chosen": f"yes {i}", "rejected": "no"} for i, p in enumerate(asked)]
    rows += [{"prompt": f"  QUESTION  {i}", "chosen": f"and {i}", "rejected": "no"} for i in range(30)]

    def sides(chosen: list[dict[str, str]]) -> tuple[dict[str, set[str]], str]:
        dataset = prepared(write_jsonl(tmp_path / "rows.jsonl", chosen), tmp_path / "out", held_out=0.5)
        found = {
            split: {" ".join(row["prompt"][0]["content"].casefold().split()) for row in dataset.rows(split)}
            for split in ("train", "held_out")
        }
        return found, dataset.manifest.fingerprint

    first, fingerprint = sides(rows)
    assert not first["train"] & first["held_out"]
    shuffled = order.sample(rows, len(rows))
    assert sides(shuffled) == (first, fingerprint), "the order of rows decides nothing"
    grown, _ = sides([*rows, *({"prompt": f"new {i}", "chosen": "a", "rejected": "b"} for i in range(9))])
    assert first["held_out"] <= grown["held_out"]
    assert first["train"] <= grown["train"]


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    first = prepared(write_jsonl(tmp_path / "a.jsonl", PLAIN), tmp_path / "a").manifest
    other = [{**PLAIN[0], "chosen": PLAIN[0]["chosen"] + "!"}, *PLAIN[1:]]
    second = prepared(write_jsonl(tmp_path / "b.jsonl", other), tmp_path / "b").manifest
    assert first.fingerprint != second.fingerprint
    again = prepared(write_jsonl(tmp_path / "c.jsonl", PLAIN), tmp_path / "c")
    assert (again.folder / "train.arrow").read_bytes() == (tmp_path / "a" / "train.arrow").read_bytes()


def test_the_report_escapes_what_rows_say(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    rows = [{**row, "prompt": f"{attack} {i}", "topic": attack} for i, row in enumerate(ROWS)]
    dataset = prepared(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    html = (dataset.folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<img" not in html
    assert "&lt;script&gt;" in html


SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real sets are not here")
@pytest.mark.parametrize(("name", "rows", "prompts"), [("polite.jsonl", 1094, 1069), ("llmbar.jsonl", 419, 418)])
def test_real_sets(tmp_path: Path, name: str, rows: int, prompts: int) -> None:
    manifest = prepared(SHARED / name, tmp_path / "out", held_out=0.1).manifest
    assert manifest.rows_in == rows
    assert abs(manifest.prompts - prompts) <= 3
    assert manifest.held_out == pytest.approx(rows * 0.1, rel=0.3)
