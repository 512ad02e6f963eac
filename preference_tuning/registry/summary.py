"""The end of a run on one screen."""

from pathlib import Path

from preference_tuning.evaluation.job import Evaluation, load_summary
from preference_tuning.evaluation.statistics import Figure
from preference_tuning.registry.result import Registered, Result

SAMPLE_WIDTH = 100


def render(result: Result, registered: Registered) -> str:
    """Return what was trained on what, the figures before and after, the verdict, and where everything lies."""
    evaluation = load_summary(result.evaluation)
    manifest = result.dataset.manifest
    stages = ", ".join(
        f"{stage.upper()} {record.steps} steps in {record.seconds:.0f} s" for stage, record in result.records().items()
    )
    verdict = registered.verdict
    lines = [
        f"{result.base_model.source}",
        f"  tuned on {manifest.source}: {manifest.train} pairs, {evaluation.pairs} held out; {stages}",
        "",
        _table(evaluation.models),
        "",
        *_sample(evaluation),
        f"verdict    {verdict.decision}: {verdict.reason}",
        f"version    {registered.version.id} of {registered.version.name}, {_standing(registered)}",
        f"model      {_short(registered.folder / 'model')}",
        f"report     {_short(registered.folder / 'evidence' / 'evaluation' / 'report.html')}",
        f"comet      {_comet(result)}",
        f"dashboard  python run.py dashboard {result.run.get('zenml_run', '')}".rstrip(),
    ]
    return "\n".join(lines)


def _table(models: dict[str, dict[str, Figure]]) -> str:
    rows = {
        "finds the chosen answer likelier": "likelihood/accuracy",
        "the same, per token": "likelihood/accuracy_norm",
        "loss on chosen answers (nats a token)": "nll/chosen",
        "reward accuracy against the model before": "rewards/accuracies",
    }
    header = f"{'held-out pairs':42}" + "".join(f"{name:>24}" for name in models)
    body = [
        f"{title:42}" + "".join(f"{figures.get(name, '')!s:>24}" for figures in models.values())
        for title, name in rows.items()
    ]
    return "\n".join([header, *body])


def _sample(evaluation: Evaluation) -> list[str]:
    if not evaluation.samples:
        return []
    sample = evaluation.samples[0]
    lines = [f"asked      {_one_line(sample.prompt)}"]
    lines += [f"{name:10} {_one_line(answer)}" for name, answer in sample.answers.items()]
    return [*lines, ""]


def _one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= SAMPLE_WIDTH else flat[: SAMPLE_WIDTH - 1] + "…"


def _standing(registered: Registered) -> str:
    if registered.promoted:
        return "now the champion"
    return f"not promoted; the champion is {registered.champion}" if registered.champion else "not promoted"


def _comet(result: Result) -> str:
    if result.comet.mode() == "offline":
        return f"comet upload {_short(result.comet.folder)}/*/*.zip"
    return f"experiment {result.comet.experiment_key}" if result.comet.mode() == "online" else "off"


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
