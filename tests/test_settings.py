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
from fields import exists, paths, section_in
from watched import Watched, Workplace

from preference_tuning.config import RunConfig
from preference_tuning.models.source import locate

PROVED_BY = {
    "finetuning_type": "test_pipeline.py::test_zenmls_own_command_runs_sft_without_a_dpo_step",
    "output_dir": "test_settings_world.py::test_where_things_go",
    "base_model.source": "test_settings_world.py::test_the_revision_of_a_hub_model_is_what_is_loaded",
    "base_model.revision": "test_settings_world.py::test_the_revision_of_a_hub_model_is_what_is_loaded",
    "base_model.backend": "test_settings_world.py::test_unsloth_is_loaded_with_the_settings",
    "base_model.device": "test_settings_world.py::test_device",
    "base_model.dtype": "test_settings_world.py::test_dtype",
    "base_model.attention": "test_compute.py::test_the_model_runs_as_chosen",
    "base_model.threads": "test_compute.py::test_the_model_runs_as_chosen",
    "base_model.load_in_4bit": "test_settings_world.py::test_four_bits",
    "base_model.max_seq_length": "test_settings.py::test_rows_are_cut_to_their_stages_length",
    "base_model.chat_template": "test_settings_world.py::test_the_chat_template_makes_the_tokens",
    "training.processes": "test_processes.py::test_two_processes_do_what_one_does",
    "training.fsdp": "test_processes.py::test_sharded_weights_are_what_accelerate_and_the_model_understand",
    "training.save_every_minutes": "test_settings.py::test_checkpoints_are_written_by_time_too",
    "training.strict_resume": "test_faults_checkpoints.py::test_without_an_intact_checkpoint_a_stage_starts_over_or_is_refused",
    "training.retries": "test_faults_jobs.py::test_what_does_not_pass_is_tried_no_more_than_it_may",
    "training.unfinished": "test_unfinished.py::test_other_work_is_refused_continued_or_removed",
    "lora": "test_full.py::test_a_full_run_trains_every_weight_from_the_sft_policy",
    "lora.rank": "test_settings_world.py::test_the_adapter_is_the_one_asked_for",
    "lora.alpha": "test_settings_world.py::test_the_adapter_is_the_one_asked_for",
    "lora.dropout": "test_settings_world.py::test_the_adapter_is_the_one_asked_for",
    "lora.target_modules": "test_settings_world.py::test_the_adapter_is_the_one_asked_for",
    "sft.torch_compile": "test_compute.py::test_the_decoder_is_compiled_in_place",
    "dpo.torch_compile": "test_compute.py::test_the_decoder_is_compiled_in_place",
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
    "evaluation.general": "test_settings_world.py::test_an_evaluation_is_the_one_asked_for",
    "evaluation.max_new_tokens": "test_settings_world.py::test_an_evaluation_is_the_one_asked_for",
    "evaluation.seed": "test_settings_world.py::test_an_evaluation_is_the_one_asked_for",
    "evaluation.gate.champion_margin": "test_gate.py::test_each_rule_follows_its_setting",
    "evaluation.gate.length_ratio": "test_gate.py::test_each_rule_follows_its_setting",
    "evaluation.gate.margin": "test_gate.py::test_each_rule_follows_its_setting",
    "evaluation.gate.max_empty_increase": "test_gate.py::test_each_rule_follows_its_setting",
    "evaluation.gate.max_kl": "test_gate.py::test_each_rule_follows_its_setting",
    "evaluation.gate.max_nll_increase": "test_gate.py::test_each_rule_follows_its_setting",
    "evaluation.gate.max_repetition_increase": "test_gate.py::test_each_rule_follows_its_setting",
    "evaluation.gate.min_prompts": "test_gate.py::test_each_rule_follows_its_setting",
    "evaluation.gate.min_win_rate": "test_gate.py::test_each_rule_follows_its_setting",
    "evaluation.gate.primary": "test_gate.py::test_each_rule_follows_its_setting",
    "evaluation.gate.wanted_difference": "test_gate.py::test_the_number_of_prompts_follows_the_wanted_difference",
    "evaluation.judge": "test_judge.py::test_both_orders_are_asked_and_what_they_cost_is_counted",
    "evaluation.judge.url": "test_judge.py::test_both_orders_are_asked_and_what_they_cost_is_counted",
    "evaluation.judge.model": "test_judge.py::test_both_orders_are_asked_and_what_they_cost_is_counted",
    "evaluation.judge.api_key_env": "test_judge.py::test_the_key_is_nowhere",
    "evaluation.judge.api_key_secret": "test_settings_world.py::test_the_judges_key_may_be_a_zenml_secret",
    "evaluation.judge.prompts": "test_judge.py::test_as_many_are_asked_about_as_the_config_says",
    "evaluation.judge.calibration_pairs": "test_judge.py::test_as_many_are_asked_about_as_the_config_says",
    "evaluation.judge.requests_per_minute": "test_judge.py::test_requests_keep_their_pace_and_go_side_by_side",
    "evaluation.judge.concurrency": "test_judge.py::test_requests_keep_their_pace_and_go_side_by_side",
    "evaluation.judge.timeout": "test_judge.py::test_a_judge_that_cannot_be_asked_is_an_error",
    "evaluation.judge.max_retries": "test_judge.py::test_a_judge_that_cannot_be_asked_is_an_error",
    "evaluation.judge.max_tokens": "test_judge.py::test_both_orders_are_asked_and_what_they_cost_is_counted",
    "evaluation.judge.max_total_tokens": "test_judge.py::test_a_stopped_evaluation_goes_on_behind_its_replies",
    "evaluation.lm_eval": "test_harness.py::test_what_cannot_run_is_refused_before_the_run",
    "evaluation.lm_eval.tasks": "test_harness.py::test_every_model_is_given_to_the_harness",
    "evaluation.lm_eval.include_path": "test_harness.py::test_every_model_is_given_to_the_harness",
    "evaluation.lm_eval.limit": "test_harness.py::test_every_model_is_given_to_the_harness",
    "evaluation.lm_eval.num_fewshot": "test_harness.py::test_every_model_is_given_to_the_harness",
    "registry.folder": "test_settings_world.py::test_where_things_go",
    "registry.license": "test_published.py::test_the_licence_is_the_configs_or_the_base_models",
    "registry.name": "test_settings_world.py::test_where_things_go",
    "registry.push": "test_pushing.py::test_targets_come_from_the_config",
    "registry.push.contents": "test_pushing.py::test_it_comes_back_as_it_was_and_loads",
    "registry.push.name": "test_pushing.py::test_targets_that_share_a_place_are_refused",
    "registry.push.private": "test_pushing.py::test_visibility_is_never_changed",
    "registry.push.repo_id": "test_pushing.py::test_a_champion_arrives_as_main_and_under_a_tag",
    "registry.push.to": "test_pushing.py::test_mistakes_in_targets_have_their_line",
    "registry.push.token_env": "test_pushing.py::test_a_token_that_is_none",
    "registry.push.token_secret": "test_pipeline.py::test_a_push_is_part_of_the_run_and_is_finished_by_the_next",
    "registry.push.tracking_uri": "test_pushing.py::test_targets_that_share_a_place_are_refused",
    "registry.push.when": "test_pushing.py::test_a_version_that_is_not_promoted_leaves_main_alone",
    "retrain.min_new_rows": "test_retraining.py::test_a_run_waits_for_its_new_rows",
    "retrain.min_interval": "test_retraining.py::test_a_run_waits_for_its_time",
    "retrain.max_age": "test_retraining.py::test_a_run_waits_for_its_time",
    "notify": "test_notifying.py::test_a_run_is_told_with_its_figures",
    "notify.on": "test_notifying.py::test_each_receiver_hears_of_what_it_asked_for",
    "notify.to": "test_notifying.py::test_mistakes_have_their_line_and_show_no_address",
    "notify.url_env": "test_notifying.py::test_what_fails_or_hangs_is_a_warning_in_time",
    "notify.format": "test_notifying.py::test_a_webhook_gets_what_its_kind_takes",
    "notify.run": "test_notifying.py::test_a_command_gets_the_message_and_its_facts",
    "tracking.mode": "test_tracking.py::test_the_mode_follows_the_key",
    "tracking.project": "test_tracking.py::test_comet_sees_a_run_while_it_lives",
    "tracking.workspace": "test_tracking.py::test_comet_sees_a_run_while_it_lives",
    "tracking.tags": "test_tracking.py::test_comet_sees_a_run_while_it_lives",
    "tracking.log": "test_tracking_archives.py::test_what_is_asked_for_is_logged_without_secrets",
}
"""A field, and the test that has been read and shows its effect; the fields of ``STAGE`` are proved here."""


class Case(NamedTuple):
    """A setting of a stage in two runs, and what has to be seen in each of them."""

    one: Any
    other: Any
    look: Callable[[Watched], Any]
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


def test_the_documentation_has_every_setting_with_its_default() -> None:
    """The tables of docs/training.md against the schema; `none` and words stand for defaults that are not values."""
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    for title, sections in (
        ("`base_model`", ("base_model",)), ("`training`", ("training",)), ("`lora`", ("lora",)), ("`sft` and `dpo`", ("sft", "dpo")),
    ):  # fmt: skip
        table = text.partition(f"### {title}\n")[2].partition("\n#")[0]
        rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()]
        told = {row[0]: row[1 : 1 + len(sections)] for row in rows if len(row) > 1 and row[0] not in ("field", "---")}
        known = [section_in(RunConfig.model_fields[section].annotation).model_fields for section in sections]  # type: ignore[union-attr]
        assert set(told) == {name for fields in known for name in fields}
        for fields, column in zip(known, zip(*told.values(), strict=True), strict=True):
            for name, default in zip(told, column, strict=True):
                if name in fields and isinstance(fields[name].default, bool | int | float | str):
                    assert str(yaml.safe_load(default)) == str(fields[name].default) or float(default) == float(
                        fields[name].default
                    ), name


# --- the runs --------------------------------------------------------------------------------------------------------


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

    from preference_tuning.models import compute, loading, rows
    from preference_tuning.training import arguments, trainers

    def first(stage: str, seed: int) -> tuple[list[int], list[float]]:
        run = workplace.config(**{stage: {"seed": seed}})
        base = loading.load_base(
            run.base_model, locate(run.base_model), workplace.folder, compute.choose(run.base_model, workplace.folder)
        )
        work = workplace.job(run, stage, runs["sft"][0].adapter)
        tokens = rows.tokenise(workplace.dataset.path("train"), base.tokenizer, work.room, workplace.folder / "t", 2)
        model = loading.new_adapter(base, run.lora, getattr(run, stage).seed)
        drawn = next(p for name, p in model.named_parameters() if "lora_A" in name)[0].tolist()
        make = {"sft": trainers.AnswerSFTTrainer, "dpo": trainers.PreferenceTrainer}[stage]
        trainer = make(
            args=getattr(arguments, stage)(getattr(run, stage), base, workplace.folder), model=model,
            train_dataset=tokens.rows, eval_dataset=tokens.rows, processing_class=base.tokenizer,
            dtype=torch.float32, pad_id=0, shared_prompt=True,
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


@pytest.mark.parametrize(("minutes", "saves"), [(1.0, [2, 4]), (None, [])])
def test_checkpoints_are_written_by_time_too(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, minutes: float | None, saves: list[int]
) -> None:
    """Of steps of 40 seconds every second one is saved: the clock starts anew with each checkpoint."""
    from transformers import TrainerControl, TrainerState

    from preference_tuning.training import callbacks

    run = workplace.config()
    run = run.model_copy(update={"training": run.training.model_copy(update={"save_every_minutes": minutes})})
    stop, state = callbacks.Stop("sft", workplace.job(run, "sft").save_every_minutes), TrainerState(max_steps=10)
    state.is_world_process_zero = True
    now, found = 0.0, []
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now)
    stop.on_train_begin(None, state, TrainerControl())
    for state.global_step in range(1, 6):
        now += 40
        control = TrainerControl()
        stop.on_step_end(None, state, control)
        assert not control.should_training_stop
        if control.should_save:
            found.append(state.global_step)
            stop.on_save(None, state, control)
    assert found == saves


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
