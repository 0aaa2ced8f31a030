"""Rules in force in the optimizers of others, under FSDP2 and in ZeroRedundancyOptimizer under DDP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import FSDP2_RUNS_ON_CPU, run_python


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    out = tmp_path_factory.mktemp("theirs")
    run_python(Path(__file__).with_name("theirs_run.py"), out, cwd=out, timeout=300, may_abort=True)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def sharded(reports):
    if not FSDP2_RUNS_ON_CPU:
        pytest.skip("this torch does not run FSDP2 on CPUs")
    return [report["fsdp2"] for report in reports]


def test_zero_redundancy_trains_as_with_groups_by_hand(reports):
    for report in reports:
        zero = report["zero"]
        assert zero["as by hand"]
        assert zero["mixin as by hand"]
        assert zero["groups"] == 2
        assert zero["steps"] == [8, 8]


def test_fsdp2_trains_as_with_groups_by_hand(sharded):
    for report in sharded:
        assert report["as by hand"]
        assert report["callback as by hand"]


def test_param_groups_stay_theirs(sharded):
    for report in sharded:
        assert report["groups"] == 2
        assert report["keys"] == []


def test_each_part_is_named(sharded):
    for report in sharded:
        assert report["in force"] == {"rest": 0.3, "bias": 0.0, "norm": 0.05, "head.rest": 0.3, "head.bias": 0.0}


def test_rules_are_added_to_an_old_run(sharded):
    for report in sharded:
        assert report["rules added"] == [0.3, 0.0, 0.05, 0.3, 0.0]


def test_schedules_go_on_where_they_were(sharded):
    for report in sharded:
        assert report["whole"] == pytest.approx([0.6 * (1 - step / 12) for step in range(12)])
        assert report["resumed"] == report["whole"][8:]


@pytest.mark.parametrize("checkpoint", ["schedule added", "schedule added, in one file"])
def test_a_schedule_that_is_added_counts_the_steps_of_the_old_run(sharded, checkpoint):
    for report in sharded:
        assert report[checkpoint] == report["whole"][8:]
