"""What pytest leaves alone: programs that tests or users run."""

collect_ignore_glob = ["strategies/*_run.py", "benchmarks/*"]
