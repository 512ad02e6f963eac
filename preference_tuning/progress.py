"""Progress of anything that takes over ten seconds."""

import os
import sys
from typing import Any

from tqdm import tqdm


def bar(title: str, total: int, done: int = 0, unit: str = "it") -> "tqdm[Any]":
    """Return a progress bar on stderr: calm where the output is a file, and not shown for what is done at once.

    Of several processes that do one job, only the first shows it.
    """
    interval = 0.5 if sys.stderr.isatty() else 15.0
    others = {"disable": True} if os.environ.get("RANK", "0") != "0" else {}
    return tqdm(
        total=total,
        initial=done,
        desc=f"  {title}",
        unit=unit,
        unit_scale=unit == "B",
        mininterval=interval,
        maxinterval=interval,
        leave=True,
        delay=1,
        **others,
    )
