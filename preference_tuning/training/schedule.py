"""When in a training something happens; needs neither torch nor transformers."""

import itertools


def steps_of_share(share: float, total: int) -> set[int]:
    """Return the steps at which each full ``share`` of ``total`` steps is done; always the last one."""
    # What is left after the last full share counts as the end if it is less than a tenth of a share.
    parts = itertools.takewhile(lambda done: done < 1 - share / 10, (share * i for i in itertools.count(1)))
    return {total, *(max(1, round(total * done)) for done in parts)}
