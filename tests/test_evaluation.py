"""The evaluation beside scores and rules: held-out prompts that are trained on, and general text."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from preference_tuning.config import EvaluationConfig
from preference_tuning.data import job as data_job
from preference_tuning.data import sides
from preference_tuning.errors import ConfigError, DataError
from preference_tuning.evaluation import general
from preference_tuning.evaluation.job import inputs_of


def split_of(path: Path, *rows: tuple[str, str, str]) -> Path:
    """Write the list of pairs with content, group and side."""
    pq.write_table(pa.Table.from_pylist([dict(zip(("content", "group", "side"), row)) for row in rows]), path)
    return path


def test_held_out_prompts_that_are_trained_on_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the data's own preparation, so before anything is trained, whatever let them through."""
    apart = [("1", "a", "train"), ("2", "b", "held_out"), ("3", "c", "held_out")]
    sides.check_overlap(split_of(tmp_path / "split.parquet", *apart))
    dataset = SimpleNamespace(folder=tmp_path, manifest=SimpleNamespace(train=2, held_out=2))
    monkeypatch.setattr(data_job, "prepare", lambda job, again=False: dataset)
    work: Any = None
    assert data_job.prepare_for_run(work) is dataset
    split_of(tmp_path / "split.parquet", *apart, ("4", "b", "train"))
    with pytest.raises(DataError, match="1 of 2 held-out prompts are among the training data") as caught:
        data_job.prepare_for_run(work)
    assert caught.value.exit_code == 3


def test_what_a_model_was_trained_on_is_found_in_another_set(tmp_path: Path) -> None:
    ours = split_of(tmp_path / "ours", *((str(i), f"g{i}", "held_out") for i in range(4)), ("9", "g9", "train"))
    theirs = split_of(
        tmp_path / "theirs", ("0", "g0", "train"), ("x", "g1", "train"), ("2", "g2", "held_out"), ("3", "column", "train"),
    )  # fmt: skip
    assert sides.trained_on(ours, theirs) == (3, 4), "the same pair, another pair of the prompt, the pair by content"
    assert sides.new_to(theirs, ["g0", "g2", "new"]) == [False, True, True]
    assert sides.held_out(ours) == {"0", "1", "2", "3"}


def test_the_fingerprint_of_a_split_knows_sides_and_groups_and_no_order(tmp_path: Path) -> None:
    rows = [("1", "a", "train"), ("2", "b", "held_out")]
    found = [
        sides.fingerprint_of(split_of(tmp_path / str(number), *changed))
        for number, changed in enumerate(
            [rows, rows[::-1], [rows[0], ("2", "b", "train")], [rows[0], ("2", "c", "held_out")], rows[:1]]
        )
    ]
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_general_text_is_paragraphs_or_lines_of_json(tmp_path: Path) -> None:
    plain, lines = tmp_path / "general.txt", tmp_path / "general.jsonl"
    plain.write_text("One\ntwo.\n\n\n  Three. \n")
    lines.write_text('{"text": "One"}\n\n{"text": " "}\n{"text": "Two", "by": 1}\n')
    assert general.texts(plain) == ["One\ntwo.", "Three."]
    assert general.texts(lines) == ["One", "Two"]


@pytest.mark.parametrize(
    ("name", "content", "error", "told"),
    [
        ("a.csv", b"x", ConfigError, r"a\.csv is neither \.txt nor \.jsonl"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 1}\n', DataError, "line 2: no field `text` that holds text"),
        ("a.jsonl", b'{"text": "a"\n', DataError, "line 1: not JSON"),
        ("a.txt", b" \n\n ", DataError, "has no text"),
        ("a.txt", b"a\xff", DataError, "is not UTF-8"),
    ],
)
def test_general_text_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes, error: type[Exception], told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=told):
        general.texts(tmp_path / name)
    with pytest.raises(ConfigError, match="no such file"):
        general.texts(tmp_path / "nothing.txt")


def test_general_text_is_scored_as_by_hand(tmp_path: Path) -> None:
    """Texts of several lengths in batches, each token after the first, against a plain forward of each alone."""
    from test_scoring import tiny

    model = tiny("Llama")
    tokenizer = SimpleNamespace(pad_token_id=0, encode=lambda text: [ord(letter) - 90 for letter in text])
    rows = general.encode(["abcdef", "h", "ponm", "xy", "a" * 40], tokenizer, longest=8)
    assert [len(row) for row in rows] == [6, 4, 2, 8], "one token says nothing, and long texts are cut"
    told: list[int] = []
    base = SimpleNamespace(tokenizer=tokenizer, device=torch.device("cpu"), dtype=torch.float32)
    found = general.score(model, rows, 3, base, told.append)
    assert sum(told) == len(rows)
    for row, sum_ in zip(rows, found, strict=True):
        ids = torch.tensor([row])
        with torch.no_grad():
            logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
        assert sum_ == pytest.approx(logps.sum().item(), abs=1e-4)
    tokens = [len(row) - 1 for row in rows]
    general.write({general.TOKENS: tokens, "base": found, "sft": found - np.array(tokens) * 0.5}, tmp_path / "g")
    figures = general.figures(general.read(tmp_path / "g"), "sft", "base", seed=0)
    nll = -found.sum() / sum(tokens) + 0.5
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(
        {"general/nll": nll, "general/nll_change": 0.5, "general/ppl": math.exp(nll)}
    )
    assert set(general.figures(general.read(tmp_path / "g"), "base", None, 0)) == {"general/nll", "general/ppl"}
    assert general.figures({general.TOKENS: [1]}, "dpo", "sft", 0) == {}


def test_another_text_is_another_evaluation(tmp_path: Path) -> None:
    """By its content, for the cache of the step and the folder of the job; and a text of one token says nothing."""
    text = tmp_path / "general.txt"
    config = EvaluationConfig(general=str(text))
    hashes = []
    for words in ("One.", "Two."):
        text.write_text(words, encoding="utf-8")
        hashes.append(inputs_of(config))
    assert hashes[0] != hashes[1]
    assert inputs_of(EvaluationConfig()) == []
    with pytest.raises(DataError, match="no text has more than one token"):
        general.encode(["a"], SimpleNamespace(encode=lambda words: [1]), 8)
