"""The evaluation job: what it computes, and what it takes from earlier jobs."""

from pathlib import Path
from types import SimpleNamespace


def test_the_dpo_reference_is_not_computed_again(tmp_path: Path) -> None:
    """The same rows, weights and batches: read. Other batches, which may move the last bits: computed."""
    import datasets
    import torch
    from test_scoring import PAIRS, tiny

    from preference_tuning.evaluation.__main__ import _Evaluating
    from preference_tuning.models import stored

    evaluating = _Evaluating.__new__(_Evaluating)
    evaluating.row_key = "rows"
    evaluating.base = SimpleNamespace(
        dtype=torch.float32, device=torch.device("cpu"), tokenizer=SimpleNamespace(pad_token_id=0)
    )
    evaluating.job = SimpleNamespace(
        adapter_hashes={"sft": "weights"}, source=SimpleNamespace(fingerprint="base"), output_dir=tmp_path,
        config=SimpleNamespace(batch_size=8), parts=1,
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{**pair, "length": 10} for pair in PAIRS])
    kept = torch.tensor([[-1.0, -2.0]] * len(rows))
    key = stored.key_of("rows", "weights", "base", torch.float32, True, 8)
    stored.write(stored.place(tmp_path, key), key, kept)
    model = tiny("Llama")
    assert evaluating._score("sft", model, rows).tolist() == kept.tolist()
    assert (evaluating._score("base", model, rows) != kept.numpy()).all()
    evaluating.job.config.batch_size = 4
    assert (evaluating._score("sft", model, rows) != kept.numpy()).all()
