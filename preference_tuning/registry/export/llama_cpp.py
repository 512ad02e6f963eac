"""GGUF through the user's own llama.cpp: its converter, and its quantiser where that was built."""

import os
import re
import subprocess
import sys
from pathlib import Path

from preference_tuning.errors import ConfigError, PreferenceTuningError
from preference_tuning.models.merging import Precision
from preference_tuning.progress import bar

VARIABLE = "LLAMA_CPP_DIR"
CONVERTER, QUANTISER = "convert_hf_to_gguf.py", "llama-quantize"
BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
"""The converter's types, and how many bytes a parameter takes."""
QUANTISED = re.compile(r"^(q[2-8]_[a-z0-9_]+|iq[1-4]_[a-z]+)$")
"""Types that the quantiser makes, such as q4_k_m."""
BYTES_QUANTISED = 5 / 8
"""Of a parameter in one of these, roughly; only the progress bar needs it."""
PLACES = (".", "build/bin", "bin")


class LlamaCpp:
    """A llama.cpp folder of the user's."""

    def __init__(self, folder: Path | None) -> None:
        """Take the folder, or the one that LLAMA_CPP_DIR names.

        Raises:
            ConfigError: there is none, or no converter in it.
        """
        named = folder or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
        if named is None:
            raise ConfigError(
                f"export: GGUF is written by llama.cpp's converter; name its folder with --llama-cpp or {VARIABLE}"
            )
        self.folder = named.expanduser().absolute()
        if not (self.folder / CONVERTER).is_file():
            raise ConfigError(f"export: {self.folder} has no {CONVERTER}; name the folder of llama.cpp's sources")

    def check(self, outtype: str) -> None:
        """Make sure that a type can be made.

        Raises:
            ConfigError: it is unknown, or needs the quantiser, which is not there.
        """
        if outtype in BYTES:
            return
        if not QUANTISED.match(outtype):
            raise ConfigError(f"export: unknown type {outtype!r}; give {', '.join(BYTES)}, or such as q4_k_m")
        if self._quantiser is None:
            raise ConfigError(
                f"export: {outtype} is made by {QUANTISER}, which is not in {self.folder} (looked in "
                f"{', '.join(PLACES)}): build llama.cpp, or take one of {', '.join(BYTES)}"
            )

    def convert(self, model: Path, target: Path, outtype: str, parameters: int, log: Path) -> None:
        """Write a model directory as a GGUF file.

        Args:
            model: of the merged model.
            target: the file.
            outtype: one that ``check`` accepts.
            parameters: of the model, for the progress bar.
            log: a file for what the programs say.

        Raises:
            PreferenceTuningError: the converter or the quantiser failed, with its reason.
        """
        direct = outtype in BYTES
        first, kind = (target, outtype) if direct else (target.with_suffix(".f16"), "f16")
        command = [str(self._python), str(self.folder / CONVERTER), str(model)]
        _run([*command, "--outfile", str(first), "--outtype", kind], CONVERTER, log, first, BYTES[kind] * parameters)
        if not direct:
            command = [str(self._quantiser), str(first), str(target), outtype.upper()]
            _run(command, QUANTISER, log, target, BYTES_QUANTISED * parameters)
            first.unlink()

    @property
    def _quantiser(self) -> Path | None:
        """The program that makes the smaller types, if it was built."""
        found = (self.folder / place / QUANTISER for place in PLACES)
        return next((path for path in found if path.is_file()), None)

    @property
    def _python(self) -> Path:
        """The converter's own Python, if it has one, because it needs packages that we do not; else ours."""
        own = (self.folder / name / "bin" / "python" for name in (".venv", "venv"))
        return next((path for path in own if path.is_file()), Path(sys.executable))


def merged_as(outtype: str) -> Precision:
    """Return the precision in which the converter is given the model: so that 16 bits are rounded to once."""
    kinds: dict[str, Precision] = {"f32": "float32", "bf16": "bfloat16"}
    return kinds.get(outtype, "float16")


def _run(command: list[str], name: str, log: Path, output: Path, size: float) -> None:
    """Run a program, showing how its output grows.

    Raises:
        PreferenceTuningError: it failed, or wrote nothing.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as stream, bar(f"{name}: {output.name}", int(size), unit="B") as progress:
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            while (code := _ended(child)) is None:
                written = output.stat().st_size if output.exists() else 0
                progress.update(max(0, written - progress.n))
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if code:
        raise PreferenceTuningError(f"export: {name} failed: {_reason(log)}")
    if not output.is_file():
        raise PreferenceTuningError(f"export: {name} wrote no file; what it said is in {log}")


def _ended(child: "subprocess.Popen[bytes]") -> int | None:
    try:
        return child.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return None


def _reason(log: Path) -> str:
    """Return why a program failed, from what it said."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if found := re.search(r"No module named '([\w.]+)'", text):
        return (
            f"its Python has no {found[1]}; install it there (requirements/ in llama.cpp lists what it needs), or give "
            "llama.cpp a .venv of its own"
        )
    if "pre-tokenizer was not recognized" in text:
        return (
            "it does not know how the tokenizer of this model splits text, and runtimes of GGUF would not either; a "
            "newer llama.cpp may (see convert_hf_to_gguf_update.py there)"
        )
    if found := re.search(r"Model (\S+) is not supported", text):
        return f"it does not know the architecture {found[1]}"
    said = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{said[-1] if said else 'it said nothing'} (all of it is in {log})"
