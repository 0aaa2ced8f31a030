"""What pytest leaves alone: programs that tests or users run. One thread for each worker, and for what it starts."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

collect_ignore_glob = ["*_run.py", "strategies/*_run.py", "benchmarks/*"]
