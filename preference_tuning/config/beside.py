"""What stands beside ``parameters`` in a run config: ZenML's part. ZenML ignores much of what it does not know."""

from typing import Any

from preference_tuning.config import secrecy
from preference_tuning.config.document import Document, KeyPath
from preference_tuning.config.explaining import unknown
from preference_tuning.config.schema import RunConfig

STEPS = ("load_preferences", "train_sft", "train_dpo", "evaluate", "register", "push")

# What ZenML 0.98 accepts beside `parameters`. Copied because importing zenml takes seconds; a test compares the
# copies with the installed ZenML.
ZENML_KEYS = (
    "build", "cache_policy", "cleanup_hook_source", "enable_artifact_metadata", "enable_artifact_visualization",
    "enable_cache", "enable_heartbeat", "enable_pipeline_logs", "enable_step_logs", "end_hook_source", "environment",
    "execution_mode", "extra", "failure_hook_source", "init_hook_kwargs", "init_hook_source", "model", "parameters",
    "pause_hook_source", "resume_hook_source", "retry", "run_name", "schedule", "secrets", "settings",
    "start_hook_source", "steps", "substitutions", "success_hook_source", "tags",
)  # fmt: skip
ZENML_MODEL_KEYS = (
    "audience", "description", "ethics", "license", "limitations", "name", "save_models_to_registry", "tags",
    "trade_offs", "use_cases", "version",
)  # fmt: skip
ZENML_SCHEDULE_KEYS = (
    "catchup", "cron_expression", "end_time", "interval_second", "name", "run_once_start_time", "start_time",
)  # fmt: skip
ZENML_STEP_KEYS = (
    "cache_policy", "enable_artifact_metadata", "enable_artifact_visualization", "enable_cache", "enable_step_logs",
    "end_hook_source", "environment", "experiment_tracker", "extra", "failure_hook_source",
    "group", "heartbeat_healthy_threshold", "model", "outputs", "parameters", "retry", "runtime", "secrets",
    "settings", "start_hook_source", "step_operator", "substitutions", "success_hook_source",
)  # fmt: skip


def check(document: Document) -> None:
    """Note unknown keys, secrets, and what would not do what it says."""
    values = document.values
    for path, message in secrecy.problems(values):
        document.problem(path, message)
    for key in values:
        if key not in ZENML_KEYS:
            hint = f"; it belongs under parameters: {key}" if key in RunConfig.model_fields else ""
            document.problem((key,), "unknown key" + hint if hint else unknown(key, ZENML_KEYS))
    _check_keys(document, ("model",), ZENML_MODEL_KEYS)
    _check_no_retry(document, ())
    _check_keys(document, ("schedule",), ZENML_SCHEDULE_KEYS)
    _check_keys(document, ("steps",), STEPS)
    if isinstance(values.get("model"), dict) and not values["model"].get("name"):
        document.problem(("model",), "needs a name")
    given = values.get("steps")
    steps: dict[str, Any] = given if isinstance(given, dict) else {}
    for step in steps:
        _check_keys(document, ("steps", step), ZENML_STEP_KEYS)
        _check_no_retry(document, ("steps", step))
        if isinstance(steps[step], dict) and "parameters" in steps[step]:
            document.problem(("steps", step, "parameters"), "set the section under the top-level parameters instead")


def _check_no_retry(document: Document, path: KeyPath) -> None:
    """Refuse ZenML's own retries: they do everything again, also what a signal, the config or divergence ended."""
    value: Any = document.values
    for key in path:
        value = value[key]
    if isinstance(value, dict) and "retry" in value:
        document.problem(
            (*path, "retry"),
            "ZenML would also retry after a signal, a config error or divergence; "
            "parameters.training.retries repeats what is transient",
        )


def _check_keys(document: Document, path: KeyPath, known: tuple[str, ...]) -> None:
    value: Any = document.values
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return
    if not isinstance(value, dict):
        document.problem(path, f"{value!r}: must be a mapping")
        return
    for key in value:
        if key not in known:
            document.problem((*path, key), unknown(key, known))
