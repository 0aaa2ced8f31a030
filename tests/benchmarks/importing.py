"""The time of ``import lightning_regdecay`` where lightning is imported already, in new processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from measuring import Row, Sizes, time_text

LATER = ("rich", "matplotlib", "jsonargparse")
CODE = f"""
import sys, time
import lightning
before = set(sys.modules)
start = time.perf_counter()
import lightning_regdecay
print(time.perf_counter() - start, *(name for name in {LATER} if name in set(sys.modules) - before))
"""


def rows(sizes: Sizes) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "PYTHONPATH": str(Path(__file__).parents[2])}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        runs = [
            subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=True).stdout
            for _ in range(min(sizes.rounds, 9) + 1)
        ]
    seconds = median(float(run.split()[0]) for run in runs[1:])  # the first one compiles
    imported = {name for run in runs for name in run.split()[1:]}
    yield Row("import lightning_regdecay", "after lightning", time_text(seconds), goal="≤ 30 ms")
    yield Row(f"imports {', '.join(LATER)}", "on import", ", ".join(sorted(imported)) or "none", goal="none")
