"""The direction of dependencies and the one-owner rule, read off the import statements."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from preference_tuning import fingerprint

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "preference_tuning"
HUB = "registry/pushing/targets/huggingface"
OWNERS = {
    "comet_ml": {"tracking/comet.py", "tracking/comet_models.py"},
    "duckdb": {"data/across.py"},
    "fsspec": {"registry/storage/remote.py"},
    "httpx": {
        "data/sources/origins.py",
        "evaluation/judge/client.py",
        "hub.py",
        "notifying/receivers.py",
        "tracking/account.py",
        f"{HUB}/client.py",
    },
    "huggingface_hub": {"hub.py", "registry/card.py", f"{HUB}/__init__.py", f"{HUB}/client.py", f"{HUB}/repository.py"},
    "lm_eval": {"evaluation/harness.py"},
    "mlflow": {"registry/pushing/targets/mlflow.py"},
    "peft": {"models/fused.py", "models/loading.py"},
    "bitsandbytes": set(),
    "liger_kernel": {"models/kernels.py"},
    "unsloth": {"models/backend.py", "models/loading.py"},
    "s3fs": set(),
    "trl": {"training/arguments.py", "training/trainers.py"},
}
# What a room may import, beside the ground that every room stands on.
GROUND = {"errors", "events", "failures", "fingerprint", "jobs", "progress", "reports", "hub", "config", "continuing"}
ROOMS = {
    "errors": set(),
    "commandline": set(),
    "continuing": {"errors"},
    "interruption": set(),
    "events": {"config"},
    "failures": {"errors"},
    "fingerprint": set(),
    "progress": set(),
    "reports": set(),
    "config": {"errors"},
    "hub": {"errors", "failures"},
    "jobs": {"errors", "events", "failures", "fingerprint"},
    "models": GROUND,
    "data": GROUND | {"models"},
    "tracking": GROUND,
    "training": GROUND | {"data", "models", "tracking"},
    "evaluation": GROUND | {"data", "models", "tracking"},
    "registry": GROUND | {"data", "models", "tracking", "training", "evaluation"},
    "tracked": GROUND | {"data", "tracking", "training", "evaluation", "registry"},
    "retraining": GROUND | {"data", "models", "evaluation", "registry"},
    "notifying": GROUND | {"evaluation", "registry", "retraining"},
    "preflight": GROUND | {"notifying", "data", "models", "tracking", "training", "evaluation", "registry"},
    "inspection": GROUND | {"data", "models"},
    "scheduling": {"config", "errors"},
    "assessment": GROUND | {"data", "models", "tracking", "training", "evaluation", "registry", "preflight"},
}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sources("preference_tuning"), ids=lambda p: p.relative_to(LIBRARY).as_posix())
def test_the_library_imports_downwards_only(path: Path) -> None:
    names = imports(path)
    assert not {name for name in names if name.split(".")[0] in {"zenml", "steps", "pipelines", "run"}}
    room = room_of(path)
    if room == "__init__":
        return
    own = {name.split(".")[1] for name in names if name.startswith("preference_tuning.") and name.count(".") > 0}
    assert own - {room, "__version__"} <= ROOMS[room], f"{room} may not import {own - ROOMS[room]}"
    for service, owners in OWNERS.items():
        if any(name.split(".")[0] == service for name in names):
            assert path.relative_to(LIBRARY).as_posix() in owners, f"{service} has one owner"


def test_steps_do_not_import_each_other() -> None:
    shared = {"steps.answers", "steps.artifacts", "steps.context", "steps.models"}
    for path in sources("steps"):
        used = {".".join(name.split(".")[:2]) for name in imports(path) if name.startswith("steps.")}
        assert used <= shared, path.name
        assert not [name for name in imports(path) if name.startswith("pipelines")]


def test_steps_are_thin() -> None:
    for path in sources("steps"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("step" in ast.unparse(d) for d in node.decorator_list):
                assert len(node.body) <= 15, f"{path.name} has logic in it"


def test_modules_import_without_torch_where_the_pipeline_process_needs_them() -> None:
    """The ZenML process stays free of torch, also after what ZenML does before each run."""
    code = """
import sys
from zenml.utils import source_utils
source_utils.set_custom_source_root('.')
import pipelines.training
from zenml.environment import get_run_environment_dict
from zenml.integrations.registry import integration_registry
integration_registry.activate_integrations()
print([name for name in ('torch', 'transformers', 'trl', 'pandas', 'scipy.stats') if name in sys.modules])
print(integration_registry.select_integration_requirements('pytorch'))
installed = get_run_environment_dict()['python_packages'].splitlines()
print([line for line in installed if line.startswith('torch==')])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded, required, torch = done.stdout.strip().splitlines()[-3:]
    assert loaded == "[]"
    assert required == "['torch']"
    assert torch == str([f"torch=={version('torch')}"])


def test_the_sources_of_a_job_are_found_by_every_import_in_them() -> None:
    for path in sources("preference_tuning"):
        assert set(fingerprint._imported(path)) >= {n for n in imports(path) if n.startswith("preference_tuning")}, path


def test_the_readme_names_what_exists() -> None:
    import re

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path
    for config in re.findall(r"configs/[\w-]+\.yaml", text):
        assert (ROOT / config).is_file(), config
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"make ([a-z-]+)", text)) <= set(targets)
