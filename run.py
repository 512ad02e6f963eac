#!/usr/bin/env python
"""The command line: train, check, data, evaluate, registry, track, dashboard; `run.py COMMAND --help` says more."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

# Before anything imports them: no telemetry, and only what matters on the screen.
os.environ.setdefault("ZENML_ANALYTICS_OPT_IN", "false")
os.environ.setdefault("ZENML_LOGGING_VERBOSITY", "WARN")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    """Parse the command and hand over; heavy imports come only after the config is known to be good."""
    from preference_tuning import interruption
    from preference_tuning.errors import PreferenceTuningError, find

    interruption.watch()
    try:
        options = _parser().parse_args()
        options.command(options)
    except (PreferenceTuningError, KeyboardInterrupt) as error:
        known = find(error)
        print(f"error: {known}", file=sys.stderr)
        sys.exit(known.exit_code if known else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py",
        description="Preference tuning: SFT, DPO, evaluation and registry as one ZenML pipeline.",
        epilog="Exit codes: 0 done, 2 config, 3 data, 4 diverged, 75 interrupted (run it again to continue), 1 other.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, text in (
        ("train", train, "run the pipeline"),
        ("check", check, "check the config, the data and the model without training"),
    ):
        verb = commands.add_parser(name, help=text, description=text)
        verb.add_argument("config", type=Path, metavar="CONFIG", help="a run config, such as configs/quickstart.yaml")
        verb.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override, as dpo.beta=0.1")
        if name == "train":
            verb.add_argument("--no-cache", action="store_true", help="run every step, whatever is cached")
            verb.add_argument(
                "--force-resume",
                action="store_true",
                help="continue unfinished training with the settings as they are now",
            )
        else:
            verb.add_argument("--json", action="store_true", help="print the findings as JSON")
            verb.add_argument("--probe", action="store_true", help="run a few rows through every job to measure time")
        verb.set_defaults(command=command)
    text = "read, check and split preference data, and report what is in it; nothing is trained"
    verb = commands.add_parser("data", help=text, description=text)
    verb.add_argument("what", metavar="CONFIG-OR-PATH", help="a run config (.yaml), a data file or folder, or a hub id")
    verb.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override, as data.held_out=0.1")
    verb.add_argument("--json", action="store_true", help="print the findings as JSON")
    verb.add_argument("--out", type=Path, metavar="DIR", help="save the rows, manifest, quarantine and report there")
    verb.set_defaults(command=data)
    text = "score and judge any model as the pipeline does, or look whether a stored verdict holds"
    verb = commands.add_parser("evaluate", help=text, description=text)
    verb.add_argument(
        "what",
        nargs="?",
        metavar="MODEL_OR_VERSION",
        help="`champion`, `previous`, a version's id or its beginning, or a folder with an adapter or a full model; "
        "the base model and the champion are scored beside it",
    )
    verb.add_argument("--config", type=Path, metavar="CONFIG", help="a run config: base model, data, rules, registry")
    verb.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override, as data.held_out=0.1")
    verb.add_argument(
        "--verify",
        metavar="VERSION",
        help="decide again from the stored scores of a version (`champion`, `previous`, an id or its beginning), and "
        "compare everything with what is stored; exit code 1 if the verdict does not hold",
    )
    verb.set_defaults(command=evaluate)
    _add_registry(commands)
    verb = commands.add_parser(
        "dashboard", help="serve ZenML's dashboard and show a run in it", description="Start ZenML's dashboard."
    )
    verb.add_argument("run", nargs="?", metavar="RUN", help="name or id of a run; the last one without it")
    verb.add_argument("--port", type=int, default=8237)
    verb.set_defaults(command=dashboard)
    return parser


def _add_registry(commands: Any) -> None:
    text = "list, compare, promote, take back, verify, push, export or clear versions"
    verbs = commands.add_parser("registry", help=text, description=text).add_subparsers(required=True, metavar="VERB")
    for name, text in {
        "list": "every version: its verdict, its figures, which one is the champion",
        "show": "all of one version: figures, data, base model, files, pushes",
        "promote": "make a version the champion; its verdict must allow it",
        "rollback": "make the previous champion the champion again",
        "verify": "hash every file of a version again, load its model, and compare what it computes with what it did",
        "push": "bring versions to the targets in the config; continues only what is missing",
        "export": "write a version as a merged model, GGUF file or Ollama model",
        "gc": "remove old versions; champion, previous and the last ones stay",
    }.items():
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("--config", type=Path, metavar="CONFIG", help="a run config; without it outputs/registry")
        verb.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override")
        if name not in ("list", "gc", "rollback"):
            default = None if name in ("promote", "export") else "champion"
            text = "`champion`, `previous`, an id or the beginning of one"
            verb.add_argument("version", nargs="?" if default else None, default=default, metavar="VERSION", help=text)
        verb.set_defaults(command=registry, verb=name)


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
    if loaded.evaluation.judge is not None and loaded.evaluation.judge.api_key_secret is not None:
        from steps.context import give_key_to

        give_key_to(loaded.evaluation.judge)
    from preference_tuning import assessment

    print(assessment.assess(options.what, loaded))


def registry(options: argparse.Namespace) -> None:
    """Do what a verb of `registry` says."""
    from preference_tuning import config
    from preference_tuning.errors import ConfigError

    if options.set and options.config is None:
        raise ConfigError("registry: --set overrides a config; name it with --config CONFIG")
    loaded = config.load(options.config, options.set).config if options.config else None
    section = loaded.registry if loaded else config.RegistryConfig()
    raise NotImplementedError(section)


def dashboard(options: argparse.Namespace) -> None:
    """Start the local ZenML server and print where the run is shown."""
    from pipelines.dashboard import open_run

    open_run(options.run, options.port)


if __name__ == "__main__":
    main()
