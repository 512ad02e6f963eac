"""The model that a new one has to beat, ready to be scored beside it."""

from preference_tuning import fingerprint
from preference_tuning.data.table import SPLIT
from preference_tuning.errors import PreferenceTuningError
from preference_tuning.evaluation.job import Champion
from preference_tuning.registry.folder import FolderRegistry
from preference_tuning.registry.pointers import Pointer


def to_beat(registry: FolderRegistry, candidate: str) -> Champion | None:
    """Return the champion that a version, published or yet to be, has to beat, or None if there is none.

    Of a model that is the champion itself it is the one before: it was judged against that one, and is again.

    Raises:
        PreferenceTuningError: the champion's files are not what was published; a model is never judged without it.
    """
    reigning: Pointer | None = registry.champion()
    if reigning is not None and reigning.version == candidate:
        reigning = registry.previous()
    if reigning is None:
        return None
    if problems := registry.verify(reigning.version):
        raise PreferenceTuningError(
            f"registry: the champion {reigning.version} of {registry.name!r} is not what was published "
            f"({'; '.join(problems)}), so no model can be compared with it; restore its folder"
        )
    version, folder = registry.version(reigning.version), registry.path(reigning.version)
    return Champion(
        version=version.id,
        finetuning_type=version.finetuning_type,
        folder=folder / "model",
        hash=fingerprint.of_value(version.model_files),
        base_model_fingerprint=version.base_model["fingerprint"],
        split=folder / "evidence" / "data" / SPLIT,
    )
