"""The area ``versions``: what is installed against what is supported, read from metadata; nothing is imported."""

import importlib.metadata
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from preference_tuning import fingerprint
from preference_tuning.errors import ConfigError
from preference_tuning.preflight.findings import Area, Finding
from preference_tuning.preflight.world import World

NAME = "preference-tuning"
NOT_SAID = Requirement("flash-attn"), Requirement("liger-kernel")
"""Packages that are used where they are there; any version is tried."""
BESIDE = ("torch", "torchvision", "liger-kernel")
"""Packages that are told of in any case."""


def areas(world: World) -> Iterator[Finding]:
    """Yield what is wrong with the installed packages."""
    return look(sys.path, _wanted(world))


def look(places: Sequence[str], wanted: dict[str, str]) -> Iterator[Finding]:
    """Yield the findings.

    Args:
        places: folders in which installed packages lie.
        wanted: packages that the config asks for beside the required ones, each with the setting that does.
    """
    area = Area("versions")
    required, extra = _supported()
    installed = _installed(places, [*(requirement.name for requirement in required), *wanted, *BESIDE])
    outside = [line for requirement in required if (line := _outside(requirement, installed))]
    for name, setting in wanted.items():
        requirement = next((r for r in (*extra, *NOT_SAID) if _key(r.name) == _key(name)), Requirement(name))
        if line := _outside(requirement, installed):
            told = ConfigError(f"{setting} needs {name}: {line}")
            yield area.error(told, f"pip install '{requirement.name}{requirement.specifier}'")
    if outside:
        error = ConfigError(f"outside of what is supported: {'; '.join(outside)}")
        yield area.error(error, "pip install -c constraints.txt -e . in a fresh environment")
    else:
        yield area.ok(f"{len(required)} packages are within the supported ranges; torch {installed.get('torch')}")
    yield from _vision(area, installed)
    if "liger-kernel" in installed:
        yield area.ok(f"liger-kernel {installed['liger-kernel']} will be used on CUDA")


def _installed(places: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the packages that are there; only their metadata is read, as there may be hundreds."""
    found = {}
    for name in names:
        if package := next(iter(importlib.metadata.distributions(name=name, path=list(places))), None):
            found[_key(name)] = package.version
    return found


def _wanted(world: World) -> dict[str, str]:
    """Return the packages that settings ask for, with the first such setting."""
    base, found = world.config.base_model, {}
    if base.attention == "flash_attention_2":
        found["flash-attn"] = "base_model.attention: flash_attention_2"
    if base.backend == "unsloth":
        found["unsloth"] = "base_model.backend: unsloth"
    for stage in reversed(world.stages):
        if world.settings(stage).optim.endswith("8bit"):
            found["bitsandbytes"] = f"{stage}.optim: {world.settings(stage).optim}"
    if base.load_in_4bit:
        found["bitsandbytes"] = "base_model.load_in_4bit"
    if world.config.evaluation.lm_eval is not None:
        found["lm-eval"] = "evaluation.lm_eval"
    return found


def _supported() -> tuple[list[Requirement], list[Requirement]]:
    """Return what the installed distribution requires, always and in its extras; else what pyproject.toml says."""
    try:
        lines = importlib.metadata.requires(NAME) or []
    except importlib.metadata.PackageNotFoundError:
        path = fingerprint.PACKAGE.parent / "pyproject.toml"
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"] if path.is_file() else {}
        lines = list(project.get("dependencies", []))
        for extra, names in project.get("optional-dependencies", {}).items():
            lines += [f'{name}; extra == "{extra}"' for name in names]
    parsed = [Requirement(line) for line in lines]
    always = [requirement for requirement in parsed if "extra" not in str(requirement.marker)]
    return always, [requirement for requirement in parsed if requirement not in always]


def _outside(requirement: Requirement, installed: dict[str, str]) -> str | None:
    version = installed.get(_key(requirement.name))
    if version is None:
        return f"{requirement.name} is not installed"
    try:
        inside = requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        inside = False
    return None if inside else f"{requirement.name} {version} (supported: {requirement.specifier})"


def _vision(area: Area, installed: dict[str, str]) -> Iterator[Finding]:
    """Yield what a torchvision of another build does: transformers cannot be imported beside it."""
    vision, torch = installed.get("torchvision"), installed.get("torch")
    if vision is None or torch is None:
        return
    builds = [version.partition("+")[2] for version in (torch, vision)]
    needed = _torch_of(vision)
    if (builds[0] == "cpu") != (builds[1] == "cpu") or (needed and not needed.specifier.contains(Version(torch))):
        error = ConfigError(
            f"torchvision {vision} was built for another torch than the installed {torch}: transformers then cannot be "
            "imported (`operator torchvision::nms does not exist`)"
        )
        same = "--index-url https://download.pytorch.org/whl/cpu " if builds[0] == "cpu" else ""
        yield area.error(error, f"pip uninstall torchvision (nothing here needs it), or pip install {same}torchvision")


def _torch_of(vision: str) -> Requirement | None:
    """Return the torch that the installed torchvision asks for."""
    try:
        lines = importlib.metadata.requires("torchvision") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.name == "torch":
            return requirement
    return None


def _key(name: str) -> str:
    return name.lower().replace("_", "-")
