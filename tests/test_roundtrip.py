"""A published model is loaded again and must compute what was measured; what was forged or changed is named."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import preference_rows, tiny_parameters
from in_process import Lab
from safetensors.torch import load_file, save_file
from test_verdicts import mend, rewrite

from preference_tuning.config import RegistryConfig, RunConfig
from preference_tuning.evaluation import probes as probes_of
from preference_tuning.registry import roundtrip
from preference_tuning.registry.folder import FolderRegistry

PRECISIONS = ("float32", "bfloat16")


class Published:
    """A registry with one version, and the lab that made it."""

    def __init__(self, lab: Lab, dtype: str) -> None:
        rows = lab.rows("rows", [{**row, "topic": None} for row in preference_rows(48)])
        self.lab, self.registered = lab, lab.run(data={"source": rows}, base_model={"dtype": dtype})[1]

    def copy(self, folder: Path) -> tuple[FolderRegistry, Path]:
        """Return a copy of the registry, and the folder of its version."""
        shutil.copytree(self.lab.registry.root, folder / "registry")
        registry = FolderRegistry(RegistryConfig(folder=str(folder / "registry")))
        return registry, registry.path(self.registered.version.id)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[dict[str, Published]]:
    """One version trained and measured in each precision."""
    with pytest.MonkeyPatch.context() as patch:
        made = {}
        for dtype in PRECISIONS:
            parameters = tiny_parameters(tiny_model, Path("none"))
            parameters["finetuning_type"] = "sft"
            parameters["base_model"] |= {"threads": 1, "device": "cpu"}
            parameters["data"] = {"held_out": 0.25}
            parameters["evaluation"]["samples"] = 0
            made[dtype] = Published(Lab(tmp_path_factory.mktemp(dtype), parameters, patch), dtype)
        yield made


def look(published: Published, registry: FolderRegistry, config: RunConfig | None = None) -> Any:
    return roundtrip.verify(registry, published.registered.version.id, config, published.lab.folder / "outputs")


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_what_was_published_computes_what_was_measured(published: dict[str, Published], dtype: str) -> None:
    made = published[dtype]
    found = look(made, made.lab.registry)
    assert str(found).splitlines()[-1] == "holds", str(found)
    print(found)
    assert False
