"""What memory held when it ran out: the rows in work, and the longest row that had gone through."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from preference_tuning.jobs import machine_memory

Work = Literal["reference", "training", "evaluation"]

_held: dict[str, Any] = {"rows": 0}
_passed: dict[Work, int] = {}


@contextmanager
def holding(rows: int, longest: int, work: Work) -> Iterator[None]:
    """Note that the block runs ``rows`` rows, the longest of ``longest`` tokens; if it ends well, they went through."""
    _held.update(rows=rows, longest=longest, work=work)
    yield
    _passed[work] = max(_passed.get(work, 0), longest)
    # What fails between two batches is not the fault of either.
    _held.clear()


def facts() -> dict[str, Any]:
    """Return what is known when memory ran out.

    ``rows``, ``longest`` (tokens) and ``work`` of what was held; 0 rows: nothing yet, and none: between batches.
    ``passed``: tokens of the longest row that went through in the same work. ``device`` and its ``bytes``.
    """
    passed = _passed.get(_held.get("work", "training"))
    return {**_held, **({"passed": passed} if passed else {}), **_device()}


def _device() -> dict[str, Any]:
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {"device": device.name, "bytes": device.total_memory}
    return {"device": "the machine", "bytes": machine_memory.of_machine()}
