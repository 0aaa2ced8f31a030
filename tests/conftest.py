"""What pytest leaves alone: programs that tests or users run."""

collect_ignore_glob = ["*_run.py", "strategies/*_run.py", "benchmarks/*"]
