#!/usr/bin/env python
"""The command line: train, retrain, check, registry, ...; `run.py COMMAND --help` says more."""

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preference_tuning.config import RunConfig
    from preference_tuning.registry.folder import FolderRegistry

# Before anything imports them: no telemetry, and only what matters on the screen.
os.environ.setdefault("ZENML_ANALYTICS_OPT_IN", "false")
os.environ.setdefault("ZENML_LOGGING_VERBOSITY", "WARN")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# ZenML's modules make half a million objects that stay: looking for garbage among them is a quarter of a cached run.
gc.set_threshold(50_000)


def main() -> None:
    """Parse the command and hand over; heavy imports come only after the config is known to be good."""
    from preference_tuning import commandline, interruption
    from preference_tuning.errors import PreferenceTuningError, find

    interruption.watch()
    try:
        options = commandline.parser().parse_args()
        COMMANDS[options.command](options)
    except (PreferenceTuningError, KeyboardInterrupt) as error:
        known = find(error)
        print(f"error: {known}", file=sys.stderr)
        sys.exit(known.exit_code if known else 1)
    finally:
        gc.freeze()  # nor does it pay at the end of the process


def train(options: argparse.Namespace) -> None:
    """Check everything, then run the pipeline."""
    from preference_tuning import config

    # Before zenml is imported: a typo is answered at once.
    forced = ["training.unfinished=continue"] if options.force_resume else []
    document = config.load(options.config, [*options.set, *forced]).document
    import tempfile

    import yaml

    from pipelines.training import training

    with tempfile.TemporaryDirectory() as folder:
        # ZenML reads a file: the config with its overrides.
        resolved = Path(folder) / options.config.name
        resolved.write_text(yaml.safe_dump(document), encoding="utf-8")
        run = training.with_options(config_path=str(resolved), enable_cache=False if options.no_cache else None)
        run()


def check(options: argparse.Namespace) -> None:
    """Look at everything and say what was found, as a table or as JSON; the exit code is that of the gravest error."""
    from preference_tuning import config, preflight
    from preference_tuning.errors import ConfigError
    from preference_tuning.preflight import findings

    area = findings.Area("config")
    try:
        loaded = config.load(options.config, options.set)
    except ConfigError as error:
        found = [area.error(error)]
    else:
        from pipelines import stack

        more = (("stack", lambda _: stack.look(loaded.document, loaded.config)),)
        _give_secrets(loaded.config.registry)
        found = [area.ok(f"{options.config}, finetuning_type {loaded.config.finetuning_type}")]
        found += preflight.look(loaded.config, more=more, probed=options.probe)
    print(findings.as_json(found) if options.json else findings.table(found))
    gravest = findings.failure(found)
    sys.exit(gravest.exit_code if gravest else 0)


def data(options: argparse.Namespace) -> None:
    """Prepare the data of a config, or of a path alone, and say what is in it."""
    from preference_tuning import inspection

    print(inspection.inspect(options.what, options.set, options.out, options.json))


def evaluate(options: argparse.Namespace) -> None:
    """Score and judge a model, or decide again on a version from what is stored of it."""
    from preference_tuning import config
    from preference_tuning.errors import ConfigError

    if (options.what is None) == (options.verify is None):
        raise ConfigError("evaluate: name a model or version, or --verify VERSION")
    if options.config is None and (options.what or options.set):
        raise ConfigError("evaluate: needs --config CONFIG, which names base model, data, rules and registry")
    loaded = config.load(options.config, options.set).config if options.config else None
    if options.verify is not None:
        from preference_tuning.registry import folder, verification

        registry = folder.FolderRegistry(loaded.registry if loaded else config.RegistryConfig())
        found = verification.verify(registry, options.verify)
        print(found)
        sys.exit(1 if found.problems else 0)
    assert loaded is not None
    _give_secrets(loaded.evaluation.judge)
    from preference_tuning import assessment

    print(assessment.assess(options.what, loaded))


def registry(options: argparse.Namespace) -> None:
    """Do what a verb of `registry` says."""
    from preference_tuning import config
    from preference_tuning.errors import ConfigError

    if options.set and options.config is None:
        raise ConfigError("registry: --set overrides a config; name it with --config CONFIG")
    loaded = config.load(options.config, options.set).config if options.config else None
    from preference_tuning.registry.folder import FolderRegistry

    verbs = {
        "list": _list, "show": _show, "page": _page, "promote": _promote, "rollback": _rollback, "verify": _verify,
        "push": _push, "export": _export, "gc": _gc,
    }  # fmt: skip
    opened = FolderRegistry(loaded.registry if loaded else config.RegistryConfig())
    verbs[options.verb](options, opened, loaded)
    if options.verb in ("promote", "rollback", "gc", "push"):
        from preference_tuning.registry import page

        page.refresh(opened, page.place(_output_dir(loaded), opened.name))


def _list(options: argparse.Namespace, registry: "FolderRegistry", loaded: "RunConfig | None") -> None:
    from preference_tuning.registry import shown

    print(json.dumps(shown.overview(registry), indent=2) if options.json else shown.table(registry))


def _show(options: argparse.Namespace, registry: "FolderRegistry", loaded: "RunConfig | None") -> None:
    from preference_tuning.registry import shown

    told = shown.document(registry, options.version) if options.json else None
    print(json.dumps(told, indent=2) if told else shown.screen(registry, options.version))


def _page(options: argparse.Namespace, registry: "FolderRegistry", loaded: "RunConfig | None") -> None:
    from preference_tuning.registry import page

    print(page.write(registry, options.to or page.place(_output_dir(loaded), registry.name)))


def _promote(options: argparse.Namespace, registry: "FolderRegistry", loaded: "RunConfig | None") -> None:
    from preference_tuning.registry import operations

    print(operations.promote(registry, options.version, options.despite))
    _follow(registry)


def _rollback(options: argparse.Namespace, registry: "FolderRegistry", loaded: "RunConfig | None") -> None:
    from preference_tuning.registry import operations

    print(operations.rollback(registry, options.reason))
    _follow(registry)


def _gc(options: argparse.Namespace, registry: "FolderRegistry", loaded: "RunConfig | None") -> None:
    from preference_tuning.registry import collecting

    print(collecting.collect(registry, options.keep, options.dry_run))
    if not options.dry_run:
        _follow(registry)


def _follow(registry: "FolderRegistry") -> None:
    """Bring ZenML's model versions to what the registry says now."""
    from pipelines.models import follow

    follow(registry)


def _verify(options: argparse.Namespace, registry: "FolderRegistry", loaded: "RunConfig | None") -> None:
    from preference_tuning.registry import roundtrip

    found = roundtrip.verify(registry, options.version, loaded, _output_dir(loaded))
    print(json.dumps(found.document(), indent=2) if options.json else found)
    sys.exit(1 if found.problems else 0)


def _push(options: argparse.Namespace, registry: "FolderRegistry", loaded: "RunConfig | None") -> None:
    from preference_tuning.errors import ConfigError

    if loaded is None or not loaded.registry.push:
        raise ConfigError("registry push: --config CONFIG names a run config whose registry.push says where to")
    _give_secrets(loaded.registry)
    from preference_tuning.registry.pushing import report, targets

    version, receipts = targets.push(loaded, options.version, _output_dir(loaded), options.again)
    print(report.render(receipts) or f"version {version} is not the champion, and no target takes every version")
    report.raise_failed(version, receipts)


def _export(options: argparse.Namespace, registry: "FolderRegistry", loaded: "RunConfig | None") -> None:
    from preference_tuning.registry import export

    where = (options.form, options.to, loaded, _output_dir(loaded))
    folder = export.export(registry, options.version, *where, options.outtype, options.llama_cpp, options.template)
    print(f"{options.form} of {options.version}: {folder}")


def _output_dir(loaded: "RunConfig | None") -> Path:
    from preference_tuning.config import RunConfig

    return Path(str(loaded.output_dir if loaded else RunConfig.model_fields["output_dir"].default)).expanduser()


def schedule(options: argparse.Namespace) -> None:
    """Show, install or remove a schedule."""
    from preference_tuning import config, scheduling
    from preference_tuning.errors import ConfigError

    loaded = config.load(options.config, options.set)
    if options.cron is None and not options.remove:
        raise ConfigError('schedule: say when, as --cron "0 3 * * *"')
    overrides = [part for value in options.set for part in ("--set", value)]
    work = scheduling.retraining(loaded.config, options.config, overrides, Path(__file__).resolve().parent)
    scheduler = scheduling.of(options.on)
    if scheduler is None:
        from pipelines import schedules

        scheduler = schedules.OnStack(options.on, loaded.document, schedules.dags_folder(options.dags))
    if options.remove:
        print("removed" if scheduler.remove(work) else "there was none")
        return
    expression = scheduling.check_cron(options.cron)
    print(scheduler.plan(work, expression))
    print(f"fires      {', '.join(f'{time:%Y-%m-%d %H:%M}' for time in scheduling.upcoming(expression))}, ...")
    if options.install:
        scheduler.install(work, expression)
    print("installed" if options.install else "nothing was changed; add --install to install it")


def track(options: argparse.Namespace) -> None:
    """List the tracked runs, or send to Comet what it lacks of them."""
    from preference_tuning.tracking import overview

    root = options.folder / "tracking"
    for line in overview.listing(root) if options.verb == "list" else overview.upload(root, options.runs):
        print(line)


def _give_secrets(section: Any) -> None:
    """Put the ZenML secrets that a section of the config names where the library looks; zenml is imported for them."""
    if section is not None and section.secrets():
        from steps.context import give_secrets

        give_secrets(section)


def retrain(options: argparse.Namespace) -> None:
    """Train if there is reason to; the exit code says what became of it."""
    from pipelines import retraining

    trigger = options.trigger or os.environ.get("PREFERENCE_TUNING_TRIGGER") or "retrain"
    sys.exit(retraining.command(options.config, options.set, trigger, options.json))


def resume(options: argparse.Namespace) -> None:
    """Continue a run."""
    from pipelines import resuming

    resuming.resume(options.run)


def history(options: argparse.Namespace) -> None:
    """List the runs."""
    from preference_tuning import config
    from preference_tuning.errors import ConfigError
    from preference_tuning.retraining import shown
    from preference_tuning.retraining.history import History

    if options.set and options.config is None:
        raise ConfigError("history: --set overrides a config; name it with --config CONFIG")
    loaded = config.load(options.config, options.set).config if options.config else None
    output_dir = loaded.output_dir if loaded else str(config.RunConfig.model_fields["output_dir"].default)
    runs = History(Path(output_dir)).runs(loaded.registry.name if loaded else None)
    if told := shown.history(runs, options.last, options.json):
        print(told)


def dashboard(options: argparse.Namespace) -> None:
    """Start the local ZenML server and print where the run is shown."""
    from pipelines.dashboard import open_run

    open_run(options.run, options.port)


COMMANDS = {
    "train": train, "check": check, "data": data, "evaluate": evaluate, "registry": registry, "track": track,
    "retrain": retrain, "history": history, "resume": resume, "schedule": schedule, "dashboard": dashboard,
}  # fmt: skip


if __name__ == "__main__":
    main()
