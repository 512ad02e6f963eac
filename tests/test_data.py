"""Preparing data: checks, comparisons across rows, the split, the fingerprint, the report."""

import csv
import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from broken import BROKEN, Broken
from conftest import preference_rows, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preference_tuning.config import DataConfig, Problems, RunConfig
from preference_tuning.data import across, findings, job, prepare, report
from preference_tuning.data.ledger import meaning
from preference_tuning.data.lengths import TokenRules
from preference_tuning.data.table import Dataset
from preference_tuning.errors import DataError
from preference_tuning.models import chat

ROWS = preference_rows(40)
PLAIN = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ROWS]
ANY = {"max_dropped": 1.0}


def prepared(path: Path, folder: Path, tokens: TokenRules | None = None, **settings_: Any) -> Dataset:
    config = DataConfig(source=str(path), **{"held_out": 0.25, **settings_})
    return prepare.prepare(config, job.fingerprints_of(config), folder, tokens)


def prepared_rows(rows: list[dict[str, Any]], folder: Path, tokens: TokenRules | None = None, **how: Any) -> Dataset:
    folder.mkdir(parents=True, exist_ok=True)
    return prepared(write_jsonl(folder / "rows.jsonl", rows), folder / "out", tokens, **how)


def all_rows(dataset: Dataset) -> dict[int, dict[str, Any]]:
    return {row["row"]: {**row, "side": side} for side in ("train", "held_out") for row in dataset.rows(side)}


def problems(dataset: Dataset) -> dict[str, int]:
    return {count.problem: count.rows for count in dataset.manifest.problems}


def quarantine(dataset: Dataset) -> list[tuple[str, str]]:
    lines = (dataset.folder / "quarantine.jsonl").read_text().splitlines()
    return [(line["place"], line["problem"]) for line in map(json.loads, lines)]


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def rules(tokenizer: Any, max_length: int, **room: Any) -> TokenRules:
    return TokenRules(tokenizer, chat.Room(max_length, **room), sft_length=2 * max_length)


# --- sources and the fingerprint ------------------------------------------------------------------------------------


def write_as(kind: str, folder: Path) -> Path:
    import datasets

    rows = random.Random(kind).sample(PLAIN, len(PLAIN))
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        return write_jsonl(path, rows)
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif kind == "json":
        path.write_text(json.dumps({"data": {"pairs": rows}}, indent=1), encoding="utf-8-sig")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["rejected", "prompt", "chosen"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "saved"])
def test_the_fingerprint_knows_neither_format_nor_name_nor_order(kind: str, tmp_path: Path) -> None:
    dataset = prepared(write_as(kind, tmp_path), tmp_path / "out")
    expected = prepared(write_jsonl(tmp_path / "expected.jsonl", PLAIN), tmp_path / "expected")
    assert dataset.manifest.fingerprint == expected.manifest.fingerprint
    assert dataset.manifest.split_fingerprint == expected.manifest.split_fingerprint
    assert (dataset.manifest.rows_in, dataset.manifest.problems) == (40, [])


def test_the_fingerprint_follows_the_content_and_the_other_one_the_split_too(tmp_path: Path) -> None:
    first = prepared_rows(PLAIN, tmp_path / "a")
    again = prepared_rows(PLAIN, tmp_path / "b")
    assert (again.folder / "train.arrow").read_bytes() == (first.folder / "train.arrow").read_bytes()
    changed = prepared_rows([{**PLAIN[0], "chosen": PLAIN[0]["chosen"] + "!"}, *PLAIN[1:]], tmp_path / "c")
    assert changed.manifest.fingerprint != first.manifest.fingerprint
    other_split = prepared_rows(PLAIN, tmp_path / "d", seed=7)
    assert other_split.manifest.fingerprint == first.manifest.fingerprint
    assert other_split.manifest.split_fingerprint != first.manifest.split_fingerprint


def test_several_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", preference_rows(200, seed=1))
    two = write_jsonl(
        tmp_path / "two.jsonl", [{**row, "prompt": f"Two: {row['prompt']}"} for row in preference_rows(200)]
    )

    def mixed(weight: float) -> Dataset:
        config = DataConfig(sources=({"source": str(one)}, {"source": str(two), "weight": weight}), held_out=0.2)  # type: ignore[arg-type]
        return prepare.prepare(config, job.fingerprints_of(config), tmp_path / "out")

    (tmp_path / "again").mkdir()
    one_more = write_jsonl(tmp_path / "again" / "one.jsonl", [{**PLAIN[0], "chosen": None}, *PLAIN[1:]])
    config = DataConfig(sources=({"source": str(one)}, {"source": str(one_more)}), held_out=0.2)  # type: ignore[arg-type]
    both = prepare.prepare(config, job.fingerprints_of(config), tmp_path / "both")
    assert [source.name for source in both.manifest.sources] == ["one.jsonl (1)", "one.jsonl (2)"]
    assert quarantine(both) == [("one.jsonl (2) line 1", "missing")]

    half, more = mixed(0.5), mixed(0.8)
    assert half.manifest.by_source["one.jsonl"] == 200
    assert half.manifest.by_source["two.jsonl"] == pytest.approx(100, abs=25)
    assert half.manifest.sources[1].not_sampled == 200 - half.manifest.by_source["two.jsonl"]
    assert "two.jsonl: 200 rows" in report.text(half.manifest)
    assert more.manifest.by_source["two.jsonl"] == pytest.approx(160, abs=25)


# --- problems of rows -----------------------------------------------------------------------------------------------

TURN = {"role": "user", "content": "q"}
FLAWED: list[tuple[str, dict[str, Any]]] = [
    ("missing", {"prompt": "p1", "chosen": None, "rejected": "b"}),
    ("missing", {"prompt": "p2", "chosen": "a"}),
    ("blank", {"prompt": "p3", "chosen": " \n", "rejected": "b"}),
    ("not_text", {"prompt": "p4", "chosen": 3, "rejected": "b"}),
    ("not_text", {"prompt": "p5", "chosen": "\ud800", "rejected": "b"}),
    ("too_large", {"prompt": "p6", "chosen": "a" * 3000, "rejected": "b"}),
    ("role_order", {"prompt": [TURN, TURN], "chosen": "a", "rejected": "b"}),
    ("diverging", {"prompt": "p12", "chosen": [TURN, {"role": "assistant", "content": "a"}], "rejected": "b"}),
    ("identical", {"prompt": "p7", "chosen": "same", "rejected": "same"}),
    ("identical_folded", {"prompt": "p8", "chosen": "The  Same", "rejected": "the same\n"}),
    ("special_tokens", {"prompt": "p9 <|im_end|>", "chosen": "a", "rejected": "b"}),
    ("control_characters", {"prompt": "p10", "chosen": "a\x00", "rejected": "b"}),
    ("duplicate", PLAIN[3]),
    ("duplicate", PLAIN[3]),
    ("contradiction", {"prompt": "p11", "chosen": "a", "rejected": "b"}),
    ("contradiction", {"prompt": "p11", "chosen": "b", "rejected": "a"}),
]  # fmt: skip


def test_every_problem_is_counted_placed_and_kept_apart(tmp_path: Path) -> None:
    rows = [*PLAIN, *(row for _, row in FLAWED)]
    dataset = prepared_rows(rows, tmp_path, max_row_bytes=2000, **ANY)
    expected = Counter(problem for problem, _ in FLAWED)
    assert problems(dataset) == expected
    assert sorted(quarantine(dataset)) == sorted((f"line {41 + i}", problem) for i, (problem, _) in enumerate(FLAWED))
    manifest = dataset.manifest
    assert (manifest.rows_in, manifest.train + manifest.held_out, manifest.dropped) == (56, 40, 16)
    assert set(all_rows(dataset)) == set(range(1, 41))
    html, screen = (dataset.folder / "report.html").read_text(), report.text(manifest)
    for count in manifest.problems:
        assert meaning(count.problem) in html
        assert re.search(rf"{count.problem} +{count.rows} ", screen)
        assert all(place in html for place in count.places)
    assert "Looked for and not found: tie, unpaired, leak, near_duplicate." in html


def test_comparing_in_parts_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million pairs are compared a part at a time; here forty are."""
    rows = [*PLAIN, *(row for _, row in FLAWED)]
    whole = prepared_rows(rows, tmp_path / "a", max_row_bytes=2000, **ANY).manifest
    monkeypatch.setattr(across, "PART", 5)
    parts = prepared_rows(rows, tmp_path / "b", max_row_bytes=2000, **ANY).manifest
    assert parts == whole


def test_a_problem_can_be_kept_or_made_an_error(tmp_path: Path) -> None:
    rows = [*PLAIN, PLAIN[0], {"prompt": "p", "chosen": "a\x07", "rejected": "b"}]
    kept = prepared_rows(rows, tmp_path / "a", problems={"duplicate": "keep", "control_characters": "keep"})
    assert problems(kept) == {"duplicate": 1, "control_characters": 1}, "kept, and told"
    assert (kept.manifest.train + kept.manifest.held_out, quarantine(kept)) == (42, [])
    with pytest.raises(DataError) as caught:
        prepared_rows(rows, tmp_path / "b", problems={"control_characters": "error"}, **ANY)
    assert "rows.jsonl: 1 of 42 rows have a problem that data.problems makes an error" in str(caught.value)
    assert "(line 42: `chosen` holds U+0007)" in str(caught.value)


def test_too_many_lost_rows_stop_the_run_and_are_all_in_the_quarantine(tmp_path: Path) -> None:
    same = {"prompt": "p", "chosen": "same", "rejected": "same"}
    path = write_jsonl(tmp_path / "rows.jsonl", [*PLAIN, same, PLAIN[0], PLAIN[0]])
    with pytest.raises(DataError) as caught:
        prepared(path, tmp_path / "job" / "dataset")
    message = str(caught.value)
    assert "rows.jsonl: 3 of 43 rows cannot be used, more than data.max_dropped = 0.05 allows" in message
    assert "(line 41: `chosen` and `rejected` are the same)" in message
    assert "(line 42, line 43: an earlier row is the same)" in message
    assert not (tmp_path / "job" / "dataset").exists(), "nothing half-written"
    left = [json.loads(line) for line in (tmp_path / "job" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["place"] for line in left] == ["line 41", "line 42", "line 43"]


def test_half_a_surrogate_pair_beside_the_text_is_no_topic(tmp_path: Path) -> None:
    rows = [{**row, "topic": "\ud800", "source": "half \udfff"} for row in PLAIN]
    dataset = prepared_rows(rows, tmp_path)
    assert (dataset.manifest.topics, dataset.manifest.by_source) == ({}, {"rows.jsonl": 40})


def test_ties_are_no_loss(tmp_path: Path) -> None:
    ties = [
        {"prompt": f"t{i}", "chosen": "a", "rejected": "b", "chosen_score": 1, "rejected_score": 1} for i in range(9)
    ]
    scored = [{**row, "chosen_score": 2, "rejected_score": 1} for row in PLAIN]
    dataset = prepared_rows([*scored, *ties], tmp_path)
    assert problems(dataset) == {"tie": 9}
    assert {row["margin"] for row in all_rows(dataset).values()} == {1.0}


def test_labelled_single_answers_are_paired_where_a_prompt_has_both(tmp_path: Path) -> None:
    halves = [
        {"prompt": f"p{i}", "completion": f"{kind} {i}", "label": kind == "good"}
        for i in range(40)
        for kind in ("good", "bad")
    ]
    lonely = [{"prompt": "lonely", "completion": "only good", "label": True}]
    dataset = prepared_rows([*halves, *lonely], tmp_path / "it's a")
    assert problems(dataset) == {"unpaired": 1}
    pairs = {
        row["prompt"][0]["content"]: (row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in all_rows(dataset).values()
    }
    assert pairs == {f"p{i}": (f"good {i}", f"bad {i}") for i in range(40)}
    with pytest.raises(DataError, match="DPO learns from pairs"):
        prepared_rows([row for row in halves if row["label"]], tmp_path / "b")


def test_contradictions_are_not_ranked_by_their_order(tmp_path: Path) -> None:
    """Two against one is still a dispute: all three rows go, in whatever order they come."""
    one, other = {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "b", "rejected": "a"}
    for order in ([one, one, other], [other, one, one]):
        dataset = prepared_rows([*PLAIN, *order], tmp_path, **ANY)
        assert problems(dataset) == {"contradiction": 3}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.id)
def test_broken_sources_get_one_message(broken: Broken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The corpus of broken files: one message each, with the file, the place and the reason; and exit code 3."""
    for name, value in broken.variables(tmp_path).items():
        monkeypatch.setenv(name, value)
    config = DataConfig(source=broken.write(tmp_path), **broken.settings)
    with pytest.raises(DataError) as caught:
        prepare.prepare(config, job.fingerprints_of(config), tmp_path / "out" / "dataset")
    for fragment in broken.message:
        assert fragment in str(caught.value)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out" / "dataset").exists()


names = st.sampled_from(
    ["prompt", "chosen", "rejected", "messages", "label", "completion", "instruction", "output", "topic", "source", "x"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(), max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "y"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(st.dictionaries(names, values, max_size=5), min_size=1, max_size=4))
def test_arbitrary_rows_end_in_one_error_or_in_pairs(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        dataset = prepared_rows([*PLAIN[:6], *rows], tmp_path, held_out=0.5, near_duplicates=False, **ANY)
    except DataError:
        return
    for row in all_rows(dataset).values():
        assert row["prompt"][-1]["role"] in ("user", "tool")
        assert {message["role"] for side in ("chosen", "rejected") for message in row[side]} == {"assistant"}
        assert row["chosen"] != row["rejected"]


# --- tokens against the limits --------------------------------------------------------------------------------------


def test_limits_are_counted_in_tokens(tmp_path: Path, tokenizer: Any) -> None:
    long = "word " * 200
    rows = [
        *PLAIN,
        {"prompt": "Cut the answer.", "chosen": long, "rejected": "no"},
        {"prompt": "Alike until the cut.", "chosen": long + "yes", "rejected": long + "no"},
        {"prompt": long, "chosen": "yes", "rejected": "no"},
    ]
    dataset = prepared_rows(rows, tmp_path / "a", rules(tokenizer, 100), **ANY)
    assert problems(dataset) == {"answer_cut": 2, "identical_after_cut": 1, "long_prompt": 1}
    assert sorted(quarantine(dataset)) == [("line 42", "identical_after_cut"), ("line 43", "long_prompt")]
    manifest = dataset.manifest
    assert (manifest.unit, manifest.answers_cut, manifest.sampled) == ("tokens", 2, 41)
    assert manifest.lengths["chosen"].longest > 200
    kept = prepared_rows(
        rows, tmp_path / "b", rules(tokenizer, 100, keep_end=True), problems={"long_prompt": "keep_end"}, **ANY
    )
    assert kept.manifest.prompts_cut == 1
    assert 43 in all_rows(kept)


words = st.text(alphabet=st.sampled_from("ab é漢\n<|"), max_size=60).map(lambda text: f"x{text}")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(prompt=words, chosen=words, rejected=words, length=st.integers(16, 80), bound=st.none() | st.integers(1, 80))
def test_rows_that_are_not_tokenised_could_not_reach_a_limit(
    tokenizer: Any, prompt: str, chosen: str, rejected: str, length: int, bound: int | None
) -> None:
    """The bound by bytes never lets a row pass that tokenising would stop."""
    from preference_tuning.data.pair import Pair

    pair = Pair(
        *(
            [{"role": role, "content": text}]
            for role, text in zip(("user", "assistant", "assistant"), (prompt, chosen, rejected))
        )
    )
    checked = rules(tokenizer, length, max_prompt_length=bound)
    (found,) = checked.examine([pair])
    (encoded,) = chat.encode(tokenizer, [chat.Conversation(pair.prompt, [pair.chosen, pair.rejected])], checked.room)
    stopped = isinstance(encoded, chat.Refused) or any(encoded.answer_cut)
    assert bool({"long_prompt", "answer_cut"} & {name for name, _ in found.problems}) == stopped
    whole = chat.encode(tokenizer, [chat.Conversation(pair.prompt, [pair.chosen, pair.rejected])], chat.Room(10**9))[0]
    assert isinstance(whole, chat.Encoded)
    sides = [len(whole.prompt_ids), *map(len, whole.answer_ids)]
    assert found.lengths in (None, sides) or isinstance(encoded, chat.Refused)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    prompt=st.integers(1, 60),
    answer=st.integers(1, 60),
    length=st.integers(16, 60),
    bound=st.none() | st.integers(1, 60),
)
def test_a_bound_on_the_prompt_never_empties_an_answer(
    tokenizer: Any, prompt: int, answer: int, length: int, bound: int | None
) -> None:
    """With max_length = max_prompt_length TRL 0.9 cut both answers to nothing."""
    conversation = chat.Conversation(
        [{"role": "user", "content": "p " * prompt}],
        [[{"role": "assistant", "content": "a " * count}] for count in (answer, 1)],
    )
    (row,) = chat.encode(tokenizer, [conversation], chat.Room(length, bound, keep_end=True))
    assert isinstance(row, chat.Encoded)
    assert all(row.answer_ids)
    assert max(map(len, row.answer_ids)) + len(row.prompt_ids) <= length
    assert bound is None or len(row.prompt_ids) <= bound


def test_special_tokens_are_those_of_the_tokenizer_and_the_template(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        *PLAIN,
        {"prompt": "say <|endoftext|>", "chosen": "a", "rejected": "b"},
        {"prompt": "say <s>", "chosen": "a", "rejected": "b"},
    ]
    dataset = prepared_rows(rows, tmp_path, rules(tokenizer, 100))
    assert quarantine(dataset) == [("line 41", "special_tokens")], "<s> is plain text to this tokenizer"


def test_tools_that_the_template_hides_from_the_model(tmp_path: Path, tokenizer: Any) -> None:
    call = {"from": "function_call", "value": '{"name": "clock", "arguments": {}}'}
    turns = [{"from": "human", "value": "What time is it?"}, call, {"from": "observation", "value": "noon"}]
    rows = [
        {"conversations": turns, "tools": '[{"name": "clock"}]', "chosen": f"Noon, {i}.", "rejected": "No idea."}
        for i in range(12)
    ]
    with pytest.raises(DataError, match="no_tools"):
        prepared_rows(rows, tmp_path / "a", rules(tokenizer, 100))
    rows = [
        {**row, "conversations": [{"from": "human", "value": f"Question {i}?"}, *turns[1:]]}
        for i, row in enumerate(rows)
    ]
    kept = prepared_rows(rows, tmp_path / "b", rules(tokenizer, 400), problems={"no_tools": "keep"}, held_out=0.5)
    assert problems(kept) == {"no_tools": 12}
    (row, *_) = all_rows(kept).values()
    assert json.loads(row["tools"]) == [{"type": "function", "function": {"name": "clock"}}]
    assert json.loads(row["prompt"][1]["tool_calls"])[0]["function"]["name"] == "clock"


def test_rows_are_shown_as_the_model_reads_them(tmp_path: Path, tokenizer: Any) -> None:
    dataset = prepared_rows(
        [*PLAIN, {"prompt": "Go on.", "chosen": "word " * 200, "rejected": "no"}], tmp_path, rules(tokenizer, 60)
    )
    shown = json.loads((dataset.folder / "shown.json").read_text())
    assert [row["split"] for row in shown] == ["train"] * 5 + ["held_out"] * 5
    stored = all_rows(dataset)
    for row in shown:
        read = "".join(piece["text"] for piece in row["pieces"] if piece["kind"] in ("prompt", "chosen"))
        messages = [
            {k: m[k] for k in ("role", "content")} for side in ("prompt", "chosen") for m in stored[row["row"]][side]
        ]
        assert read == tokenizer.apply_chat_template(messages, tokenize=False)
        ends = [piece["text"] for piece in row["pieces"] if piece["kind"] == "chosen" and piece["special"]]
        assert ends == ["<|im_end|>"], "the end of the answer is trained"
    assert "<mark class='chosen special'>&lt;|im_end|&gt;</mark>" in (dataset.folder / "report.html").read_text()


# --- the split ------------------------------------------------------------------------------------------------------

prompts = st.lists(st.sampled_from([f"question {i}" for i in range(30)]), min_size=30, max_size=60)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=prompts, order=st.randoms())
def test_the_split_never_shares_a_prompt_and_never_moves(
    tmp_path: Path, asked: list[str], order: random.Random
) -> None:
    rows = [{"prompt": p, "chosen": f"yes {i}", "rejected": "no"} for i, p in enumerate(asked)]
    rows += [{"prompt": f"  QUESTION  {i}", "chosen": f"and {i}", "rejected": "no"} for i in range(30)]

    def sides(chosen: list[dict[str, str]]) -> tuple[dict[str, set[str]], str]:
        dataset = prepared_rows(chosen, tmp_path, held_out=0.5)
        found = {
            split: {" ".join(row["prompt"][0]["content"].casefold().split()) for row in dataset.rows(split)}
            for split in ("train", "held_out")
        }
        return found, dataset.manifest.split_fingerprint

    first, fingerprint = sides(rows)
    assert not first["train"] & first["held_out"]
    shuffled = order.sample(rows, len(rows))
    assert sides(shuffled) == (first, fingerprint), "the order of rows decides nothing"
    grown, _ = sides([*rows, *({"prompt": f"new {i}", "chosen": "a", "rejected": "b"} for i in range(9))])
    assert first["held_out"] <= grown["held_out"]
    assert first["train"] <= grown["train"]


def test_the_split_manifest_lists_every_pair(tmp_path: Path) -> None:
    dataset = prepared_rows(PLAIN, tmp_path)
    listed = pq.read_table(dataset.folder / "split.parquet").to_pylist()
    assert {row["row"]: row["side"] for row in listed} == {
        number: row["side"] for number, row in all_rows(dataset).items()
    }
    assert len({row["content"] for row in listed}) == 40
    assert all(len(row["content"]) == 64 for row in listed)


def test_near_duplicates_are_kept_on_one_side(tmp_path: Path) -> None:
    """A twin of every prompt, with other punctuation and one word of forty changed: none may be trained on."""
    rng = random.Random(0)

    def word() -> str:
        return "".join(rng.choices("abcdefghij", k=5))

    originals = [" ".join(word() for _ in range(120)) for _ in range(60)]
    twins = [f"{prompt.title()}, {word()}!" for prompt in originals]
    rows = [{"prompt": p, "chosen": f"yes {i}", "rejected": "no"} for i, p in enumerate([*originals, *twins])]
    dataset = prepared_rows(rows, tmp_path / "it's a", **ANY)
    found = all_rows(dataset)
    held_out = {number % 60 for number, row in found.items() if row["side"] == "held_out"}
    assert not held_out & {number % 60 for number, row in found.items() if row["side"] == "train"}
    assert dataset.manifest.near_duplicate_prompts == 120
    assert problems(dataset)["near_duplicate"] == 120 - len(found)
    shuffled = prepared_rows(rng.sample(rows, len(rows)), tmp_path / "c", **ANY)
    assert shuffled.manifest.split_fingerprint == dataset.manifest.split_fingerprint
    blind = prepared_rows(rows, tmp_path / "b", near_duplicates=False)
    sides = {number: row["side"] for number, row in all_rows(blind).items()}
    assert {number: sides[number] for number in found} == {number: row["side"] for number, row in found.items()}
    crossing = [n for n in range(1, 61) if sides[n] != sides[n + 60]]
    assert len(crossing) == 120 - len(found), "and without the search they would have been"


def test_a_sources_own_test_split_is_used_and_its_overlap_leaves_training(tmp_path: Path) -> None:
    import datasets

    test = [
        PLAIN[0],
        {**PLAIN[1], "chosen": "another answer"},
        *({"prompt": f"t{i}", "chosen": "a", "rejected": "b"} for i in range(6)),
    ]
    parts = {"train": datasets.Dataset.from_list(PLAIN), "test": datasets.Dataset.from_list(test)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    dataset = prepared(tmp_path / "saved", tmp_path / "out", **ANY)
    assert problems(dataset) == {"leak": 2}
    assert (dataset.manifest.train, dataset.manifest.held_out) == (38, 8)
    assert dataset.manifest.held_out_share is None
    assert dataset.manifest.sources[0].test_split == "test"
    assert "held out: its split test" in report.text(dataset.manifest)


def test_a_group_column_keeps_its_rows_together_and_prompts_still_do_not_leak(tmp_path: Path) -> None:
    rows = [{**PLAIN[i % 40], "chosen": f"answer {i}", "thread": f"t{i % 20}"} for i in range(40)]
    rows += [{**PLAIN[0], "chosen": f"answer elsewhere {i}", "thread": f"u{i}"} for i in range(20)]
    dataset = prepared_rows(rows, tmp_path, columns={"group": "thread"}, held_out=0.4, **ANY)
    sides: dict[str, set[str]] = {}
    asked: dict[str, set[str]] = {}
    for number, row in all_rows(dataset).items():
        sides.setdefault(rows[number - 1]["thread"], set()).add(row["side"])
        asked.setdefault(row["prompt"][0]["content"], set()).add(row["side"])
    assert all(len(found) == 1 for found in sides.values())
    assert all(len(found) == 1 for found in asked.values())
    assert problems(dataset)["leak"] > 0, "one prompt in many groups would have been on both sides"


# --- answers of their own for SFT -----------------------------------------------------------------------------------


def test_an_sft_source_is_checked_and_never_holds_a_held_out_prompt(tmp_path: Path) -> None:
    answers = [{"instruction": row["prompt"], "input": "", "output": f"Better: {row['chosen']}"} for row in PLAIN]
    answers += [answers[0], {"instruction": "What else?", "input": "", "output": "This."}]
    path = write_jsonl(tmp_path / "sft.jsonl", answers)
    dataset = prepared_rows(PLAIN, tmp_path, sft_source={"source": str(path)})
    held_out = {row["prompt"][0]["content"] for row in dataset.rows("held_out")}
    asked = [row["prompt"][0]["content"] for row in dataset.rows("sft")]
    assert not held_out & set(asked)
    assert "What else?" in asked
    assert len(asked) == len(set(asked)) == dataset.manifest.sft == 41 - len(held_out)
    counts = {count.problem: count.rows for count in dataset.manifest.sft_problems}
    in_held_out = PLAIN[0]["prompt"] in held_out
    assert counts == {"leak": len(held_out) + in_held_out} | ({} if in_held_out else {"duplicate": 1})
    assert dataset.sft_split == "sft"
    plain = prepared_rows(PLAIN, tmp_path / "plain")
    assert plain.sft_split == "train"
    assert plain.manifest.fingerprint == dataset.manifest.fingerprint
    assert plain.manifest.split_fingerprint != dataset.manifest.split_fingerprint


# --- findings and the report ----------------------------------------------------------------------------------------


def test_length_bias_is_measured_and_told(tmp_path: Path) -> None:
    longer = [{"prompt": f"p{i}", "chosen": "a" * 20, "rejected": "b" * (30 if i % 5 == 0 else 10)} for i in range(40)]
    manifest = prepared_rows(longer, tmp_path / "a").manifest
    assert manifest.length_bias.chosen_longer == 0.8
    assert manifest.length_bias.effect == pytest.approx(0.75), "mean 6, standard deviation 8"
    assert (manifest.length_bias.mean_chosen, manifest.length_bias.mean_rejected) == (20, 14)
    assert "length_bias" in [finding.name for finding in manifest.findings]
    fair = [{**row, "rejected": "b" * (30 if i % 2 else 10)} for i, row in enumerate(longer)]
    assert prepared_rows(fair, tmp_path / "b").manifest.findings == []


def test_the_figures_of_the_report_are_those_of_the_rows(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{'p' * 10}{i:02}", "chosen": "c" * (20 if i else 90), "rejected": "r" * 15, "topic": f"t{i % 4}"}
        for i in range(20)
    ]
    dataset = prepared_rows([*rows, {**rows[0], "rejected": "another"}], tmp_path)
    manifest, sides = dataset.manifest, Counter(row["side"] for row in all_rows(dataset).values())
    assert (manifest.rows_in, manifest.pairs, manifest.prompts) == (21, 21, 20)
    assert {"train": manifest.train, "held_out": manifest.held_out} == sides
    assert manifest.topics == {"t0": 6, "t1": 5, "t2": 5, "t3": 5}
    assert manifest.lengths["prompt"].model_dump() == {"median": 12, "p95": 12, "longest": 12}
    assert manifest.lengths["chosen"].model_dump() == {"median": 20, "p95": 90, "longest": 90}
    assert manifest.lengths["rejected"].model_dump() == {"median": 15, "p95": 15, "longest": 15}
    html, screen = (dataset.folder / "report.html").read_text(), report.text(manifest)
    figures = {"rows in": "21", "training pairs": str(sides["train"]), "different prompts": "20", "left out": "0"}
    for name, value in figures.items():
        assert f"<b>{value}</b><span>{name}</span>" in html
        assert re.search(rf"  {name} +{value}\n", screen)
    assert "<b>100%</b><span>chosen is longer</span>" in html
    assert re.search(r"chosen, characters +median 20, 95 % below 90, longest 90", screen)


def test_a_run_that_the_data_is_too_small_for(tmp_path: Path) -> None:
    manifest = prepared_rows(PLAIN, tmp_path).manifest
    config = RunConfig.model_validate(
        {
            "finetuning_type": "dpo",
            "base_model": {"source": "x"},
            "data": {"source": "x"},
            "sft": {"num_train_epochs": 20},
        }
    )
    found = {(finding.name, finding.message.split()[0]) for finding in findings.of_run(manifest, config)}
    assert ("few_steps", "DPO") in found
    assert ("warm_up", "DPO") in found
    assert ("many_epochs", "SFT") in found
    assert ("few_held_out", str(manifest.held_out)) in found


def test_the_report_escapes_what_rows_say(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    rows = [{**row, "prompt": f"{attack} {i}", "topic": f"{attack} {i % 2}"} for i, row in enumerate(ROWS)]
    dataset = prepared_rows(rows, tmp_path)
    html = (dataset.folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<img" not in html
    assert "&lt;script&gt;" in html


def test_every_problem_is_explained() -> None:
    for problem in Problems.model_fields:
        assert len(meaning(problem)) > 10


# --- real sets ------------------------------------------------------------------------------------------------------

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real sets are not here")
@pytest.mark.parametrize(
    ("name", "rows", "prompts", "longer"), [("polite.jsonl", 1094, 1069, 0.52), ("llmbar.jsonl", 419, 418, 0.27)]
)
def test_real_sets(tmp_path: Path, name: str, rows: int, prompts: int, longer: float) -> None:
    manifest = prepared(SHARED / name, tmp_path / "out", held_out=0.1, **ANY).manifest
    assert manifest.rows_in == rows
    assert abs(manifest.prompts - prompts) <= 30
    assert manifest.held_out == pytest.approx(rows * 0.1, rel=0.3)
    assert manifest.length_bias.chosen_longer == pytest.approx(longer, abs=0.02)
