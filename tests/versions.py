"""Small published versions for tests of what happens after publication."""

from pathlib import Path
from typing import Any

from registries import write_weights

from preference_tuning.evaluation.gate import Verdict
from preference_tuning.registry.folder import FolderRegistry

CARD = """---
base_model: org/base
---
# m

A LoRA adapter for `org/base`, tuned by SFT then DPO on 48 preference pairs
and measured on 16 held-out pairs.

Verdict: **promote** (all 5 rules passed).

```python
from peft import PeftModel
```
"""


def publish(registry: FolderRegistry, folder: Path, weights: str = "w", decision: Any = "promote", **facts: Any) -> str:
    """Publish a version of weights that are told by their text, and return its id."""
    model, evidence = folder / f"model-{weights[:8]}", folder / "evidence"
    for part in (model, evidence):
        part.mkdir(parents=True, exist_ok=True)
    write_weights(model, weights)
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (model / "tokenizer").mkdir(exist_ok=True)
    (model / "tokenizer" / "chat_template.jinja").write_text("{{ messages }} \u00fc\n")
    (evidence / "report.html").write_text("<html>")
    given: dict[str, Any] = {
        "finetuning_type": "dpo",
        "base_model": {"source": "org/base", "revision": None, "fingerprint": "basefp"},
        "data": {"fingerprint": "datafp"},
        "config": {"tracking": {"project": "tests", "workspace": None, "tags": []}},
        "code": "c",
        "metrics": {},
        "verdict": Verdict(decision=decision, candidate="dpo", rules=[]),
        "run": {"zenml_run": "run-1", "zenml_run_id": "a" * 32, "comet_experiment": "e" * 32},
    }
    return registry.publish(model, {"evaluation": evidence}, {"README.md": CARD}, {**given, **facts}).id
