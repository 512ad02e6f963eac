"""Progress of anything that takes over ten seconds."""

import sys
from typing import Any

from tqdm import tqdm


def bar(title: str, total: int, done: int = 0) -> "tqdm[Any]":
    """Return a progress bar on stderr that is calm where the output is a file."""
    interval = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm(total=total, initial=done, desc=f"  {title}", mininterval=interval, maxinterval=interval, leave=True)
