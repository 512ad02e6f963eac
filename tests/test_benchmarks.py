"""Benchmarks that reach into the pipeline: what they put a clock around is still there."""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_the_clock_of_overhead_finds_its_parts(tmp_path: Path) -> None:
    code = "import overhead, run; clock = overhead.Clock(); overhead._watch(clock); print('all there')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"ZENML_CONFIG_PATH": str(tmp_path), "PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "all there\n", done.stderr
