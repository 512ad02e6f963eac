"""Every field of the data section arrives: changing it changes the dataset, or what is read of a source."""

import json
import random
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import preference_rows, write_jsonl
from fields import exists, paths
from test_data import FLAWED, PLAIN, all_rows, prepared, prepared_rows, problems, rules

from preference_tuning import fingerprint, hub
from preference_tuning.config import Columns, DataConfig, Problems, SFTSourceConfig, SourceConfig
from preference_tuning.data import sources
from preference_tuning.data.formats import recognise, recognise_sft
from preference_tuning.data.job import fingerprints_of
from preference_tuning.data.table import Dataset
from preference_tuning.errors import ConfigError, DataError

PROVED_BY = {
    "revision": "test_settings_data.py::test_the_revision_of_a_hub_dataset",
    "split": "test_sources.py::test_the_held_out_split_of_a_saved_dataset",
    "test_split": "test_sources.py::test_the_held_out_split_of_a_saved_dataset",
    "format": "test_formats.py::test_two_answers_with_other_names_need_a_format",
    "separator": "test_formats.py::test_two_texts_without_a_prompt_need_a_separator",
    "source": "test_settings_data.py::test_where_rows_come_from",
    "records": "test_settings_data.py::test_where_rows_come_from",
    "weight": "test_settings_data.py::test_where_rows_come_from",
    "name": "test_settings_data.py::test_where_rows_come_from",
    "sources": "test_data.py::test_several_sources_are_mixed_by_weight",
    "sft_source": "test_data.py::test_an_sft_source_is_checked_and_never_holds_a_held_out_prompt",
    "sft_source.source": "test_settings_data.py::test_where_rows_come_from",
    "sft_source.revision": "test_settings_data.py::test_the_revision_of_a_hub_dataset",
    "sft_source.split": "test_settings_data.py::test_the_split_and_the_format_of_an_sft_source",
    "sft_source.records": "test_settings_data.py::test_where_rows_come_from",
    "sft_source.weight": "test_settings_data.py::test_where_rows_come_from",
    "sft_source.name": "test_settings_data.py::test_where_rows_come_from",
    "sft_source.format": "test_settings_data.py::test_the_split_and_the_format_of_an_sft_source",
    "allow_urls": "test_settings_data.py::test_web_addresses_have_to_be_allowed",
    "pairing": "test_settings_data.py::test_of_ranked_answers_one_pair_or_all",
    "max_dropped": "test_settings_data.py::test_limits_of_rows_and_of_losses",
    "max_row_bytes": "test_settings_data.py::test_limits_of_rows_and_of_losses",
    "max_prompt_length": "test_settings_data.py::test_the_bound_on_the_prompt_in_tokens",
    "near_duplicates": "test_data.py::test_near_duplicates_are_kept_on_one_side",
    "near_duplicate_similarity": "test_settings_data.py::test_how_near_a_near_duplicate_is",
    "held_out": "test_settings_data.py::test_the_share_held_out",
    "seed": "test_data.py::test_the_fingerprint_follows_the_content_and_the_other_one_the_split_too",
}
"""A field of the data section, and the test that has been read and shows its effect."""

ROW = {"prompt": "P", "chosen": "C", "rejected": "R", "other": "X"}
TWO = {"prompt": "P", "x": "A", "y": "B", "other": "X", "best": 1, "worst": 0}
NAMED = {"first": "x", "second": "y", "label": "best"}
RANKED = {
    "prompt": "P",
    "completions": [{"text": "A", "score": 1, "other": 2}, {"text": "B", "score": 2, "other": 1}],
    "other": [{"text": "X", "score": 2, "other": 1}, {"text": "Y", "score": 1, "other": 2}],
}
SINGLE = {"prompt": "P", "completion": "C", "label": True, "other": "X"}


def content(turns: list[dict[str, Any]]) -> list[str]:
    return [turn["content"] for turn in turns]


# A column: a row, how its source is read, what to look at, and that without and with the column named `other`.
COLUMNS: dict[str, tuple[dict[str, Any], dict[str, Any], Any, Any, Any]] = {
    "prompt": (ROW, {}, lambda pair: content(pair.prompt), ["P"], ["X"]),
    "context": (ROW, {}, lambda pair: content(pair.prompt), ["P"], ["P\n\nX"]),
    "system": (ROW, {}, lambda pair: content(pair.prompt), ["P"], ["X", "P"]),
    "history": ({**ROW, "other": [["H", "A"]]}, {}, lambda pair: content(pair.prompt), ["P"], ["H", "A", "P"]),
    "tools": ({**ROW, "other": '[{"name": "t"}]'}, {}, lambda pair: pair.tools, None, [{"type": "function", "function": {"name": "t"}}]),
    "chosen": (ROW, {"columns": {"rejected": "rejected"}}, lambda pair: content(pair.chosen), ["C"], ["X"]),
    "rejected": (ROW, {"columns": {"chosen": "chosen"}}, lambda pair: content(pair.rejected), ["R"], ["X"]),
    "first": (TWO, {"columns": NAMED, "format": "safe_rlhf"}, lambda pair: content(pair.rejected), ["A"], ["X"]),
    "second": (TWO, {"columns": NAMED, "format": "safe_rlhf"}, lambda pair: content(pair.chosen), ["B"], ["X"]),
    "label": ({**TWO, "other": 0}, {"columns": NAMED, "format": "safe_rlhf"}, lambda pair: content(pair.chosen), ["B"], ["A"]),
    "completions": (RANKED, {}, lambda pair: content(pair.chosen), ["B"], ["X"]),
    "score": ({**RANKED, "other": 1}, {}, lambda pair: content(pair.chosen), ["B"], ["A"]),
    "completion": (SINGLE, {"format": "unpaired"}, lambda answer: content(answer.answer), ["C"], ["X"]),
    "margin": ({**ROW, "other": 3}, {}, lambda pair: pair.margin, None, 3),
    "chosen_score": ({**ROW, "other": 3}, {}, lambda pair: pair.chosen_score, None, 3),
    "rejected_score": ({**ROW, "other": 3}, {}, lambda pair: pair.rejected_score, None, 3),
    "group": (ROW, {}, lambda pair: pair.group, None, "X"),
    "source": (ROW, {}, lambda pair: pair.source, None, "X"),
    "topic": (ROW, {}, lambda pair: pair.topic, None, "X"),
    "split": ({**ROW, "other": "test"}, {}, lambda pair: pair.held_out, None, True),
}  # fmt: skip

LONG = "word " * 90
TOOLS = [
    {"from": "human", "value": "What time is it?"},
    {"from": "function_call", "value": '{"name": "clock", "arguments": {}}'},
    {"from": "observation", "value": "noon"},
]
WORDS = " ".join("".join(random.Random(i).choices("abcdefghij", k=5)) for i in range(100))
SIDES = [{**row, "split": "train" if i < 30 else "test"} for i, row in enumerate(PLAIN)]
HALVES = [{"prompt": f"p{i}", "completion": f"{good} {i}", "label": good} for i in range(9) for good in (True, False)]
PROBLEMS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], bool]] = {
    # Good rows, the rows with the problem, and whether tokens have to be counted for it.
    **{name: (PLAIN, [row for other, row in FLAWED if other == name], False) for name, _ in FLAWED},
    "tie": (PLAIN, [{"prompt": "t", "chosen": "a", "rejected": "b", "chosen_score": 1, "rejected_score": 1}], False),
    "unpaired": (HALVES, [{"prompt": "lonely", "completion": "good", "label": True}], False),
    "identical_after_cut": (PLAIN, [{"prompt": "p", "chosen": f"{LONG}yes", "rejected": f"{LONG}no"}], True),
    "long_prompt": (PLAIN, [{"prompt": LONG, "chosen": "yes", "rejected": "no"}], True),
    "answer_cut": (PLAIN, [{"prompt": "p", "chosen": LONG, "rejected": "no"}], True),
    "no_tools": (PLAIN, [{"conversations": TOOLS, "tools": '[{"name": "clock"}]', "chosen": "Noon.", "rejected": "No."}], True),
    "leak": (SIDES, [{**SIDES[-1], "chosen": "another answer", "split": "train"}], False),
    "near_duplicate": (
        [*SIDES, {"prompt": WORDS, "chosen": "a", "rejected": "b", "split": "test"}],
        [{"prompt": f"{WORDS} k", "chosen": "c", "rejected": "d", "split": "train"}],
        False,
    ),
}  # fmt: skip
TOOL_ROWS = [
    {"conversations": [{"from": "human", "value": row["prompt"]}], "chosen": row["chosen"], "rejected": row["rejected"]}
    for row in PLAIN
]
PROBLEMS["no_tools"] = (TOOL_ROWS, PROBLEMS["no_tools"][1], True)


def test_every_setting_has_a_proof() -> None:
    cases = [f"columns.{name}" for name in COLUMNS] + [f"problems.{name}" for name in PROBLEMS]
    fields = [path for path in paths(DataConfig) if not path.startswith("sources.")]
    assert sorted(fields) == sorted([*cases, *PROVED_BY])
    assert [pointer for pointer in PROVED_BY.values() if not exists(pointer)] == []


@pytest.mark.parametrize("field", [*SourceConfig.model_fields])
def test_a_source_among_several_has_what_a_single_one_has(field: str) -> None:
    """So each proof of `data.x` is one of `data.sources.x`."""
    values = {"weight": 0.5, "format": "pairs", "columns": dict.fromkeys(Columns.model_fields, "c")}
    given = {"source": "rows.jsonl", field: values.get(field, "other")}
    single, among = DataConfig(**given), DataConfig(sources=(given,))
    assert single.all_sources() == among.all_sources()
    assert single.all_sources() != DataConfig(source="rows.jsonl").all_sources()
    assert single.all_sources()[0].model_dump(exclude_unset=True, exclude_none=True)[field] == given[field]


@pytest.mark.parametrize("name", COLUMNS)
def test_a_named_column_is_the_one_that_is_read(name: str) -> None:
    row, settings, look, without, with_it = COLUMNS[name]
    known = settings.get("columns", {})
    rest = {key: value for key, value in settings.items() if key != "columns"}
    plain = {} if name in ("chosen", "rejected") else known
    for columns, expected in ((plain, without), ({**known, name: "other"}, with_it)):
        source = DataConfig(source="x.jsonl", columns=Columns(**columns), **rest).all_sources()[0]
        (found,) = recognise(source, "best_worst", "mine", [row]).convert(row)
        assert look(found) == expected


# --- problems -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize("name", PROBLEMS)
def test_each_policy_of_a_problem_does_what_it_says(name: str, tmp_path: Path, tokenizer: Any) -> None:
    good, bad, in_tokens = PROBLEMS[name]
    policies = get_args(Problems.model_fields[name].annotation)
    assert len(policies) >= 2
    for policy in policies:
        tokens = rules(tokenizer, 100, keep_end=policy == "keep_end") if in_tokens else None
        how: dict[str, Any] = {"problems": {name: policy}, "max_row_bytes": 2000, "max_dropped": 1.0}
        how["near_duplicates"] = name == "near_duplicate"
        folder = tmp_path / policy
        if policy == "error":
            with pytest.raises(DataError, match=rf"a problem that data.problems makes an error[\s\S]*\b{name}\b"):
                prepared_rows([*good, *bad], folder, tokens, **how)
            continue
        dataset = prepared_rows([*good, *bad], folder, tokens, **how)
        kept = set(all_rows(dataset)) & set(range(len(good) + 1, len(good) + len(bad) + 1))
        assert len(kept) == (0 if policy == "drop" else len(bad))
        assert problems(dataset)[name] == len(bad), "counted, whatever becomes of them"
        assert dataset.manifest.keep_end == (policy == "keep_end")


# --- where rows come from -------------------------------------------------------------------------------------------


def test_where_rows_come_from(tmp_path: Path) -> None:
    """Pairs and SFT answers from two lists of one file each: which list, which share of it, under which name."""
    answers = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(200)]
    files = {"pairs.json": preference_rows(200), "answers.json": answers}
    for name, rows in files.items():
        (tmp_path / name).write_text(json.dumps({"a": {"few": rows[:40], "all": rows}}))

    def dataset(records: str, **more: Any) -> Dataset:
        answers_from = {"source": str(tmp_path / "answers.json"), "records": records, **more}
        how = {"records": records, "sft_source": answers_from, "held_out": 0.25, **more}
        return prepared(tmp_path / "pairs.json", tmp_path / "out", **how)

    few, whole, half = dataset("a.few"), dataset("a.all"), dataset("a.all", weight=0.5, name="mine")
    assert (few.manifest.rows_in, whole.manifest.rows_in) == (40, 200)
    assert (few.manifest.sft, whole.manifest.sft) == (40, 200)
    assert half.manifest.pairs == pytest.approx(100, abs=25)
    assert half.manifest.sft == pytest.approx(100, abs=25)
    summaries = [(found.manifest.sources[0], found.manifest.sft_source) for found in (whole, half)]
    names = [[summary and summary.name for summary in pair] for pair in summaries]
    assert names == [["pairs.json", "answers.json"], ["mine", "mine"]]


def test_the_revision_of_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "resolve_commit", lambda source, revision, kind: f"{kind} {source} at {revision}")
    config = DataConfig.model_validate({"source": "org/a", "sft_source": {"source": "org/b"}})
    assert fingerprints_of(config) == ["dataset org/a at None", "dataset org/b at None"]
    pinned = {"source": "org/a", "revision": "v1", "sft_source": {"source": "org/b", "revision": "v2"}}
    assert fingerprints_of(DataConfig.model_validate(pinned)) == ["dataset org/a at v1", "dataset org/b at v2"]


def test_the_split_and_the_format_of_an_sft_source(tmp_path: Path) -> None:
    import datasets

    made = {name: datasets.Dataset.from_list([{"of": name}]) for name in ("train", "later")}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    for split in made:
        reading = sources.open_source(SFTSourceConfig(source=str(tmp_path / "saved"), split=split), None, 1000)
        assert [row.values for row in reading.rows()] == [{"of": split}]
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "from messages"}]
    row = {"prompt": "Q", "completion": "from completion", "messages": turns}
    with pytest.raises(DataError, match=r"set data\.sft_source\.format"):
        recognise_sft(SFTSourceConfig(source="x"), "mine", [row])
    for form in ("messages", "completion"):
        _, answer, _ = recognise_sft(SFTSourceConfig(source="x", format=form), "mine", [row]).convert(row)
        assert answer[0]["content"] == f"from {form}"


def test_web_addresses_have_to_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    from preference_tuning.data.sources import origins

    url = "https://example.org/rows.jsonl"
    with pytest.raises((ConfigError, DataError), match=r"set data\.allow_urls: true"):
        fingerprints_of(DataConfig(source=url))
    monkeypatch.setattr(origins.DOWNLOADS, "get", lambda *_: Path(__file__))
    assert fingerprints_of(DataConfig(source=url, allow_urls=True)) == [fingerprint.of_file(Path(__file__))]


def test_of_ranked_answers_one_pair_or_all(tmp_path: Path) -> None:
    ranked = [
        {"prompt": f"p{i}", "completions": [{"text": f"{s} {i}", "score": s} for s in (1, 2, 3)]} for i in range(12)
    ]
    counts = [prepared_rows(ranked, tmp_path, pairing=how).manifest.pairs for how in ("best_worst", "all")]
    assert counts == [12, 36]


# --- limits and the split -------------------------------------------------------------------------------------------


def test_limits_of_rows_and_of_losses(tmp_path: Path) -> None:
    rows = [*PLAIN, {"prompt": "large", "chosen": "a" * 3000, "rejected": "b"}]
    assert problems(prepared_rows(rows, tmp_path)) == {}
    assert problems(prepared_rows(rows, tmp_path, max_row_bytes=2000)) == {"too_large": 1}
    with pytest.raises(DataError, match=r"1 of 41 rows cannot be used, more than data\.max_dropped = 0\.01"):
        prepared_rows(rows, tmp_path, max_row_bytes=2000, max_dropped=0.01)


def test_the_bound_on_the_prompt_in_tokens(tmp_path: Path, tiny_model: Path) -> None:
    """Through the data's own process, as in a run, and on to the rooms of the training jobs."""
    from preference_tuning.config import RunConfig
    from preference_tuning.data.__main__ import main
    from preference_tuning.data.job import of_run
    from preference_tuning.models.source import locate

    rows = write_jsonl(tmp_path / "rows.jsonl", [*PLAIN, {"prompt": LONG, "chosen": "a", "rejected": "b"}])
    lost = []
    for bound in (None, 60):
        data = {"source": str(rows), "max_prompt_length": bound, "held_out": 0.25}
        run = RunConfig.model_validate(
            {"base_model": {"source": str(tiny_model)}, "data": data, "output_dir": str(tmp_path)}
        )
        manifest = main(tmp_path, of_run(run, locate(run.base_model)))
        assert manifest.max_prompt_length == bound
        lost.append({count.problem: count.rows for count in manifest.problems})
    assert lost == [{}, {"long_prompt": 1}]


def test_how_near_a_near_duplicate_is(tmp_path: Path) -> None:
    good, bad, _ = PROBLEMS["near_duplicate"]
    found = [
        problems(prepared_rows([*good, *bad], tmp_path, near_duplicate_similarity=similarity))
        for similarity in (0.9, 1.0)
    ]
    assert found == [{"near_duplicate": 1}, {}]


def test_the_share_held_out(tmp_path: Path) -> None:
    rows = preference_rows(400)
    sizes = [prepared_rows(rows, tmp_path, held_out=share).manifest.held_out for share in (0.1, 0.4)]
    assert sizes == [pytest.approx(40, abs=20), pytest.approx(160, abs=35)]
