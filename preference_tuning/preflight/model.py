"""The areas of the base model: what it is, how conversations become its tokens, what it runs on."""

import re
from collections.abc import Iterator
from pathlib import Path

from preference_tuning import hub
from preference_tuning.errors import ConfigError
from preference_tuning.models.compute import check_packages
from preference_tuning.preflight.findings import Area, Finding
from preference_tuning.preflight.world import World

USUAL = {"sft": 2e-5, "dpo": 5e-7}
"""Learning rates at which a whole model of a few billion parameters is trained (Zephyr, Tunstall et al. 2023)."""
LICENCE = re.compile(r"^license:\s*(\S+)", re.MULTILINE)
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")


def model(world: World) -> Iterator[Finding]:
    """Yield whether the model is there, may be used, and can be trained as the config says."""
    area, config = Area("model"), world.config
    check_packages(config.base_model)
    source = world.source
    told = f"{source.kind} {source.location} ({source.fingerprint[:16]})"
    yield area.ok(told + (", every weight is trained" if config.lora is None else ""))
    yield from _rates(area, world)
    if source.kind == "hub":
        yield from _on_the_hub(area, world)
    elif licence := _licence(Path(source.location)):
        yield area.ok(f"licence {licence}")
    else:
        yield area.ok("says no licence of its own")
    if config.base_model.revision is None and source.kind == "hub":
        yield area.warning(
            "the newest commit of the main branch is used",
            f"for runs that can be repeated: base_model.revision: {source.fingerprint}",
        )


def architecture(world: World) -> Iterator[Finding]:
    """Yield what the model is made of, and whether the adapter finds its modules."""
    area, shapes, lora = Area("shapes"), world.shapes, world.config.lora
    shapes.check_adaptable(lora)
    trained = shapes.trained(lora)
    yield area.ok(
        f"{shapes.architecture}, {shapes.parameters:,} parameters, of which {trained:,} "
        f"({trained / shapes.parameters:.1%}) {'are trained' if lora is None else 'as an adapter are trained beside'}"
    )
    longest = max(world.room(stage) for stage in world.stages)
    if shapes.positions is not None and longest > shapes.positions:
        yield area.warning(
            f"rows may have {longest:,} tokens, and the model was made for {shapes.positions:,}",
            f"base_model.max_seq_length: {shapes.positions}",
        )
    if shapes.no_tree is not None:
        yield area.warning(f"the prompt is not shared between answers, because {shapes.no_tree}: training is slower")


def _rates(area: Area, world: World) -> Iterator[Finding]:
    if world.config.lora is not None:
        return
    for stage in world.stages:
        rate = world.settings(stage).learning_rate
        if rate > 10 * USUAL[stage]:
            yield area.warning(f"{stage}.learning_rate {rate:g} is a rate for adapters; usual here is {USUAL[stage]:g}")


def _on_the_hub(area: Area, world: World) -> Iterator[Finding]:
    repo, commit = world.source.location, world.source.fingerprint
    found = hub.access(repo, commit)
    if found.offline:
        there = "all its files are in the local cache" if found.cached else "its weights are not in the local cache"
        text = f"the hub may not be asked, or does not answer: licence and access are not known; {there}"
        if not found.cached:
            raise ConfigError(f"base_model.source: {text}; reach it without HF_HUB_OFFLINE, or use a local path")
        yield area.warning(text)
        return
    gate = f", gated ({found.gated}), access granted" if found.gated else ""
    yield area.ok(f"licence {found.licence or 'not stated'}{gate}")


def _licence(place: Path) -> str | None:
    """Return the licence that a local model states in its card, or the name of the file that has it."""
    folder = place if place.is_dir() else place.parent
    card = folder / "README.md"
    if card.is_file() and (found := LICENCE.search(card.read_text(encoding="utf-8", errors="replace"))):
        return found.group(1)
    there = [name for name in LICENCE_FILES if (folder / name).is_file()]
    return f"in {folder / there[0]}" if there else None


def template(world: World) -> Iterator[Finding]:
    """Yield whether training and generation read conversations alike, and whether an end can be told from padding."""
    area, found = Area("template"), world.template
    setting = "base_model.chat_template: chatml, or a Jinja file"
    if not found.same:
        raise ConfigError(
            "base_model.chat_template: a conversation that is trained on does not begin as the prompt that is answered "
            f"with it, so the model would be asked in another form than it learned; use {setting}"
        )
    yield area.ok(f"a conversation begins as the prompt that is answered ({found.hash[:16]})")
    if not found.closes:
        yield area.warning(
            f"no answer that is trained on contains the end token {found.eos!r}: the model may never stop",
            f"use {setting}, whose turns end with it",
        )
    if found.pad == found.eos:
        yield area.warning(
            f"padding and end are the same token, {found.eos!r}",
            "fine here, as padding is never trained on; other tools may ignore the end too: give the tokenizer a "
            "pad_token of its own",
        )
    else:
        yield area.ok(f"padding {found.pad!r}, end {found.eos!r}")


def device(world: World) -> Iterator[Finding]:
    """Yield what the model runs on, and why."""
    area, compute = Area("device"), world.compute
    names = [device.name for device in world.facts.devices]
    where = f"{len(names)} x {names[0]}" if compute.device == "cuda" and names else compute.device
    speed = f", {world.facts.tflops:.2f} TFLOP/s measured" if world.facts.tflops else ""
    threads = f", {compute.threads} threads" if compute.device == "cpu" else ""
    yield area.ok(f"{where}, {compute.dtype}, {compute.attention}{threads}{speed}")
    yield from _wishes(area, world)


def _wishes(area: Area, world: World) -> Iterator[Finding]:
    base, kind = world.config.base_model, world.compute.device
    if base.load_in_4bit and kind != "cuda":
        raise ConfigError("base_model.load_in_4bit: 4-bit training needs CUDA, and this machine has none")
    if base.backend == "unsloth" and kind != "cuda":
        raise ConfigError("base_model.backend: unsloth needs a CUDA GPU, and none is visible; use transformers")
    if kind == "cpu" and world.shapes.parameters > 2e9:
        yield area.warning(
            f"a model of {world.shapes.parameters / 1e9:.1f} billion parameters on a CPU",
            "use a machine with a GPU, or a smaller model",
        )
