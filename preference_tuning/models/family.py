"""The base model and the models tuned from it, in turn: adapters share its weights, full models take its place."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from preference_tuning.config import BaseModelConfig
from preference_tuning.models import loading, weights
from preference_tuning.models.compute import Compute
from preference_tuning.models.source import ModelSource


class Family:
    """Models to be read from. There is never more than one set of full weights in memory."""

    def __init__(
        self,
        config: BaseModelConfig,
        source: ModelSource,
        output_dir: Path,
        compute: Compute,
        tuned: dict[str, Path],
    ) -> None:
        """Load the base model, and the adapters on it if all that is in ``tuned`` are adapters.

        Args:
            config: the section of the run config.
            source: where the base model lies.
            output_dir: where conversions are kept.
            compute: what the models run on.
            tuned: the folder of each tuned model, by name.
        """
        self._where = config, source, output_dir, compute
        self._tuned = tuned
        self.shares = all(map(weights.is_adapter, tuned.values()))
        self._loaded: str | None = None
        self.base = loading.load_base(*self._where, full=not self.shares)
        self._model: Any = loading.load_adapters(self.base, tuned) if self.shares else self.base.model.eval()

    @contextmanager
    def member(self, name: str | None) -> Iterator[Any]:
        """Yield the tuned model of this name, or the base model for None; it is that model until the context ends."""
        if not self.shares:
            self._load(name)
            yield self._model
        elif name is None:
            with self._model.disable_adapter():
                yield self._model
        else:
            self._model.set_adapter(name)
            yield self._model

    def _load(self, name: str | None) -> None:
        if name == self._loaded:
            return
        # Let go of the model before the next one is read.
        self._model = self.base.model = nn.Identity()
        gc.collect()
        self.base = loading.load_base(*self._where, full=True, tuned=self._tuned[name] if name else None)
        self._model = loading.load_policy(self.base) if name else self.base.model
        self._model.eval()
        self._loaded = name
