"""What is noteworthy about the set as a whole, alone and beside the run that it is for."""

from collections.abc import Iterator

from preference_tuning.config import RunConfig, StageConfig
from preference_tuning.data.table import Finding, Manifest
from preference_tuning.models.devices import processes_of

BIASED_SHARE = 0.75
BIASED_EFFECT = 0.8
"""Cohen's d from which an effect is called large (Cohen 1988)."""
FEW_STEPS = 20
MANY_EPOCHS = 10


def of_set(manifest: Manifest) -> Iterator[Finding]:
    """Yield the findings that need nothing but the pairs."""
    bias, share = manifest.length_bias, manifest.length_bias.chosen_longer
    if max(share, 1 - share) >= BIASED_SHARE or abs(bias.effect) >= BIASED_EFFECT:
        kind = "longer" if share >= 0.5 else "shorter"
        yield _warn(
            "length_bias",
            f"chosen is the {kind} answer in {max(share, 1 - share):.0%} of the pairs (effect size d = "
            f"{bias.effect:.2f}): a model can learn to be {kind} instead of better",
        )
    if problem := empty_side(manifest):
        yield _warn("empty_side", problem)
    if manifest.near_duplicate_prompts:
        count, prompts = manifest.near_duplicate_prompts, manifest.prompts
        yield _note("near_duplicates", f"{count} of {prompts} prompts are nearly the same as another one")
    if manifest.answers_cut > (manifest.train + manifest.held_out) * 0.01:
        yield _warn(
            "answers_cut",
            f"{manifest.answers_cut} pairs have an answer that dpo.max_length cuts, so the model never sees it end",
        )
    if manifest.prompts_cut:
        yield _note("prompts_cut", f"{manifest.prompts_cut} pairs have the beginning of their prompt cut")


def empty_side(manifest: Manifest) -> str | None:
    """Return why a set cannot be trained on and measured: a side of its split is empty."""
    if manifest.train and manifest.held_out:
        return None
    share = manifest.held_out_share
    how = "the source's own split" if share is None else f"data.held_out (now {share:g})"
    return (
        f"{manifest.source}: {manifest.prompts} different prompts split into {manifest.train} training and "
        f"{manifest.held_out} held-out pairs, and a run needs both; give more prompts, or change {how}"
    )


def of_run(manifest: Manifest, config: RunConfig) -> Iterator[Finding]:
    """Yield what the run makes of a set of this size: steps, warm-up, and whether its verdict can be one."""
    sft_rows = manifest.sft if manifest.sft is not None else manifest.train
    processes = processes_of(config.training, config.base_model)
    yield from _of_stage("SFT", config.sft, sft_rows, processes)
    if config.finetuning_type == "dpo":
        yield from _of_stage("DPO", config.dpo, manifest.train, processes)
    wanted = config.evaluation.gate.min_prompts
    if manifest.held_out < wanted:
        pairs = manifest.train + manifest.held_out
        yield _warn(
            "few_held_out",
            f"{manifest.held_out} held-out pairs are too few for a verdict (evaluation.gate.min_prompts is {wanted}): "
            "it will be inconclusive. With "
            f"{pairs} pairs data.held_out must be about {min(0.9, 1.2 * wanted / pairs):.2g}",
        )


def _of_stage(name: str, stage: StageConfig, rows: int, processes: int) -> Iterator[Finding]:
    steps, warmup = stage.total_steps(rows, processes), stage.warmup_of(rows, processes)
    if steps < FEW_STEPS:
        yield _warn(
            "few_steps",
            f"{name} makes only {steps} optimizer steps on {rows} rows: give more rows or epochs, or a smaller batch",
        )
    if stage.num_train_epochs > MANY_EPOCHS:
        yield _warn("many_epochs", f"{name} sees each of {rows} rows {stage.num_train_epochs:g} times")
    if warmup > steps / 2:
        yield _warn(
            "warm_up",
            f"{name} spends {warmup} of {steps} steps on warm-up; give {name.lower()}.warmup_steps as a share, as 0.1",
        )


def _warn(name: str, message: str) -> Finding:
    return Finding(name=name, level="warning", message=message)


def _note(name: str, message: str) -> Finding:
    return Finding(name=name, level="note", message=message)
