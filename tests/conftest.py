"""Shared parts of the tests: a tiny model built in the process, preference rows, and a copy of the project to run.

Groups that the default run leaves out: `faults` injects failures into training jobs, `whole` runs the pipeline in rarer
ways, `quickstart` takes the real model (minutes), `gpu` needs one. Nothing here needs a network or an account.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from comet_server import CometServer
from registries import s3, use

ROOT = Path(__file__).parent.parent
LONGEST = {name: i for i, name in enumerate(("test_pipeline.py", "test_faults_pipeline.py", "test_faults_jobs.py"))}
PARTS = ("preference_tuning", "pipelines", "steps", "configs", "run.py")

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", ZENML_ANALYTICS_OPT_IN="false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files: a worker takes a file as a whole, and must not be left alone with one at the end."""
    items.sort(key=lambda item: LONGEST.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True)
def no_accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own keys must not reach a test."""
    for name in ("COMET_API_KEY", "COMET_URL_OVERRIDE", "COMET_WORKSPACE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def comet() -> Iterator[CometServer]:
    """A Comet on this machine."""
    server = CometServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 0.9M parameters with a ChatML tokenizer trained on the fly, as a model directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from preference_tuning.models.chat import CHATML

    folder = tmp_path_factory.mktemp("tiny-model")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [text for row in preference_rows(200) for text in (row["prompt"], row["chosen"], row["rejected"])]
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML.replace("END", "<|im_end|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def diverging_model(folder: Path, model: Path) -> Path:
    """Copy a model and make its last norm nan, so that training on it diverges at once."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def preference_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs whose preference is learnable by anything: plain answers over shouted ones."""
    rng = random.Random(seed)
    things = ["bread", "rain", "a train", "the moon", "an oak", "salt", "a clock", "wool"]
    return [
        {
            "prompt": f"Tell me about {rng.choice(things)}, part {i}.",
            "chosen": f"It is {rng.choice(['plain', 'old', 'useful', 'common'])} and number {i % 7}.",
            "rejected": f"WELL WELL WELL {rng.choice(['WHO', 'WHAT', 'WHY'])} KNOWS, {i % 5}!",
            "topic": things[i % len(things)],
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_parameters(model: Path, data: Path) -> dict[str, Any]:
    """The parameters of a run that takes seconds."""
    stage = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "warmup_steps": 0.1}
    return {
        "finetuning_type": "dpo",
        "base_model": {"source": str(model), "max_seq_length": 128, "dtype": "float32"},
        "lora": {"rank": 8, "alpha": 16},
        "data": {"source": str(data), "held_out": 0.25},
        "sft": {**stage, "num_train_epochs": 1, "learning_rate": 3.0e-3},
        "dpo": {**stage, "num_train_epochs": 2, "learning_rate": 3.0e-3, "beta": 0.1, "max_length": 128},
        "evaluation": {"samples": 2, "max_new_tokens": 8, "gate": {"min_prompts": 5, "max_nll_increase": 5.0}},
    }


AIRFLOW = """
from zenml.client import Client
from zenml.enums import StackComponentType
client = Client()
client.create_stack_component("air", "airflow", StackComponentType.ORCHESTRATOR, {"local": True})
parts = {StackComponentType.ORCHESTRATOR: "air", StackComponentType.ARTIFACT_STORE: "default"}
print(client.create_stack("flying", parts).id)
"""


@dataclass
class Project:
    """A copy of the project in a folder of its own, with its own ZenML store."""

    folder: Path

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the project as a user would."""
        settings = {**self.environment(), **environment}
        return subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=settings, capture_output=True, text=True, timeout=280
        )

    def environment(self) -> dict[str, str]:
        """Return the environment of the project's commands."""
        return {
            **os.environ,
            "PYTHONPATH": str(self.folder),
            "ZENML_CONFIG_PATH": str(self.folder.parent / "zenml"),
            "TQDM_DISABLE": "1",
        }

    def train(self, config: str = "run.yaml", *options: str) -> subprocess.CompletedProcess[str]:
        """Run the pipeline and expect it to succeed."""
        done = self.run("run.py", "train", config, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def airflow_stack(self, **environment: str) -> str:
        """Make a stack whose orchestrator is Airflow, and return its id; it is not the active one."""
        # ZenML looks for the main module's file.
        (self.folder / "flying.py").write_text(AIRFLOW, encoding="utf-8")
        done = self.run("flying.py", **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    def last_runs(self, count: int) -> list[dict[str, Any]]:
        """Return what ZenML stored of the last runs, the newest first; in one process, because zenml imports slowly."""
        script = f"""
import json
from zenml.client import Client
runs = []
for run in Client().list_pipeline_runs(sort_by="desc:created", size={count}, hydrate=True).items:
    steps = {{n: {{"status": s.status.value, "metadata": {{k: str(v) for k, v in s.run_metadata.items()}},
             "outputs": {{o: str(a[0].uri) for o, a in s.outputs.items()}}}} for n, s in run.steps.items()}}
    runs.append({{"id": run.id.hex, "name": run.name, "status": run.status.value, "steps": steps}})
print("\\n" + json.dumps(runs))
"""
        done = self.run("-c", script, ZENML_LOGGING_VERBOSITY="ERROR")
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
        return found

    def last_run(self) -> dict[str, Any]:
        """Return what ZenML stored of the last run."""
        return self.last_runs(1)[0]

    def configure(self, change: Callable[[dict[str, Any]], None], name: str = "run.yaml") -> None:
        """Write the run config anew after ``change`` to its parameters."""
        path = self.folder / name
        document = yaml.safe_load((self.folder / "run.yaml").read_text(encoding="utf-8"))
        change(document["parameters"])
        path.write_text(yaml.safe_dump(document), encoding="utf-8")


def make_project(folder: Path, model: Path, rows: int = 64) -> Project:
    """Copy the project and give it a tiny run config."""
    project = Project(folder / "project")
    project.folder.mkdir(parents=True)
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, project.folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, project.folder / part)
    data = write_jsonl(project.folder / "rows.jsonl", preference_rows(rows))
    document = {"parameters": tiny_parameters(model, data)}
    (project.folder / "run.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return project


def statuses(run: dict[str, Any]) -> dict[str, str]:
    """Return the status of each step of a run."""
    return {name: step["status"] for name, step in run["steps"].items()}


@dataclass
class Finished:
    """A project in which one DPO run is done: what the terminal showed, and what ZenML stored of the run."""

    project: Project
    shown: str
    run: dict[str, Any]


CANARIES = {
    "HF_TOKEN": "hf_canaryOfTheHubAAAAAAAAAA",
    "OPENAI_API_KEY": "sk-canary-of-the-judge-AAAAAAAA",
    "AWS_SECRET_ACCESS_KEY": "canaryOfTheCloudAAAAAAAAAAAAAAAAA",
    "command line": "canaryOfTheCommandLine",
    "git remote": "canaryOfTheRemote",
}
"""Secrets that lie around where the finished run works; none may be written down."""


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Finished:
    """One DPO run on the tiny model, shared by the tests; later runs in its folder find it in the step cache."""
    project = make_project(tmp_path_factory.mktemp("finished"), tiny_model)
    me = ("-c", "user.name=Canary", "-c", "user.email=canary@example.org")
    for command in (
        ("init", "--quiet"),
        ("remote", "add", "origin", f"https://me:{CANARIES['git remote']}@example.org/tuning.git"),
        ("add", "."),
        (*me, "commit", "--quiet", "--message", "The project"),
    ):
        subprocess.run(["git", "-C", str(project.folder), *command], check=True)
    secrets = {name: value for name, value in CANARIES.items() if name.isupper()}
    done = project.run("-X", f"note={CANARIES['command line']}", "run.py", "train", "run.yaml", **secrets)
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(project, done.stdout, project.last_run())


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """The address of a server that speaks S3."""
    with s3() as address:
        yield address


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An empty bucket, as a URL; the environment says how it is reached."""
    return use(s3_server, monkeypatch, tmp_path)
