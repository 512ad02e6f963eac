"""The areas ``data`` and ``steps``: what is in the rows, and what training makes of that many."""

from collections.abc import Iterator

from preference_tuning.data import findings
from preference_tuning.preflight.findings import Area, Finding
from preference_tuning.preflight.world import Stage, World
from preference_tuning.training.schedule import steps_of_share


def data(world: World) -> Iterator[Finding]:
    """Yield the data report in short."""
    area, config = Area("data"), world.config
    manifest = world.dataset.manifest
    for stage in world.stages:
        world.settings(stage).check_warmup(stage, world.rows(stage), world.processes)
    left_out = f", {manifest.dropped} left out" if manifest.dropped else ""
    yield area.ok(f"{manifest.train} training and {manifest.held_out} held-out pairs in {manifest.source}{left_out}")
    for found in (*manifest.findings, *findings.of_run(manifest, config)):
        yield area.warning(found.message) if found.level == "warning" else area.ok(f"note: {found.message}")


def lengths(world: World) -> Iterator[Finding]:
    """Yield how many rows are longer than what is trained on, and what becomes of them."""
    area, manifest = Area("lengths"), world.dataset.manifest
    if manifest.unit != "tokens":
        return
    sampled = len(world.lengths)
    whole = "" if sampled >= manifest.train + manifest.held_out else f" of {sampled:,} sampled"
    longest = max(row.prompt + max(row.answers) for row in world.lengths)
    yield area.ok(f"the longest row has {longest:,} tokens; room: {_rooms(world)}")
    for stage in world.stages:
        room, rows = world.room(stage), world.lengths
        over = [row for row in rows if row.prompt + max(row.answers[: 2 if stage == "dpo" else 1]) > room]
        if over:
            lost = sum(row.prompt + max(row.answers) - room for row in over) / len(over)
            limit = "dpo.max_length" if stage == "dpo" else "base_model.max_seq_length"
            yield area.warning(
                f"{len(over):,} rows{whole} ({len(over) / len(rows):.1%}) are longer than {limit} {room:,}: they are "
                f"cut, by {lost:,.0f} tokens on average, or left out",
                f"{limit}: {longest} would keep all",
            )


def _rooms(world: World) -> str:
    return ", ".join(f"{stage.upper()} {world.room(stage):,}" for stage in world.stages)


def steps(world: World) -> Iterator[Finding]:
    """Yield what each stage does: optimizer steps, warm-up, evaluations, checkpoints."""
    for stage in world.stages:
        yield Area("steps").ok(_steps(world, stage))


def _steps(world: World, stage: Stage) -> str:
    settings, count, rows = world.settings(stage), world.steps(stage), world.rows(stage)
    warmup = settings.warmup_of(rows, world.processes)
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * world.processes
    evaluations, saves = (len(steps_of_share(share, count)) for share in (settings.eval_steps, settings.save_steps))
    return (
        f"{stage.upper()}: {count:,} optimizer steps of {batch} rows ({settings.num_train_epochs:g} epochs of {rows:,})"
        f", warm-up {warmup:,} ({warmup / count:.0%}), {evaluations} evaluations, {saves} checkpoints"
    )
