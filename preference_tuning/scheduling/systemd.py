"""systemd: a service and a timer of the user, which catches up on one run that the machine slept through."""

import shlex
from pathlib import Path

from preference_tuning import scheduling
from preference_tuning.scheduling import Plan, Retraining, call

DAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
STOP_SECONDS = 600
"""How long a run may take to save its checkpoint when the machine shuts down."""


def plan(work: Retraining, expression: str) -> Plan:
    """Return the units and the commands that start the timer."""
    service, timer = _units(work)
    return Plan(
        title=f"systemd starts the retraining of {work.name} at `{expression}`, in the time zone of this machine.",
        files={service: _service(work), timer: _timer(work, expression)},
        commands=(
            ("systemctl", "--user", "daemon-reload"),
            ("systemctl", "--user", "enable", "--now", timer.name),
        ),
        notes=(
            f"logs       journalctl --user -u {service.name}",
            f"keys       {work.keys}, lines such as COMET_API_KEY=..., chmod 600; read if it is there",
            "logged out the timer runs only after `loginctl enable-linger`",
        ),
    )


def install(work: Retraining, expression: str) -> None:
    """Write the units and start the timer.

    Raises:
        ConfigError: there is no systemd here.
        PreferenceTuningError: it refuses.
    """
    scheduling.install(plan(work, expression))


def remove(work: Retraining) -> bool:
    """Stop the timer and remove the units; return whether there were any."""
    service, timer = _units(work)
    if not timer.is_file():
        return False
    call(["systemctl", "--user", "disable", "--now", timer.name])
    for unit in (service, timer):
        unit.unlink(missing_ok=True)
    call(["systemctl", "--user", "daemon-reload"])
    return True


def on_calendar(expression: str) -> list[str]:
    """Return the OnCalendar values that fire as a cron expression does.

    Where both day and weekday are restricted cron fires on either (crontab(5)), systemd on both, so they become two;
    a field that begins with a star is not restricted to cron.
    """
    minute, hour, day, month, weekday = expression.split()
    time = f"{_field(hour)}:{_field(minute)}:00"
    months, days = _field(month, MONTHS, first=1), _field(day, first=1)
    every_day = f"*-{months}-{days} {time}"
    if weekday == "*":
        return [every_day]
    if "*" in (day[0], weekday[0]):
        return [f"{_weekdays(weekday)} {every_day}"]
    return [every_day, f"{_weekdays(weekday)} *-{months}-* {time}"]


def _field(text: str, names: tuple[str, ...] = (), first: int = 0) -> str:
    """Return a field of a cron expression in systemd's words: ``1-5`` is ``1..5``, ``*/15`` is ``0/15``."""
    lowered = text.lower()
    for number, name in enumerate(names, first):
        lowered = lowered.replace(name, str(number))
    parts = []
    for part in lowered.split(","):
        values, _, step = part.partition("/")
        values = (f"{first}" if step else "*") if values == "*" else values.replace("-", "..")
        parts.append(f"{values}/{step}" if step else values)
    return ",".join(parts)


def _weekdays(text: str) -> str:
    """Return the days that a field names: 0 and 7 are Sunday, ranges may have steps."""
    numbers: list[int] = []
    for part in text.lower().split(","):
        for number, name in enumerate(DAYS[:7]):
            part = part.replace(name.lower(), str(number))
        values, _, step = part.partition("/")
        low, _, high = ("0-6" if values == "*" else values).partition("-")
        numbers += range(int(low), int(high or (6 if step else low)) + 1, int(step or 1))
    return ",".join(dict.fromkeys(DAYS[number] for number in numbers))


def _units(work: Retraining) -> tuple[Path, Path]:
    folder = work.keys.parent.parent / "systemd" / "user"
    name = f"preference-tuning-{work.name}"
    return folder / f"{name}.service", folder / f"{name}.timer"


def _service(work: Retraining) -> str:
    settings = [f'Environment="{_escaped(f"{name}={value}")}"' for name, value in sorted(work.environment.items())]
    return "\n".join(
        [
            "[Unit]",
            f"Description=Retrains {work.name}",
            "",
            "[Service]",
            "Type=oneshot",
            f"WorkingDirectory={_percent(str(work.project))}",
            *settings,
            f"EnvironmentFile=-{_percent(str(work.keys))}",
            f"ExecStart={_percent(shlex.join(work.command('systemd')))}",
            "# Nothing new, or another one is running: no failure.",
            "SuccessExitStatus=10 75",
            "# SIGTERM makes it save a checkpoint; the next run goes on there.",
            "KillMode=mixed",
            f"TimeoutStopSec={STOP_SECONDS}",
            "",
        ]
    )


def _timer(work: Retraining, expression: str) -> str:
    return "\n".join(
        [
            "[Unit]",
            f"Description=When {work.name} is retrained",
            "",
            "[Timer]",
            f"# cron: {expression}",
            *(f"OnCalendar={value}" for value in on_calendar(expression)),
            "Persistent=true",
            "AccuracySec=1s",
            "",
            "[Install]",
            "WantedBy=timers.target",
            "",
        ]
    )


def _escaped(text: str) -> str:
    return _percent(text.replace("\\", "\\\\").replace('"', '\\"'))


def _percent(text: str) -> str:
    # systemd's specifiers begin with it.
    return text.replace("%", "%%")
