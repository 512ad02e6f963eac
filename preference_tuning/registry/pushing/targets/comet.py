"""Comet's model registry: the adapter's files on the run's experiment, registered under a number of their own."""

import json
from collections.abc import Callable
from pathlib import Path

from preference_tuning import fingerprint
from preference_tuning.config import RegistryConfig
from preference_tuning.config.registry import CometPush
from preference_tuning.errors import ConfigError, PreferenceTuningError, TransientError
from preference_tuning.registry.labels import description, labels
from preference_tuning.registry.pushing import Bundle, Pending
from preference_tuning.tracking import account, comet_models

LARGEST = 2 * 2**30
"""Bytes of a version that are uploaded whole; of a larger one Comet gets all but the weights, and their hashes."""
WEIGHTS, HASHES = ".safetensors", "files.json"
CONTINUE = "`run.py registry push` goes on"


class CometTarget:
    """The registered model that versions become versions of."""

    def __init__(self, entry: CometPush, registry: RegistryConfig) -> None:
        self.when = entry.when
        self._name = comet_models.proper_name(entry.name or registry.name)

    @property
    def key(self) -> str:
        """Where it is; the workspace is that of the run."""
        return f"comet:{self._name}"

    @property
    def settings(self) -> dict[str, object]:
        """What decides on what arrives there."""
        return {"name": self._name}

    def check(self) -> str:
        """Look whether there is a key and Comet knows it; that Comet is out of reach now stops nothing.

        Raises:
            ConfigError: there is none, or Comet does not know it.
        """
        try:
            user = account.user_of_key()
        except ConfigError as error:
            raise ConfigError(f"registry.push to comet: {error}") from None
        except TransientError as error:
            return f"comet: {error}; versions wait for it, then {CONTINUE}"
        return f"comet: the key is that of {user}; versions go to model {self._name!r}"

    def push(self, bundle: Bundle, done: dict[str, str], note: Callable[[dict[str, str]], None]) -> dict[str, str]:
        """Make Comet have the version once, and let its tags and status follow the champion.

        Raises:
            Pending: there is no key, or Comet does not answer.
            PreferenceTuningError: Comet refuses.
        """
        model = self._model(bundle)
        note({"experiment": model.experiment, "model": model.name})
        try:
            found = comet_models.look(model)
            if found.number is None:
                found = comet_models.send(model)
        except ConfigError as error:
            raise Pending(f"{error}; with a key that it accepts {CONTINUE}") from None
        except TransientError as error:
            raise Pending(f"{error}; when it answers again {CONTINUE}") from None
        if found.number is None:
            raise PreferenceTuningError("Comet has not registered the version")
        return {
            "model": model.name,
            "workspace": found.workspace,
            "number": found.number,
            "status": found.status,
            "files": str(len(model.files)),
        }

    def _model(self, bundle: Bundle) -> comet_models.Model:
        version = bundle.version
        tracking = version.config.get("tracking", {})
        known = labels(version)
        return comet_models.Model(
            name=self._name,
            version=version.id,
            champion=bundle.champion,
            # Without one the version gets an experiment of its own.
            experiment=version.run.get("comet_experiment") or fingerprint.of_value(["comet", version.id])[:32],
            workspace=tracking.get("workspace"),
            project=tracking.get("project"),
            tags=[version.id, version.finetuning_type, known["verdict"]],
            comment=description(bundle.folder),
            files=_files(bundle),
        )


def _files(bundle: Bundle) -> dict[str, Path]:
    """Return the files that are uploaded, by name."""
    files = {name: bundle.folder / name for name in sorted(bundle.version.model_files)}
    if sum(path.stat().st_size for path in files.values()) <= LARGEST:
        return files
    hashes = bundle.aside / HASHES
    hashes.parent.mkdir(parents=True, exist_ok=True)
    hashes.write_text(json.dumps(bundle.version.model_files, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {name: path for name, path in files.items() if not name.endswith(WEIGHTS)} | {HASHES: hashes}
