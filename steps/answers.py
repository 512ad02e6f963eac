"""What the run itself answers in ZenML's dashboard, on its own page and beside the answers of its steps."""

from typing import Any

from zenml import add_tags, get_step_context, log_metadata
from zenml.metadata.metadata_types import Uri
from zenml.utils.time_utils import utc_now


def answer(facts: dict[str, Any], verdict: str | None = None) -> None:
    """Leave groups of facts with the run of the current step, and the time that it took up to now.

    Args:
        facts: groups by their names; a group that is there already is replaced.
        verdict: becomes a tag of the run.
    """
    run = get_step_context().pipeline_run
    if run.start_time:
        facts = {**facts, "duration": f"{(utc_now(run.start_time) - run.start_time).total_seconds():.0f} s"}
    # Addresses as such are links in the dashboard.
    facts = {name: Uri(fact) if str(fact).startswith("http") else fact for name, fact in facts.items()}
    log_metadata(metadata=facts, run_id_name_or_prefix=run.id)
    if verdict:
        add_tags(tags=[verdict], run=run.id)
