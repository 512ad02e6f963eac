"""What the command line offers: commands, their words, and what their help says. ``run.py`` does what they ask for."""

import argparse
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    """Return the parser; of what it parses, ``command`` and ``verb`` are the names of what is to be done."""
    made = argparse.ArgumentParser(
        prog="run.py",
        description="Preference tuning: SFT, DPO, evaluation and registry as one ZenML pipeline.",
        epilog="Exit codes: 0 done, 2 config, 3 data, 4 diverged, 5 overtaken by another promotion (run it again), 10 "
        "nothing to retrain, 75 interrupted or already running (run it again), 1 other.",
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("train", "run the pipeline"),
        ("check", "check the config, the data and the model without training"),
    ):
        verb = commands.add_parser(name, help=text, description=text)
        verb.add_argument("config", type=Path, metavar="CONFIG", help="a run config, such as configs/quickstart.yaml")
        _add_overrides(verb, "dpo.beta=0.1")
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
    text = "read, check and split preference data, and report what is in it; nothing is trained"
    verb = commands.add_parser("data", help=text, description=text)
    verb.add_argument("what", metavar="CONFIG-OR-PATH", help="a run config (.yaml), a data file or folder, or a hub id")
    _add_overrides(verb, "data.held_out=0.1")
    verb.add_argument("--json", action="store_true", help="print the findings as JSON")
    verb.add_argument("--out", type=Path, metavar="DIR", help="save the rows, manifest, quarantine and report there")
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
    _add_overrides(verb, "data.held_out=0.1")
    verb.add_argument(
        "--verify",
        metavar="VERSION",
        help="decide again from the stored scores of a version (`champion`, `previous`, an id or its beginning), and "
        "compare everything with what is stored; exit code 1 if the verdict does not hold",
    )
    _add_registry(commands)
    _add_track(commands)
    _add_retraining(commands)
    text = "continue a run that failed or was interrupted from its last completed step"
    verb = commands.add_parser("resume", help=text, description=text)
    text = "name, id or the beginning of one; without it the last one that failed"
    verb.add_argument("run", nargs="?", metavar="RUN", help=text)
    _add_schedule(commands)
    verb = commands.add_parser(
        "dashboard", help="serve ZenML's dashboard and show a run in it", description="Start ZenML's dashboard."
    )
    verb.add_argument("run", nargs="?", metavar="RUN", help="name or id of a run; the last one without it")
    verb.add_argument("--port", type=int, default=8237)
    return made


def _add_overrides(verb: argparse.ArgumentParser, example: str) -> None:
    verb.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=f"override, as {example}")


def _add_schedule(commands: Any) -> None:
    text = "retrain again and again: show, install or remove what a scheduler needs"
    verb = commands.add_parser("schedule", help=text, description=text)
    verb.add_argument("config", type=Path, metavar="CONFIG", help="the run config that is retrained")
    _add_overrides(verb, "dpo.beta=0.1")
    verb.add_argument(
        "--on", required=True, metavar="WHERE", help="cron, systemd, or the orchestrator of the ZenML stack"
    )
    verb.add_argument("--cron", metavar="EXPRESSION", help='when, as "0 3 * * *": minute hour day month weekday')
    does = verb.add_mutually_exclusive_group()
    does.add_argument("--install", action="store_true", help="write it; without this it is only shown")
    does.add_argument("--remove", action="store_true", help="take it away again")
    verb.add_argument("--dags", type=Path, metavar="FOLDER", help="of Airflow; without it AIRFLOW_HOME/dags")


def _add_retraining(commands: Any) -> None:
    text = "train if anything changed since the last run, and skip otherwise: for cron and the like"
    verb = commands.add_parser("retrain", help=text, description=text)
    verb.add_argument("config", type=Path, metavar="CONFIG", help="a run config")
    _add_overrides(verb, "dpo.beta=0.1")
    text = "who or what starts it, for the history; without it PREFERENCE_TUNING_TRIGGER, or `retrain`"
    verb.add_argument("--trigger", metavar="NAME", help=text)
    verb.add_argument("--json", action="store_true", help="print the outcome as one line of JSON, and nothing else")
    text = "list every run: when, by what trigger, on what data, what became of it"
    verb = commands.add_parser("history", help=text, description=text)
    verb.add_argument("--config", type=Path, metavar="CONFIG", help="a run config; without it all runs in outputs")
    _add_overrides(verb, "output_dir=there")
    verb.add_argument("--last", type=int, metavar="N", help="only the last N rows")
    verb.add_argument("--json", action="store_true", help="print a line of JSON a row")


def _add_registry(commands: Any) -> None:
    text = "list, compare, promote, take back, verify, push, export or clear versions"
    command = commands.add_parser("registry", help=text, description=text)
    verbs = command.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in {
        "list": "every version: its verdict, its figures, which one is the champion",
        "show": "all of one version: figures, data, base model, files, pushes",
        "page": "write the whole registry as a page of HTML",
        "promote": "make a version the champion; its verdict must allow it",
        "rollback": "make the previous champion the champion again",
        "verify": "hash every file of a version again, load its model, and compare what it computes with what it did",
        "push": "bring versions to the targets in the config; continues only what is missing",
        "export": "write a version as a merged model, GGUF file or Ollama model",
        "gc": "remove old versions; champion, previous and the last ones stay",
    }.items():
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("--config", type=Path, metavar="CONFIG", help="a run config; without it outputs/registry")
        _add_overrides(verb, "output_dir=there")
        if name not in ("list", "page", "gc", "rollback"):
            default = None if name in ("promote", "export") else "champion"
            text = "`champion`, `previous`, an id or the beginning of one"
            verb.add_argument("version", nargs="?" if default else None, default=default, metavar="VERSION", help=text)
        _add_options(name, verb)


def _add_options(name: str, verb: argparse.ArgumentParser) -> None:
    """Add what only some verbs of `registry` have."""
    if name in ("list", "show", "verify"):
        verb.add_argument("--json", action="store_true", help="print one JSON document")
    if name == "page":
        text = "where to; without it registry-NAME.html in output_dir, which every run writes anew"
        verb.add_argument("--to", type=Path, metavar="FILE", help=text)
    if name == "promote":
        text = "promote it against its verdict; the reason is kept in the history"
        verb.add_argument("--despite", metavar="REASON", help=text)
    if name == "rollback":
        verb.add_argument("--reason", metavar="TEXT", help="why; kept in the history")
    if name == "push":
        verb.add_argument("--again", action="store_true", help="also to targets that have it, as their receipts say")
    if name == "gc":
        verb.add_argument("--keep", type=int, default=5, metavar="N", help="how many of the last ones stay (5)")
        verb.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    if name == "export":
        _add_export(verb)


def _add_export(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--as", dest="form", required=True, choices=("merged", "gguf", "ollama"), help="what it becomes")
    verb.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder for it")
    text = "bf16 (merged), f16 (gguf, ollama), f32, q8_0, or such as q4_k_m where llama-quantize was built"
    verb.add_argument("--outtype", metavar="TYPE", help=text)
    text = "llama.cpp, with its convert_hf_to_gguf.py; without it LLAMA_CPP_DIR"
    verb.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help=text)
    text = "a Go template for Ollama, instead of the one that renders as the model's own"
    verb.add_argument("--template", type=Path, metavar="FILE", help=text)


def _add_track(commands: Any) -> None:
    text = "show what of each run is in Comet, and send what is missing there"
    command = commands.add_parser("track", help=text, description=text)
    verbs = command.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in {
        "list": "every run: how many records it has, and how many of them are in Comet and in archives",
        "upload": "send what Comet does not have; needs COMET_API_KEY",
    }.items():
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("--folder", type=Path, default=Path("outputs"), metavar="DIR", help="the runs' output_dir")
        if name == "upload":
            verb.add_argument("runs", nargs="*", metavar="RUN", help="names, or beginnings of ids; without one, all")
