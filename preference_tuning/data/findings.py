"""What is noteworthy about the set as a whole, alone and beside the run that it is for."""

from collections.abc import Iterator

from preference_tuning.config import RunConfig, StageConfig
from preference_tuning.data.lengths import Cuts
from preference_tuning.data.table import Finding, LengthBias, Manifest

BIASED_SHARE = 0.75
BIASED_EFFECT = 0.8
"""Cohen's d from which an effect is called large (Cohen 1988)."""
FEW_STEPS = 20
MANY_EPOCHS = 10


def of_set(bias: LengthBias, near_duplicates: int | None, prompts: int, cuts: Cuts, pairs: int) -> Iterator[Finding]:
    """Yield the findings that need nothing but the pairs."""
    share = bias.chosen_longer
    if max(share, 1 - share) >= BIASED_SHARE or abs(bias.effect) >= BIASED_EFFECT:
        kind = "longer" if share >= 0.5 else "shorter"
        yield _warn(
            "length_bias",
            f"chosen is the {kind} answer in {max(share, 1 - share):.0%} of the pairs (effect size d = "
            f"{bias.effect:.2f}): a model can learn to be {kind} instead of better",
        )
    if near_duplicates:
        yield Finding(
            name="near_duplicates",
            level="note",
            message=f"{near_duplicates} of {prompts} prompts are nearly the same as another one",
        )
    if cuts.answers > pairs * 0.01:
        yield _warn(
            "answers_cut",
            f"{cuts.answers} pairs have an answer that dpo.max_length cuts, so the model never sees it end "
            f"({cuts.sft_answers} of the chosen ones also in SFT)",
        )
    if cuts.prompts:
        message = f"{cuts.prompts} pairs have the beginning of their prompt cut"
        yield Finding(name="prompts_cut", level="note", message=message)


def of_run(manifest: Manifest, config: RunConfig) -> Iterator[Finding]:
    """Yield what the run makes of a set of this size: steps, warm-up, and whether its verdict can be one."""
    sft_rows = manifest.sft if manifest.sft is not None else manifest.train
    yield from _of_stage("SFT", config.sft, sft_rows)
    if config.finetuning_type == "dpo":
        yield from _of_stage("DPO", config.dpo, manifest.train)
    wanted = config.evaluation.min_pairs
    if manifest.held_out < wanted:
        pairs = manifest.train + manifest.held_out
        yield _warn(
            "few_held_out",
            f"{manifest.held_out} held-out pairs are too few for a verdict (evaluation.min_pairs is {wanted}): it will "
            f"be inconclusive. With {pairs} pairs data.held_out must be about {min(0.9, 1.2 * wanted / pairs):.2g}",
        )


def _of_stage(name: str, stage: StageConfig, rows: int) -> Iterator[Finding]:
    steps, warmup = stage.total_steps(rows), stage.warmup_of(rows)
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
