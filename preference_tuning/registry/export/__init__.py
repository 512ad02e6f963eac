"""A version in other forms: one merged model, a GGUF file, an Ollama model. The registry itself is not changed.

An export is written aside, checked, and put in place in one step. Its ``export.json`` says what it was made of, so that
the same export again finds it finished, and another one does not overwrite it.

    __init__     the three forms
    placing      aside, and in place
    merge        the merged model, by a job of its own
    llama_cpp    GGUF, through the user's llama.cpp
    reading      what a GGUF file says of itself
    ollama       the Modelfile
    templates    chat templates as Go templates
    card         the README of an export
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from preference_tuning.config import BaseModelConfig, RunConfig
from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.models.merging import Precision
from preference_tuning.registry.export import card, llama_cpp, merge, ollama, placing, reading
from preference_tuning.registry.export.llama_cpp import LlamaCpp
from preference_tuning.registry.export.ollama import Prepared
from preference_tuning.registry.folder import MANIFEST, FolderRegistry, Version, differences, weights_hash

Form = Literal["merged", "gguf", "ollama"]
GGUF = "model.gguf"


def export(
    registry: FolderRegistry,
    name: str,
    form: Form,
    folder: Path,
    config: RunConfig | None,
    output_dir: Path,
    outtype: str | None = None,
    llama_cpp: Path | None = None,
    template: Path | None = None,
) -> Path:
    """Write a version in another form and return its folder; at once if it is there already.

    Args:
        registry: that the version is in.
        name: as for ``FolderRegistry.find``.
        form: ``merged``: a model directory as transformers reads it; ``gguf``: one file; ``ollama``: the file and its
            Modelfile.
        folder: a new one, an empty one, or one with this very export.
        config: where the base model is now; None: where the version's own config says.
        output_dir: of the jobs, and of conversions.
        outtype: of the weights; None: bf16 for ``merged``, else f16.
        llama_cpp: folder of llama.cpp; None: LLAMA_CPP_DIR.
        template: a file with a Go template, used as it is; None: the one that renders as the model's own template.

    Raises:
        ConfigError: there is no such version, base model, converter or type, an option does not belong to the form, or
            the folder holds something else.
        PreferenceTuningError: the version is not what was published, or what was written is not the version.
    """
    version = registry.find(name)
    if version is None:
        known = ", ".join(registry.ids()) or "none yet"
        raise ConfigError(f"registry: no version {name!r} of {registry.name!r} in {registry.root}; there are: {known}")
    if llama_cpp is not None and form == "merged":
        raise ConfigError("export: --llama-cpp belongs to --as gguf and --as ollama")
    if template is not None and form != "ollama":
        raise ConfigError("export: --template belongs to --as ollama")
    source, base_model = registry.path(version), config.base_model if config else None
    if form == "merged":
        return merged(source, base_model, folder, output_dir, outtype or "bf16")
    llama, wanted = LlamaCpp(llama_cpp), _Wanted(source, _version(source), base_model, output_dir, outtype or "f16")
    llama.check(wanted.outtype)
    return _gguf(wanted, folder, llama) if form == "gguf" else _ollama(wanted, folder, llama, template)


def merged(
    version_folder: Path,
    base_model: BaseModelConfig | None,
    folder: Path,
    output_dir: Path = Path("outputs"),
    outtype: str = "bf16",
) -> Path:
    """Write a version as one model, as transformers reads it, and return its folder; at once if it is there already.

    Args:
        version_folder: of the version, with its manifest.
        base_model: where the base model is now; None: where the version's own config says.
        folder: a new one, an empty one, or one with this very export.
        output_dir: of the job, and of conversions.
        outtype: ``bf16``, ``f16`` or ``f32``.

    Raises:
        ConfigError: the base model is not there, or the folder holds something else.
        PreferenceTuningError: the version is not what was published, or the merged model computes something else.
    """
    wanted = _Wanted(version_folder, _version(version_folder), base_model, output_dir, outtype)
    if outtype not in merge.PRECISIONS:
        raise ConfigError(f"export: a merged model is one of {', '.join(merge.PRECISIONS)}, and not {outtype}")

    def write(aside: Path) -> dict[str, Any]:
        came = wanted.merge(aside, merge.PRECISIONS[outtype])
        text = card.of_merged(version_folder, wanted.version, outtype, came)
        (aside / card.CARD).write_text(text, encoding="utf-8")
        return came.model_dump(mode="json")

    return placing.put(folder, "merged", wanted.asked, write)


@dataclass(frozen=True)
class _Wanted:
    """Which version is exported, and how its weights are rounded."""

    folder: Path
    version: Version
    base_model: BaseModelConfig | None
    output_dir: Path
    outtype: str

    @property
    def asked(self) -> dict[str, Any]:
        """What decides on the content of an export."""
        version = {"name": self.version.name, "version": self.version.id, "model": weights_hash(self.folder / "model")}
        return {**version, "base_model": self.version.base_model["fingerprint"], "outtype": self.outtype}

    def merge(self, target: Path, dtype: Precision) -> merge.Merged:
        """Write the merged model."""
        return merge.run(self.folder, self.version, self.base_model, target, self.output_dir, dtype)


def _version(folder: Path) -> Version:
    """Return the manifest of a version whose model is what was published.

    Raises:
        PreferenceTuningError: it is not.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise PreferenceTuningError(f"export: {folder} is no version: it has no {MANIFEST}")
    version = Version.model_validate_json(path.read_text(encoding="utf-8"))
    if problems := differences(folder / "model", version.model_files):
        raise PreferenceTuningError(f"export: version {version.id} is not what was published: {problems[0]}")
    return version


def _gguf(wanted: _Wanted, folder: Path, llama: LlamaCpp) -> Path:
    return placing.put(folder, "gguf", wanted.asked, lambda aside: _convert(wanted, aside, llama, None))


def _ollama(wanted: _Wanted, folder: Path, llama: LlamaCpp, template: Path | None) -> Path:
    # Before minutes of work: it needs the tokenizer alone.
    prepared = ollama.prepare(wanted.folder / "model", template)
    asked = {**wanted.asked, "template": prepared.template, "system": prepared.system}

    def write(aside: Path) -> dict[str, Any]:
        made = _convert(wanted, aside, llama, prepared)
        stops = list(dict.fromkeys([*prepared.stops, *made["ends"]]))
        text = ollama.render(wanted.version, prepared, stops, GGUF)
        (aside / ollama.MODELFILE).write_text(text, encoding="utf-8")
        return {**made, "template": prepared.name, "stop": stops}

    return placing.put(folder, "ollama", asked, write)


def _convert(wanted: _Wanted, aside: Path, llama: LlamaCpp, prepared: Prepared | None) -> dict[str, Any]:
    """Write the GGUF file and its card, and return what was found of it."""
    whole = aside / ".merged"
    whole.mkdir()
    came = wanted.merge(whole, llama_cpp.merged_as(wanted.outtype))
    bos = prepared.bos if prepared else None
    if bos is not None:
        ollama.say_bos(whole, bos)
    log = wanted.output_dir / "jobs" / f"export-{wanted.version.id}.log"
    llama.convert(whole, aside / GGUF, wanted.outtype, came.parameters, log)
    if bos is not None:
        reading.set_bos(aside / GGUF, bos)
    found = reading.check(aside / GGUF, whole)
    ends = ollama.end_tokens(whole)
    shutil.rmtree(whole)
    text = card.of_gguf(wanted.folder, wanted.version, wanted.outtype, came, found, GGUF, prepared is not None)
    (aside / card.CARD).write_text(text, encoding="utf-8")
    return {**came.model_dump(mode="json"), "gguf": found.model_dump(), "ends": ends}
