"""A loaded model against stored probes: what its tokenizer makes of their prompts, and its log-probabilities."""

import math
from collections.abc import Iterator

from preference_tuning.evaluation import probes as probes_of
from preference_tuning.evaluation.probes import Probe, Probes
from preference_tuning.models import chat, compute, published, scoring
from preference_tuning.models.published import Published
from preference_tuning.progress import bar
from preference_tuning.registry.roundtrip import RoundTrip, RoundTripJob


def round_trip(job: RoundTripJob) -> RoundTrip:
    """Load the model of a job in the precision of its probes, and compare."""
    probes = probes_of.read(job.probes)
    on_cpu = compute.device_of(job.base_model) == "cpu"
    # A CPU has no fast float16; float32 lies well within what float16 may differ by.
    dtype = "float32" if on_cpu and probes.dtype == "float16" else probes.dtype
    config = job.base_model.model_copy(update={"dtype": dtype})
    chosen = compute.choose(config, job.output_dir)
    loaded = published.load(config, job.source, job.model, job.output_dir, chosen)
    return compare(loaded, probes, probes.tolerance)


def compare(loaded: Published, probes: Probes, tolerance: float) -> RoundTrip:
    """Return how far a loaded model is from its probes."""
    differences: list[float] = []
    with bar("scoring probes", len(probes.probes)) as progress:
        for probe in probes.probes:
            found = loaded.token_logps(probe.prompt_ids, probe.answers)
            for now, then in zip(found, probe.logps, strict=True):
                differences += [abs(a - b) for a, b in zip(now, then, strict=True)]
            progress.update()
    return RoundTrip(
        device=loaded.device.type,
        dtype=str(loaded.dtype).removeprefix("torch."),
        measured_in=probes.dtype,
        tokens=len(differences),
        # max() would pass over a NaN.
        largest=math.inf if any(map(math.isnan, differences)) else max(differences, default=0.0),
        mean=sum(differences) / max(1, len(differences)),
        tolerance=tolerance,
        mean_tolerance=scoring.OF_MEAN * tolerance,
        text=list(_text(loaded.tokenizer, probes)),
    )


def _text(tokenizer: chat.Tokenizer, probes: Probes) -> Iterator[str]:
    if tokenizer.chat_template is None:
        yield "there is no chat template"
        return
    if chat.template_hash(tokenizer) != probes.template_hash:
        yield "the chat template is another one"
    for probe in probes.probes:
        if problem := _prompt(tokenizer, probe):
            yield f"pair {probe.content[:16]}: {problem}"
            return


def _prompt(tokenizer: chat.Tokenizer, probe: Probe) -> str | None:
    """Return how the prompt of a probe is read otherwise than it was, or None."""
    text = chat.render(tokenizer, probe.messages, probe.tools, answer=True)
    if text != probe.text:
        place = next((i for i, (a, b) in enumerate(zip(text, probe.text, strict=False)) if a != b), -1)
        return f"its prompt is rendered as another text, from character {place} on: {text[place : place + 20]!r}"
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if ids != probe.text_ids:
        return f"its prompt is read as other tokens ({len(ids)}, and {len(probe.text_ids)} when it was measured)"
    return None
