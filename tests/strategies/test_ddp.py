"""DDP: two processes see what one sees, and ask each other nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from helpers import run_python


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    out = tmp_path_factory.mktemp("ddp")
    for devices in (1, 2):
        run_python(Path(__file__).with_name("ddp_run.py"), devices, out, cwd=out, timeout=180)
    reports = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert set(reports) == {"1-0", "2-0", "2-1"}
    return {**reports, "out": out}


def test_both_ranks_log_the_figures_of_one_process(reports):
    assert reports["2-0"]["world_size"] == reports["2-1"]["world_size"] == 2
    assert [record["step"] for record in reports["1-0"]["history"]] == [3, 4, 6, 8]
    for rank in ("2-0", "2-1"):
        assert reports[rank]["groups"] == reports["1-0"]["groups"]
        assert reports[rank]["history"] == reports["1-0"]["history"]
        assert reports[rank]["callback_metrics"] == reports["1-0"]["callback_metrics"]


def test_the_figures_are_right(reports):
    for rank in ("1-0", "2-0", "2-1"):
        for name, norm in reports[rank]["truth"].items():
            assert reports[rank]["history"][-1][f"decay/{name}/l2_norm"] == pytest.approx(norm, rel=1e-6)


def test_no_collective_is_made(reports):
    assert reports["2-0"]["counted_by_hand"] == 1
    assert reports["2-0"]["collectives"] == reports["2-1"]["collectives"] == 0


def test_rank_zero_alone_writes(reports):
    rows = {}
    for devices in (1, 2):
        with open(reports["out"] / f"logs{devices}" / "metrics.csv") as file:
            rows[devices] = [row for row in csv.DictReader(file) if row["decay/total/penalty"]]
    assert len(rows[2]) == 4
    assert rows[1] == rows[2]
