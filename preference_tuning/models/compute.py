"""What a model runs on: device, precision, attention, threads and kernels. Nothing else decides that.

On a CPU, what the config leaves open is measured, once for an output folder. A job keeps the choice that it began
with, so that an interrupted one goes on in the same arithmetic. torch is imported by the jobs only.
"""

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from preference_tuning import fingerprint, jobs
from preference_tuning.config import BaseModelConfig
from preference_tuning.errors import ConfigError
from preference_tuning.models import machine

FILE = "compute.json"
CLEARLY = 1.2
"""How many times as fast a candidate must be to replace the default: noise must not flip the choice."""
BUDGET = 0.3
"""Seconds for each of the two measurements: threads, then precision and attention."""
WISHES = {"backend", "device", "dtype", "attention", "threads"}

Candidate = TypeVar("Candidate", int, str)


class Compute(BaseModel):
    """What a model runs on, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16", "float16"]
    """Precision of the matrix products; adapter weights and sums stay in fp32."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "unsloth"]
    threads: int
    """CPU threads of one operation."""
    kernels: Literal["torch", "liger", "unsloth"] = "torch"
    """Whose normalisation, rotary embedding and gated MLP run."""
    measured: dict[str, float] = {}
    """``dtype/threads/tflops`` of matrix products and ``dtype/threads/attention_ms``; empty where nothing was open."""
    reason: str

    def speeds(self) -> str:
        """Return what each precision measured at the chosen number of threads, for a reader."""
        end = f"/{self.threads}/tflops"
        found = [f"{key.removesuffix(end)} {v:.2f} TFLOP/s" for key, v in self.measured.items() if key.endswith(end)]
        return ", ".join(found) or "nothing: all is fixed by config or rule"


class _Kept(BaseModel):
    """A choice, and what it holds for."""

    machine: dict[str, Any]
    circumstances: dict[str, Any]
    compute: Compute


def check_packages(config: BaseModelConfig) -> None:
    """Refuse a wish whose package is missing; needs no torch.

    Raises:
        ConfigError: flash_attention_2 without the flash_attn package.
    """
    if config.attention == "flash_attention_2" and not machine.has_package("flash_attn"):
        raise ConfigError(
            "base_model.attention: flash_attention_2 needs the package flash-attn, which is not installed; "
            "install it, or use auto"
        )


def choose(config: BaseModelConfig, output_dir: Path) -> Compute:
    """Return what a model runs on: as decided before in this output folder, else decided now and kept in it.

    Raises:
        ConfigError: the machine lacks what the config asks for.
    """
    here, circumstances = machine.describe(), _circumstances(config)
    key = fingerprint.of_value([here, circumstances])
    path = output_dir / FILE
    kept = _read(path)
    if key not in kept:
        kept[key] = _Kept(machine=here, circumstances=circumstances, compute=_decide(config))
        output_dir.mkdir(parents=True, exist_ok=True)
        jobs.write_json(path, {key: choice.model_dump(mode="json") for key, choice in kept.items()})
    return kept[key].compute


def of_job(config: BaseModelConfig, output_dir: Path, folder: Path) -> Compute:
    """Return what the job in ``folder`` runs on: the choice that it began with, as long as the machine is the same.

    On another machine with the same kind of device the precision stays; all else is decided anew.

    Raises:
        ConfigError: the machine lacks what the config asks for.
    """
    path, here = folder / FILE, machine.describe()
    began = _read(path).get("job")
    if began and began.machine == here:
        return began.compute
    if began and began.compute.device == device_of(config):
        config = config.model_copy(update={"dtype": began.compute.dtype})
    now = choose(config, output_dir)
    if began:
        was, goes_on = (f"{c.device} {c.dtype}, {c.threads} threads" for c in (began.compute, now))
        print(f"  this job began on another machine ({was}) and goes on with {goes_on}", file=sys.stderr)
    kept = _Kept(machine=here, circumstances=_circumstances(config), compute=now)
    jobs.write_json(path, {"job": kept.model_dump(mode="json")})
    return now


def _read(path: Path) -> dict[str, _Kept]:
    """Return the choices in a file; one that is missing or damaged holds none, and they are made anew."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {key: _Kept.model_validate(value) for key, value in stored.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _circumstances(config: BaseModelConfig) -> dict[str, Any]:
    """Return what a choice depends on beside the machine."""
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "torch": importlib.metadata.version("torch"),
        "liger": machine.has_package("liger_kernel"),
        "config": config.model_dump(mode="json", include=WISHES),
    }


def device_of(config: BaseModelConfig) -> Literal["cpu", "cuda"]:
    """Return the kind of device.

    Raises:
        ConfigError: cuda is asked for and not there.
    """
    import torch

    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise ConfigError("base_model.device: cuda is asked for, and torch sees no CUDA device")
    return "cuda" if there and config.device != "cpu" else "cpu"


def _decide(config: BaseModelConfig) -> Compute:
    if device_of(config) == "cpu":
        return _on_cpu(config)
    check_packages(config)
    return _on_cuda(config)


def _on_cuda(config: BaseModelConfig) -> Compute:
    """Decide by rule: bfloat16 where the GPU itself has it (older ones only emulate it), SDPA, Liger if installed."""
    import torch

    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if config.dtype == "auto":
        dtype, reason = ("bfloat16", "the GPU has it") if has_bfloat16 else ("float16", "the GPU has no bfloat16")
    else:
        dtype, reason = config.dtype, "as configured"
    common = {"device": "cuda", "dtype": dtype, "threads": config.threads or torch.get_num_threads()}
    common["reason"] = f"dtype {dtype}: {reason}"
    if config.backend == "unsloth":
        return Compute(attention="unsloth", kernels="unsloth", **common)
    attention = "sdpa" if config.attention == "auto" else config.attention
    return Compute(attention=attention, kernels="liger" if machine.has_package("liger_kernel") else "torch", **common)


def _on_cpu(config: BaseModelConfig) -> Compute:
    """Decide by measuring what the config leaves open: first the threads, then precision and attention.

    In float32 attention is SDPA without a measurement: the backward of eager's softmax depends on the number of
    threads, and float32 is the precision in which a run is the same bytes everywhere.
    """
    from preference_tuning.models import probe

    _check_cpu(config)
    dtypes = ["float32", "bfloat16"] if config.dtype == "auto" else [config.dtype]
    kinds = {dtype: _attentions(config, dtype) for dtype in dtypes}
    candidates = _thread_candidates(config)
    measured: dict[str, float] = {}
    threads = candidates[0]
    if len(candidates) > 1:
        first = (dtypes[0], kinds[dtypes[0]][0])
        seconds, measured = probe.layers((probe.Way(*first, number) for number in candidates), BUDGET)
        threads = prefer({way.threads: taken for way, taken in seconds.items()})
    dtype, attention = dtypes[0], kinds[dtypes[0]][0]
    ways = [probe.Way(dtype, kind, threads) for dtype in dtypes for kind in kinds[dtype]]
    if len(ways) > 1:
        seconds, figures = probe.layers(ways, BUDGET)
        measured |= figures
        dtype = prefer({d: min(seconds[w] for w in ways if w.dtype == d) for d in dtypes})
        attention = prefer({w.attention: seconds[w] for w in ways if w.dtype == dtype})
    told = [_reason("dtype", dtype, dtypes), _reason("attention", attention, kinds[dtype])]
    told.append(_reason("threads", threads, candidates))
    return Compute(
        device="cpu", dtype=dtype, attention=attention, threads=threads, measured=measured, reason="; ".join(told)
    )


def _check_cpu(config: BaseModelConfig) -> None:
    if config.attention == "flash_attention_2":
        raise ConfigError("base_model.attention: flash_attention_2 needs a CUDA GPU, and none is visible; use auto")
    if config.dtype == "float16":
        raise ConfigError("base_model.dtype: float16 does not train on a CPU; use auto, bfloat16 or float32")


def _attentions(config: BaseModelConfig, dtype: str) -> list[str]:
    if config.attention != "auto":
        return [config.attention]
    return ["sdpa"] if dtype == "float32" else ["sdpa", "eager"]


def _thread_candidates(config: BaseModelConfig) -> list[int]:
    """Return the numbers of threads to choose from, the default first: torch's own, which obeys OMP_NUM_THREADS."""
    import torch

    if config.threads is not None:
        return [config.threads]
    default = torch.get_num_threads()
    return [default] if os.environ.get("OMP_NUM_THREADS") else list(dict.fromkeys([default, machine.usable_cpus()]))


def prefer(seconds: dict[Candidate, float]) -> Candidate:
    """Return the first candidate, or the fastest one if that is clearly faster."""
    first, fastest = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
    return fastest if seconds[first] >= CLEARLY * seconds[fastest] else first


def _reason(name: str, chosen: object, candidates: list[Any]) -> str:
    others = " and ".join(str(other) for other in candidates if other != chosen)
    return f"{name} {chosen}: " + (f"measured against {others}" if others else "fixed by config or rule")
