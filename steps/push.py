"""Pushing: the registered version goes to the targets in the config, each with a receipt.

Never cached: what lies outside is looked at, and only what is missing is sent.
"""

from zenml import log_metadata, save_artifact, step
from zenml.types import HTMLString

from preference_tuning.config import RegistryConfig
from preference_tuning.registry.pushing import report, targets
from steps.answers import answer
from steps.context import current_run, give_secrets


@step(enable_cache=False)
def push(version: str, registry: RegistryConfig) -> None:
    """Try every target, show the receipts, and fail if one failed."""
    run = current_run()
    give_secrets(registry)
    _, receipts = targets.push(run.config, version, run.output_dir)
    if receipts:
        log_metadata(report.metadata(receipts))
        answer({"pushes": report.metadata(receipts)})
        # Saved here and not returned: a step that fails returns nothing.
        save_artifact(HTMLString(report.page(version, receipts)), name="pushes")
        print(report.render(receipts))
    report.raise_failed(version, receipts)
