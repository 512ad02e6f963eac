"""How many processes a training job gets on this machine; found without loading torch here."""

import functools
import subprocess
import sys
from pathlib import Path

from preference_tuning.config import BaseModelConfig, TrainingConfig
from preference_tuning.errors import ConfigError

DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""One of these is there wherever torch could see a CUDA (or ROCm) device."""


def processes_of(training: TrainingConfig, model: BaseModelConfig) -> int:
    """Return how many processes train the model on this machine.

    Raises:
        ConfigError: more are asked for than there are CUDA devices, or one process is to shard.
    """
    devices = 0 if model.device == "cpu" else cuda_devices()
    if training.processes == "auto":
        count = 1 if model.backend == "unsloth" else max(1, devices)
    else:
        count = training.processes
        if devices and count > devices:
            raise ConfigError(f"training.processes: {count} are asked for, and {devices} CUDA devices are visible")
    if training.fsdp != "off" and count == 1:
        raise ConfigError("training.fsdp: one process has nothing to shard, and auto found one device; use fsdp: off")
    return count


@functools.cache
def cuda_devices() -> int:
    """Return how many CUDA devices torch sees. It is asked in a process of its own, and only beside a driver."""
    if not any(Path(path).exists() for path in DRIVERS):
        return 0
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0
