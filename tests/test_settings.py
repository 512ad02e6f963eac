"""Every field of the run config arrives: changing it changes what it should, and no field is without its proof.

The stages' settings are looked at in jobs that really run, in this process, with a watch beside the training loop.
The data section is in test_settings_data.py, the losses are in test_losses.py.
"""

import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import preference_rows, write_jsonl
from fields import exists, paths

from preference_tuning import config
from preference_tuning.config import RunConfig
from preference_tuning.data import job as data_job
from preference_tuning.data import prepare
from preference_tuning.data.table import Dataset
from preference_tuning.models.source import locate
from preference_tuning.tracking.comet import Comet, CometRun
from preference_tuning.tracking.spool import read
from preference_tuning.training import job

PROVED_BY = {
    "finetuning_type": "test_pipeline.py::test_zenmls_own_command_runs_sft_without_a_dpo_step",
    "output_dir": "test_settings_world.py::test_where_things_go",
    "base_model.source": "test_settings_world.py::test_the_revision_of_a_hub_model_is_what_is_loaded",
    "base_model.revision": "test_settings_world.py::test_the_revision_of_a_hub_model_is_what_is_loaded",
    "base_model.backend": "test_settings_world.py::test_unsloth_is_loaded_with_the_settings",
    "base_model.device": "test_settings_world.py::test_device",
    "base_model.dtype": "test_settings_world.py::test_dtype",
    "base_model.load_in_4bit": "test_settings_world.py::test_four_bits",
    "base_model.max_seq_length": "test_settings.py::test_rows_are_cut_to_their_stages_length",
    "base_model.chat_template": "test_settings_world.py::test_the_chat_template_makes_the_tokens",
    "lora.rank": "test_settings_world.py::test_the_adapter_is_the_one_asked_for",
    "lora.alpha": "test_settings_world.py::test_the_adapter_is_the_one_asked_for",
    "lora.dropout": "test_settings_world.py::test_the_adapter_is_the_one_asked_for",
    "lora.target_modules": "test_settings_world.py::test_the_adapter_is_the_one_asked_for",
    "sft.seed": "test_settings.py::test_the_seed_gives_the_order_and_the_adapter",
    "dpo.seed": "test_settings.py::test_the_seed_gives_the_order_and_the_adapter",
    "dpo.beta": "test_losses.py::test_a_loss_by_hand",
    "dpo.loss_type": "test_losses.py::test_a_loss_by_hand",
    "dpo.loss_weights": "test_losses.py::test_a_sum_of_losses_by_hand",
    "dpo.label_smoothing": "test_losses.py::test_a_loss_by_hand",
    "dpo.max_length": "test_settings.py::test_rows_are_cut_to_their_stages_length",
    "dpo.engine": "test_training.py::test_an_engine_that_cannot_run_is_an_error_and_stock_trl_can_be_chosen",
    "evaluation.batch_size": "test_settings_world.py::test_an_evaluation_is_the_one_asked_for",
    "evaluation.samples": "test_settings_world.py::test_an_evaluation_is_the_one_asked_for",
    "evaluation.max_new_tokens": "test_settings_world.py::test_an_evaluation_is_the_one_asked_for",
    "evaluation.seed": "test_settings_world.py::test_an_evaluation_is_the_one_asked_for",
    "evaluation.min_pairs": "test_settings_world.py::test_each_rule_follows_its_limit",
    "evaluation.min_accuracy": "test_settings_world.py::test_each_rule_follows_its_limit",
    "evaluation.max_nll_increase": "test_settings_world.py::test_each_rule_follows_its_limit",
    "evaluation.champion_tolerance": "test_settings_world.py::test_each_rule_follows_its_limit",
    "registry.folder": "test_settings_world.py::test_where_things_go",
    "registry.name": "test_settings_world.py::test_where_things_go",
    "tracking.mode": "test_tracking.py::test_the_mode_follows_the_key",
    "tracking.project": "test_settings_world.py::test_comet_is_told_where",
    "tracking.workspace": "test_settings_world.py::test_comet_is_told_where",
    "tracking.tags": "test_settings_world.py::test_comet_is_told_where",
}
"""A field, and the test that has been read and shows its effect; the fields of ``STAGE`` are proved here."""

TRAIN = 32
"""Rows that are trained on."""


class Case(NamedTuple):
    """A setting of a stage in two runs, and what has to be seen in each of them."""

    one: Any
    other: Any
    look: Callable[["Watched"], Any]
    in_one: Any
    in_other: Any


# 32 rows by 4 are 8 optimizer steps; 2.5 epochs of 32 rows by 2 by 4 are 10.
STAGE = {
    "num_train_epochs": Case(1, 2.5, lambda run: run.epochs, 1, 2.5),
    "learning_rate": Case(1e-3, 2e-3, lambda run: max(run.rates), 1e-3, 2e-3),
    "per_device_train_batch_size": Case(4, 2, lambda run: set(run.batches["train"]), {4}, {2}),
    "gradient_accumulation_steps": Case(1, 4, lambda run: (run.steps, run.batches_a_step), (8, 1), (10, 4)),
    "per_device_eval_batch_size": Case(8, 3, lambda run: max(run.batches["held_out"]), 8, 3),
    "optim": Case("adamw_torch", "auto", lambda run: run.optimizer, ("AdamW", False), ("AdamW", True)),
    "weight_decay": Case(0.0, 0.3, lambda run: run.decay_of_all, 0.0, 0.3),
    "lr_scheduler_type": Case(
        "linear", "cosine", lambda run: [rate / max(run.rates) for rate in run.rates[run.rates.index(max(run.rates)) :]],
        [1 - i / 6 for i in range(6)], [(1 + math.cos(math.pi * i / 7)) / 2 for i in range(7)],
    ),
    # The rate rises from 0; the first step at the full rate is the one after the warm-up.
    "warmup_steps": Case(2, 0.3, lambda run: run.rates.index(max(run.rates)), 2, 3),
    "max_grad_norm": Case(1000, 0.01, lambda run: max(run.norms) <= 0.01 + 1e-6, False, True),
    "logging_steps": Case(1, 3, lambda run: run.logged, [1, 2, 3, 4, 5, 6, 7, 8], [3, 6, 9, 10]),
    "eval_steps": Case(0.5, 0.2, lambda run: run.evaluated, [4, 8], [2, 4, 6, 8, 10]),
    "save_steps": Case(0.25, 0.5, lambda run: run.saved, [2, 4, 6, 8], [5, 10]),
    "gradient_checkpointing": Case(False, True, lambda run: run.forwards_a_batch, 1, 2),
}  # fmt: skip


def test_every_setting_has_a_proof() -> None:
    cases = {f"{stage}.{name}" for stage in ("sft", "dpo") for name in STAGE}
    fields = [path for path in paths(RunConfig) if not path.startswith("data.")]
    assert sorted(fields) == sorted([*cases, *PROVED_BY])
    assert [pointer for pointer in PROVED_BY.values() if not exists(pointer)] == []


# --- a job that is watched ------------------------------------------------------------------------------------------


def watch_beside(trainer: Any, run: "Watched") -> Any:
    """Return a callback that writes into ``run`` what the training loop does."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.substeps = 0

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.substeps += 1

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
            inner = optimizer.optimizer
            trainable = [p for p in trainer.model.parameters() if p.requires_grad]
            run.rates.append(inner.param_groups[0]["lr"])
            run.norms.append(sum(p.grad.norm().item() ** 2 for p in trainable if p.grad is not None) ** 0.5)
            run.optimizer = type(inner).__name__, bool(inner.param_groups[0].get("fused"))
            groups = [group["weight_decay"] for group in inner.param_groups if len(group["params"]) == len(trainable)]
            (run.decay_of_all,) = groups

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.batches_a_step, run.substeps = run.substeps + 1, 0
            run.steps, run.epochs = state.global_step, state.epoch

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.evaluated.append(state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            run.saved.append(state.global_step)

    return Watch()


class Watched:
    """A training job that ran in this process, and what was seen of it."""

    def __init__(self, folder: Path, work: job.TrainingJob) -> None:
        from preference_tuning.training.__main__ import _Training

        self.rates: list[float] = []
        self.norms: list[float] = []
        self.evaluated: list[int] = []
        self.saved: list[int] = []
        self.batches: dict[str, list[int]] = {"train": [], "held_out": []}
        self.batches_a_step = self.steps = self.substeps = self.forwards = 0
        self.epochs = self.decay_of_all = math.nan
        self.optimizer = ("", False)
        folder.mkdir(parents=True)
        self.training = _Training(folder, work, Comet(None))
        self._build = self.training._trainer
        self.training._trainer = self._watched_trainer  # type: ignore[method-assign]
        self.record = self.training.run()
        self.adapter = folder / job.ADAPTER
        points = list(read(folder / job.EVIDENCE / job.METRICS))
        self.names = {name.removeprefix(f"{work.stage}/") for point in points for name in point.metrics}
        self.logged = [point.step for point in points if f"{work.stage}/train/loss" in point.metrics]

    @property
    def forwards_a_batch(self) -> float:
        return self.forwards / (self.steps * self.batches_a_step)

    def _watched_trainer(self, model: Any, train: Any, held_out: Any) -> Any:
        trainer = self._build(model, train, held_out)
        trainer.add_callback(watch_beside(trainer, self))
        kept = {tuple(row["prompt_ids"]) for row in held_out}
        collate = trainer.data_collator

        def collator(examples: list[dict[str, Any]]) -> Any:
            side = "held_out" if tuple(examples[0]["prompt_ids"]) in kept else "train"
            self.batches[side].append(len(examples))
            return collate(examples)

        trainer.data_collator = collator
        layer = next(m for m in trainer.model.modules() if type(m).__name__.endswith("DecoderLayer"))
        # Before the layer: checkpointing leaves its second pass as soon as it has what it needs.
        layer.register_forward_pre_hook(lambda module, *_: setattr(self, "forwards", self.forwards + module.training))
        return trainer


class Workplace:
    """Rows, a tiny model, and jobs on them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        sides = ["train"] * TRAIN + ["test"] * 11
        rows = [{**row, "split": side} for row, side in zip(preference_rows(TRAIN + 11), sides, strict=True)]
        self.rows = write_jsonl(folder / "rows.jsonl", rows)
        data = self.config().data
        self.dataset: Dataset = prepare.prepare(data, data_job.fingerprints_of(data), folder / "data")
        assert self.dataset.manifest.train == TRAIN
        self.count = 0

    def config(self, **changes: dict[str, Any]) -> RunConfig:
        """Return the config that a YAML file with ``changes`` to its sections gives."""
        parameters: dict[str, Any] = {
            "base_model": {"source": str(self.model), "max_seq_length": 128, "dtype": "float32", "device": "cpu"},
            "lora": {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]},
            "data": {"source": str(self.rows)},
            "sft": {"warmup_steps": 0.1},
            "dpo": {"warmup_steps": 0.1, "max_length": 128},
        }
        for section, values in changes.items():
            parameters[section] |= values
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump({"parameters": parameters}), encoding="utf-8")
        return config.load(path).config

    def job(self, run: RunConfig, stage: str, adapter: Path | None = None) -> job.TrainingJob:
        own = {"lora": run.lora} if stage == "sft" else {"adapter": adapter}
        comet = CometRun(config=run.tracking, experiment_key="0" * 32, folder=self.folder / "comet")
        out = self.folder / "outputs"
        return job.from_artifacts(
            stage, run.base_model, locate(run.base_model), self.dataset, out, comet, **{stage: getattr(run, stage)}, **own
        )  # type: ignore[arg-type]  # fmt: skip

    def run(self, stage: str, settings: dict[str, Any], adapter: Path | None = None) -> Watched:
        """Run a stage in this process."""
        self.count += 1
        work = self.job(self.config(**{stage: settings}), stage, adapter)
        return Watched(self.folder / f"job-{self.count}", work)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Workplace]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield Workplace(tmp_path_factory.mktemp("settings"), tiny_model)
    for number, handler in handlers.items():
        signal.signal(number, handler)


Runs = dict[str, tuple[Watched, Watched]]


@pytest.fixture(scope="module")
def runs(workplace: Workplace) -> Runs:
    """Both stages, each with all settings of the one kind and with all of the other."""
    one, other = ({name: getattr(case, kind) for name, case in STAGE.items()} for kind in ("one", "other"))
    sft = workplace.run("sft", one), workplace.run("sft", other)
    # A weight on the loss moves the loss that the untrained policy has to have.
    weighted = {**other, "loss_weights": [0.5]}
    dpo = workplace.run("dpo", one, sft[0].adapter), workplace.run("dpo", weighted, sft[0].adapter)
    return {"sft": sft, "dpo": dpo}


# --- what was seen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("name", STAGE)
def test_a_stages_setting_changes_what_it_should(runs: Runs, stage: str, name: str) -> None:
    case, (one, other) = STAGE[name], runs[stage]
    assert case.in_one != case.in_other
    for found, expected in ((case.look(one), case.in_one), (case.look(other), case.in_other)):
        assert found == (pytest.approx(expected) if isinstance(expected, int | float | list) else expected)


def test_the_reference_is_checked_against_the_weighted_loss(runs: Runs) -> None:
    proofs = [run.record.reference for run in runs["dpo"]]
    assert [proof and proof.expected_loss for proof in proofs] == [math.log(2), math.log(2) / 2]
    assert [proof and proof.loss for proof in proofs] == pytest.approx([math.log(2), math.log(2) / 2], abs=1e-5)


def test_the_seed_gives_the_order_and_the_adapter(workplace: Workplace, runs: Runs) -> None:
    import torch

    from preference_tuning.models import loading, rows
    from preference_tuning.training import arguments, trainers

    def first(stage: str, seed: int) -> tuple[list[int], list[float]]:
        run = workplace.config(**{stage: {"seed": seed}})
        base = loading.load_base(run.base_model, locate(run.base_model), workplace.folder)
        work = workplace.job(run, stage, runs["sft"][0].adapter)
        tokens = rows.tokenise(workplace.dataset.path("train"), base.tokenizer, work.room, workplace.folder / "t", 2)
        model = loading.new_adapter(base, run.lora, getattr(run, stage).seed)
        drawn = next(p for name, p in model.named_parameters() if "lora_A" in name)[0].tolist()
        make = {"sft": trainers.AnswerSFTTrainer, "dpo": trainers.PreferenceTrainer}[stage]
        how: dict[str, Any] = {"shared_prompt": True} if stage == "dpo" else {}
        trainer = make(
            args=getattr(arguments, stage)(getattr(run, stage), base, workplace.folder), model=model,
            train_dataset=tokens.rows, eval_dataset=tokens.rows, processing_class=base.tokenizer,
            dtype=torch.float32, pad_id=0, **how,
        )  # fmt: skip
        assert trainer.args.seed == trainer.args.data_seed == seed
        return list(trainer._get_train_sampler()), drawn

    for stage in ("sft", "dpo"):
        order, weights = first(stage, 1)
        again, other = first(stage, 1), first(stage, 2)
        assert again == (order, weights)
        assert sorted(other[0]) == sorted(order)
        assert other[0] != order
        assert other[1] != weights


def test_rows_are_cut_to_their_stages_length(workplace: Workplace, runs: Runs) -> None:
    """SFT has ``max_seq_length``; DPO has half of it, or its own ``max_length``; the prompt's bound leaves rows out."""
    from preference_tuning.models import rows
    from preference_tuning.models.tokenizer import load_tokenizer

    def longest(stage: str, **changes: dict[str, Any]) -> int:
        run = workplace.config(**changes)
        work = workplace.job(run, stage, runs["sft"][0].adapter)
        tokenizer = load_tokenizer(run.base_model, locate(run.base_model), workplace.folder)
        table = workplace.dataset.path("train")
        made = rows.tokenise(table, tokenizer, work.room, workplace.folder / "t", 1 if stage == "sft" else 2)
        answers = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in made.rows]
        return max(len(row["prompt_ids"]) + answer for row, answer in zip(made.rows, answers, strict=True))

    whole = longest("sft"), longest("dpo")
    assert max(whole) < 128
    assert longest("sft", base_model={"max_seq_length": 30}, dpo={"max_length": 24}) == 30 < whole[0]
    assert longest("dpo", dpo={"max_length": 31}) == 31 < whole[1]
    assert longest("dpo", base_model={"max_seq_length": 56}, dpo={"max_length": None}) == 28


# --- names of metrics -----------------------------------------------------------------------------------------------

CLOCK = {"epoch", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}
CLOCK |= {f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")}
"""transformers' own summary and clock; of points in time our metrics have step and epoch."""


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_metrics_have_the_names_of_stock_trl(workplace: Workplace, runs: Runs, stage: str) -> None:
    import datasets
    import trl
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sides = ("chosen", "rejected") if stage == "dpo" else ("chosen",)
    named = {"chosen": "completion"} if stage == "sft" else {}
    rows = datasets.Dataset.from_list(
        [
            {"prompt": row["prompt"], **{named.get(side, side): row[side] for side in sides}}
            for row in list(workplace.dataset.rows("train"))[:4]
        ]
    ).map(lambda row: {name: [{k: m[k] for k in ("role", "content")} for m in row[name]] for name in row})
    settings: dict[str, Any] = {
        "output_dir": str(workplace.folder / "stock"), "max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False,
        "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    arguments, trainer = (getattr(trl, f"{stage.upper()}{kind}") for kind in ("Config", "Trainer"))
    stock = trainer(
        model=AutoModelForCausalLM.from_pretrained(workplace.model), args=arguments(**settings), train_dataset=rows,
        eval_dataset=rows, processing_class=AutoTokenizer.from_pretrained(workplace.model),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    stock.train()
    names = {name for logs in stock.state.log_history for name in logs} - CLOCK - {"step"}
    expected = {f"eval/{n[5:]}" if n.startswith("eval_") else f"train/{n}" for n in names}
    assert {"train/loss", "train/grad_norm", "train/learning_rate", "eval/loss", "eval/entropy"} < expected
    for run in runs[stage]:
        assert expected - run.names == set()
