"""ZenML's models after a verb of the registry that moved a pointer or removed versions."""

import sys

from preference_tuning.registry.folder import FolderRegistry
from steps import models


def follow(registry: FolderRegistry) -> None:
    """Bring ZenML's stages to what the registry says; whatever keeps it from that is a warning, as the verb is done."""
    try:
        models.follow(registry)
    except Exception as error:  # ZenML raises anything, from a database that is locked to a server that is gone
        reason = (str(error).splitlines() or [""])[0]
        print(
            f"warning: ZenML's stages do not follow yet ({type(error).__name__}: {reason}); the next run or verb of "
            "the registry repairs them",
            file=sys.stderr,
        )
