"""What tests share, and what pytest leaves alone: programs that tests or users run.

One thread for each worker, and for what it starts.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

collect_ignore_glob = ["*_run.py", "strategies/*_run.py", "benchmarks/*"]


@pytest.fixture
def no_window():
    """Plots are drawn without a window, and closed."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    yield
    matplotlib.pyplot.close("all")
