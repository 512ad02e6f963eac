"""Several models on the same pairs: every number against a plain forward with whole logits, and the table of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_scoring import PAIRS, tiny

from preference_tuning.evaluation import scores
from preference_tuning.models import comparing

NAMES = ("base", "sft", "dpo")
REFERENCES = {"sft": "base", "dpo": "sft"}


class Models:
    """A family of three different tiny models."""

    def __init__(self, kind: str, shares: bool) -> None:
        self.shares = shares
        self.models = {name: tiny(kind) for name in NAMES}
        for number, model in enumerate(self.models.values()):
            torch.manual_seed(number)
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        self.opened: list[str] = []
        self.base = SimpleNamespace(
            dtype=torch.float32, device=torch.device("cpu"), tokenizer=SimpleNamespace(pad_token_id=0)
        )

    @contextmanager
    def member(self, name: str | None) -> Iterator[Any]:
        self.opened.append(name or "base")
        yield self.models[name or "base"]


def plain(models: Models, pair: Any, side: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The log-probabilities of an answer's tokens and the divergences from the reference, straight from the logits."""
    ids = pair["prompt_ids"] + pair[side]
    at = slice(len(pair["prompt_ids"]) - 1, len(ids) - 1)
    with torch.no_grad():
        found = {
            n: model(torch.tensor([ids])).logits[0, at].log_softmax(-1).double() for n, model in models.models.items()
        }
    reference = found[REFERENCES.get(name, name)]
    kl = (found[name].exp() * (found[name] - reference)).sum(-1)
    return found[name].gather(-1, torch.tensor(pair[side])[:, None])[:, 0].numpy(), kl.numpy()


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Cohere"])
def test_the_table_says_what_whole_logits_say(kind: str, shares: bool, tmp_path: Path) -> None:
    models = Models(kind, shares)
    pairs: Any = [dict(pair) for pair in PAIRS]
    collector = scores.Collector(*([len(pair[f"{side}_ids"]) for pair in PAIRS] for side in scores.SIDES))
    expected = {
        (name, side): [plain(models, pair, f"{side}_ids", name) for pair in PAIRS]
        for name in NAMES
        for side in scores.SIDES
    }
    comparison = comparing.Comparison(models, REFERENCES, pairs, batch_size=2, shared=True)  # type: ignore[arg-type]
    for batch in comparison.run(NAMES):
        collector.add(batch.numbers, batch.answer, batch.logps, batch.divergences)
    if not shares:
        assert models.opened == [name for name in NAMES for _ in range(2)], "each is loaded once"
    table = collector.table(["a", "b", "c"], ["x", "y", "x"], REFERENCES)
    scores.write(table, tmp_path / "scores.parquet")
    found = scores.read(tmp_path / "scores.parquet")
    assert scores.references(tmp_path / "scores.parquet") == REFERENCES
    assert found["prompt"].tolist() == ["x", "y", "x"]
    assert found["chosen_tokens"].tolist() == [3, 1, 7]
    for (name, side), values in expected.items():
        for i, (logps, kl) in enumerate(values):
            assert table[f"{name}/{side}_token_logps"][i].as_py() == pytest.approx(logps, abs=1e-4)
            assert found[f"{name}/{side}"][i] == pytest.approx(logps.sum(), abs=1e-4)
            if name in REFERENCES:
                assert found[f"{name}/{side}_kl"][i] == pytest.approx(kl.sum(), abs=1e-4)
                assert found[f"{name}/{side}_kl"][i] > 1e-4, "the models differ"


def test_a_pair_without_a_score_is_an_error() -> None:
    collector = scores.Collector([1, 1], [1, 1])
    collector.add([0], np.array([0, 1]), {"base": np.array([-1.0, -2.0])}, {})
    with pytest.raises(ValueError, match="not every pair has base"):
        collector.table(["a", "b"], ["x", "y"], {})
