"""The run config: defaults are the recipe's, every problem is told at once with its line, and nothing is imported."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preference_tuning import config
from preference_tuning.config import beside
from preference_tuning.errors import ConfigError

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))

MINIMAL = "parameters:\n  base_model: {source: org/model}\n  data: {source: rows.jsonl}\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(written(folder, text), overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_load_and_explain_themselves(path: Path) -> None:
    config.load(path)
    assert path.read_text(encoding="utf-8").startswith("# "), "a config opens with its manual"


def test_there_are_shipped_configs() -> None:
    assert {path.stem for path in SHIPPED} >= {"quickstart", "sft", "dpo"}


def test_the_recipe_arrives_whole() -> None:
    """The Handbook's values, in the config that a user starts from; each is written there, not only a default."""
    run = config.load(ROOT / "configs" / "dpo.yaml").config
    lora, sft, dpo = run.lora, run.sft, run.dpo
    assert (lora.rank, lora.alpha, lora.dropout, len(lora.target_modules)) == (32, 32, 0, 7)
    assert (run.base_model.max_seq_length, run.base_model.chat_template, run.data.held_out) == (2048, "chatml", 0.05)
    assert (sft.num_train_epochs, sft.learning_rate, dpo.num_train_epochs, dpo.learning_rate) == (3, 3e-4, 1, 2e-6)
    assert sft.learning_rate / dpo.learning_rate == pytest.approx(150)
    assert (dpo.beta, dpo.length(run.base_model)) == (0.5, 1024)
    for stage in (sft, dpo):
        assert (stage.per_device_train_batch_size, stage.gradient_accumulation_steps) == (2, 8)
        assert (stage.optim, stage.weight_decay, stage.lr_scheduler_type) == ("adamw_8bit", 0.01, "linear")
        assert (stage.warmup_steps, stage.eval_steps, stage.logging_steps) == (10, 0.2, 1)
    assert run.base_model.dtype == "auto"


def test_defaults_are_the_recipe_too() -> None:
    recipe = config.load(ROOT / "configs" / "dpo.yaml").config
    assert config.LoraConfig() == recipe.lora
    assert config.DPOConfig().beta == recipe.dpo.beta
    assert config.SFTConfig().learning_rate == recipe.sft.learning_rate


def test_sft_is_the_default(tmp_path: Path) -> None:
    assert config.load(written(tmp_path, MINIMAL)).config.finetuning_type == "sft"


def test_every_problem_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    told = problems(
        tmp_path,
        """\
parameters:
  finetuning_type: dpo
  base_model: {source: x.gguf, load_in_4bit: true}
  data:
    source: rows.jsonl
    held_out: 5
  dpo:
    betta: 0.5
    beta: true
    loss_type: [sigmoid, ipo2]
modell: {name: x}
model: {name: m, licence: mit}
steps: {train_dp: {}, train_sft: {parameters: {x: 1}}}
dpo: {beta: 1}
""",
    )
    expected = {
        3: "parameters.base_model.load_in_4bit",
        6: "parameters.data.held_out: 5: input should be less than 1",
        8: "parameters.dpo.betta: unknown key; did you mean 'beta'?",
        9: "parameters.dpo.beta: True: true and false are not accepted here",
        10: "parameters.dpo.loss_type",
        11: "modell: unknown key; did you mean 'model'?",
        12: "model.licence: unknown key; did you mean 'license'?",
        13: "steps.train_dp: unknown key; did you mean 'train_dpo'?",
        14: "dpo: unknown key; it belongs under parameters: dpo",
    }
    for line, message in expected.items():
        assert f"run.yaml:{line}: {message}" in told
    assert "steps.train_sft.parameters" in told
    assert told.startswith("10 problems in ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is a mapping"),
        ("- 1\n", "is a mapping"),
        ("a: [1\n", "not valid YAML"),
        ("parameters:\n\t- x\n", "not valid YAML"),
        ("tags: [a]\n", "parameters: is required"),
        ("parameters: 3\n", "parameters: is required"),
        ("parameters: {}\n", "base_model: is required"),
        (MINIMAL + "  dpo: {beta: 0}\n", "greater than 0"),
        (MINIMAL + "  dpo: {beta: -1}\n", "greater than 0"),
        (MINIMAL + "  dpo: {beta: .nan}\n", "finite"),
        (MINIMAL + "  dpo: {beta: .inf}\n", "finite"),
        (MINIMAL + "  dpo: {beta: high}\n", "valid number"),
        (MINIMAL + "  dpo: {beta: 0.1}\n  dpo: {beta: 0.2}\n", "appears twice (first on line 4)"),
        (MINIMAL + "  sft: {learning_rate: 1e10}\n", "less than 1"),
        (MINIMAL + "  sft: {weight_decay: -3}\n", "greater than or equal to 0"),
        (MINIMAL + "  sft: {num_train_epochs: -1}\n", "greater than 0"),
        (MINIMAL + "  sft: {gradient_accumulation_steps: 0}\n", "greater than or equal to 1"),
        (MINIMAL + "  sft: {warmup_steps: 2.5}\n", "whole number of steps"),
        (MINIMAL + "  sft: {lr_scheduler_type: constant, warmup_steps: 5}\n", "sft.warmup_steps: has no effect with lr_scheduler_type constant"),
        (MINIMAL + "  evaluation: {gate: {primary: judge/win_rate}}\n", "judge/win_rate needs a judge"),
        (MINIMAL + "  dpo: {label_smoothing: 0.1}\n", "has no effect with loss_type sigmoid"),
        (MINIMAL + "  dpo: {loss_type: exo_pair}\n", "must be above 0"),
        (MINIMAL + "  dpo: {loss_type: [sigmoid, sft], loss_weights: [1.0]}\n", "1 weights for 2"),
        (MINIMAL + "  dpo: {max_length: 4096}\n", "more than base_model.max_seq_length"),
        (MINIMAL + "  dpo: {max_prompt_length: 64}\n", "unknown key here; there is data.max_prompt_length"),
        (MINIMAL.replace("source: rows", "max_prompt_length: 2000, source: rows"), "2000 is more than a whole DPO row may have"),
        (MINIMAL.replace("{source: rows.jsonl}", "{}"), "data.source: is required: one source here, or several"),
        (MINIMAL.replace("{source: rows.jsonl}", "{sources: [{sauce: a}]}"), "data.sources.0.sauce: unknown key; did you mean 'source'?"),
        (MINIMAL.replace("}\n", ", sources: [{source: a}]}\n"), "belongs to each of data.sources"),
        (MINIMAL.replace("{source: rows.jsonl}", "{sources: [{source: a}, {source: a}]}"), "two of them are called the same"),
        (MINIMAL.replace("rows.jsonl", "rows.jsonl, format: separated"), "is needed with format separated"),
        (MINIMAL.replace("rows.jsonl", "rows.jsonl, problems: {missing: keep}"), "'drop' or 'error'"),
        (MINIMAL + "  lora: {target_modules: [lm_head]}\n", "lm_head cannot be adapted"),
        (MINIMAL + "  lora: {target_modules: []}\n", "at least one module"),
        (MINIMAL + "  registry: {name: ../evil}\n", "must start with a letter or digit"),
        (MINIMAL + "  finetuning_type: kto\n", "'sft' or 'dpo'"),
        (MINIMAL + "retry: {max_retries: 3}\n", "retry: ZenML would also retry after a signal"),
        (MINIMAL + "steps: {train_sft: {retry: {max_retries: 3}}}\n", "steps.train_sft.retry: ZenML would also retry"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdef", "bcdefg")), "aliases expand"),
        ("parameters: " + "[" * 3000 + "]" * 3000, "not valid YAML"),
        ("parameters: !!python/object/apply:os.system [echo]\n", "parameters"),
    ],
)  # fmt: skip
def test_bad_configs_get_a_clear_message(tmp_path: Path, text: str, message: str) -> None:
    assert message in problems(tmp_path, text)


def test_numbers_are_numbers(tmp_path: Path) -> None:
    """PyYAML reads 2e-6 as text; `on` and `yes` as truth values."""
    run = config.load(written(tmp_path, MINIMAL + "  dpo: {learning_rate: 2e-6}\n  tracking: {tags: [on, yes]}\n"))
    assert run.config.dpo.learning_rate == 2e-6
    assert run.config.tracking.tags == ("on", "yes")


def test_overrides(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL)
    run = config.load(path, ["dpo.beta=0.3", "finetuning_type=dpo", "tags=[night]"])
    assert (run.config.dpo.beta, run.config.finetuning_type) == (0.3, "dpo")
    assert run.document["tags"] == ["night"]
    assert "--set: parameters.dpo.bta: unknown key; did you mean 'beta'?" in problems(tmp_path, MINIMAL, "dpo.bta=1")
    assert "write it as NAME=VALUE" in problems(tmp_path, MINIMAL, "dpo.beta")


def test_missing_file_names_what_is_there(tmp_path: Path) -> None:
    written(tmp_path, MINIMAL)
    with pytest.raises(ConfigError, match=r"no such run config: .*runn\.yaml \(there are .*run\.yaml\)"):
        config.load(tmp_path / "runn.yaml")


def test_a_bad_config_is_answered_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "  dpo: {betta: 1}\n")
    start = time.monotonic()
    done = subprocess.run([sys.executable, "run.py", "train", str(path)], cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - start
    assert done.returncode == 2
    assert "did you mean 'beta'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < 5, "1.5 s on a quiet machine"
    heavy = "import sys, preference_tuning.config; print([m for m in ('torch', 'zenml', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", heavy], cwd=ROOT, text=True).strip() == "[]"


def test_the_copies_of_zenmls_keys_are_current() -> None:
    from zenml.config.pipeline_run_configuration import PipelineRunConfiguration
    from zenml.config.schedule import Schedule
    from zenml.config.step_configurations import StepConfigurationUpdate
    from zenml.model.model import Model

    internal = {"model_version_id", "suppress_class_validation_warnings"}
    for model, keys in (
        (PipelineRunConfiguration, beside.ZENML_KEYS),
        (Schedule, beside.ZENML_SCHEDULE_KEYS),
        (StepConfigurationUpdate, beside.ZENML_STEP_KEYS),
        (Model, beside.ZENML_MODEL_KEYS),
    ):
        assert set(model.model_fields) - internal == set(keys), model.__name__


words = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
trees = st.recursive(words, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=12)  # fmt: skip
sections = st.dictionaries(st.sampled_from([*config.RunConfig.model_fields, "dpoo"]), trees, max_size=5)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(parameters=sections, rest=st.dictionaries(st.sampled_from(["model", "steps", "retry", "x"]), trees, max_size=2))
def test_no_config_ends_in_a_traceback(tmp_path: Path, parameters: dict[str, object], rest: dict[str, object]) -> None:
    import yaml

    path = written(tmp_path, yaml.safe_dump({"parameters": parameters, **rest}))
    with pytest.raises(ConfigError):
        config.load(path)
