"""cron: a marked line in the user's crontab, and the script that it starts.

cron gives a command next to no environment, keeps no log and starts a run while the last one is still going: the script
brings the first two, and `retrain` itself refuses the third with exit code 75.
"""

import shlex
import subprocess

from preference_tuning import scheduling
from preference_tuning.errors import ConfigError
from preference_tuning.scheduling import LOGS_KEPT, Plan, Retraining, call


def plan(work: Retraining, expression: str) -> Plan:
    """Return what is written; the crontab's other lines stay as they are."""
    script = _script(work)
    return Plan(
        title=f"cron starts the retraining of {work.name} at `{expression}`, in the time zone of this machine.\n"
        f"This line goes into the crontab:\n\n{_line(work, expression)}",
        files={work.logs / "retrain.sh": script},
        notes=(
            f"logs       {work.logs}, the last {LOGS_KEPT}",
            f"keys       {work.keys}, lines such as COMET_API_KEY=..., chmod 600; read if it is there",
        ),
    )


def install(work: Retraining, expression: str) -> None:
    """Write the script, and put the line into the crontab in place of an earlier one for the same model.

    Raises:
        ConfigError: there is no cron here.
        PreferenceTuningError: the crontab cannot be changed.
    """
    scheduling.install(plan(work, expression))
    _write([*_others(work), _line(work, expression)])


def remove(work: Retraining) -> bool:
    """Take the line out of the crontab and the script away; return whether there was one."""
    before, script = _lines(), work.logs / "retrain.sh"
    others = _others(work)
    if len(others) < len(before):
        _write(others)
    script.unlink(missing_ok=True)
    return len(others) < len(before)


def _line(work: Retraining, expression: str) -> str:
    # cron takes a percent sign for a line break.
    command = shlex.quote(str(work.logs / "retrain.sh")).replace("%", r"\%")
    return f"{expression} {command} {_mark(work)}"


def _mark(work: Retraining) -> str:
    return f"# preference_tuning retrains {work.name}"


def _others(work: Retraining) -> list[str]:
    return [line for line in _lines() if not line.endswith(_mark(work))]


def _lines() -> list[str]:
    try:
        done = subprocess.run(["crontab", "-l"], capture_output=True, text=True, check=False)  # noqa: S607 (PATH's own)
    except FileNotFoundError:
        raise ConfigError("schedule: cron is not installed on this machine (no crontab); choose another --on") from None
    # Without a crontab yet it fails and prints nothing.
    return done.stdout.splitlines()


def _write(lines: list[str]) -> None:
    call(["crontab", "-"], given="".join(f"{line}\n" for line in lines))


def _script(work: Retraining) -> str:
    settings = [f"export {name}={shlex.quote(value)}" for name, value in sorted(work.environment.items())]
    keys, logs = shlex.quote(str(work.keys)), shlex.quote(str(work.logs))
    lines = [
        "#!/bin/sh",
        f"# Written by `run.py schedule`: cron starts it to retrain {work.name}; `--remove` removes it.",
        "umask 077",
        *settings,
        f"if [ -f {keys} ]; then",
        f'    if [ -n "$(find {keys} -perm /077)" ]; then',
        f"        echo {keys} may be read by others: chmod 600 it >&2",
        "        exit 2",
        "    fi",
        f"    set -a; . {keys}; set +a",
        "fi",
        f"cd {shlex.quote(str(work.project))} || exit 2",
        f"logs={logs}",
        'mkdir -p "$logs"',
        'log="$logs/$(date +%Y-%m-%dT%H-%M-%S).log"',
        f'{shlex.join(work.command("cron"))} > "$log" 2>&1',
        "code=$?",
        'echo "exit code $code" >> "$log"',
        f'ls -1r "$logs" | grep "[.]log$" | tail -n +{LOGS_KEPT + 1} | while read -r old; do rm -f "$logs/$old"; done',
        "exit $code",
    ]
    return "\n".join(lines) + "\n"
