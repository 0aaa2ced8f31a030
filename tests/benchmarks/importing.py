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
    seconds, *others = zip(*(run.split() for run in runs[1:]))  # the first one compiles
    yield Row("import lightning_regdecay", "after lightning", time_text(median(map(float, seconds))), goal="≤ 30 ms")
    yield Row(f"imports {', '.join(LATER)}", "on import", "yes" if others else "none", goal="none")
