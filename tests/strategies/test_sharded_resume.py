"""Checkpoints of FSDP2, sharded or in one file: parameters go on by name when the groups have changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import FSDP2_RUNS_ON_CPU, run_python

pytestmark = pytest.mark.skipif(not FSDP2_RUNS_ON_CPU, reason="this torch does not run FSDP2 on CPUs")


@pytest.fixture(scope="module", params=["distributed", "full"])
def reports(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("resume")
    program = Path(__file__).with_name("sharded_resume_run.py")
    run_python(program, request.param, out, cwd=out, timeout=240, may_abort=True)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def test_goes_on_bit_for_bit_in_other_groups(reports):
    for report in reports:
        assert report["as_never_stopped"]


def test_learning_rates_follow_their_parameters(reports):
    slow, fast = pytest.approx(0.001 * 0.1**4), pytest.approx(0.01 * 0.1**4)
    for report in reports:
        assert report["lrs"] == {"head": slow, "first": fast, "mixed": slow, "last": fast, "others": slow}


def test_schedules_go_on_where_they_were(reports):
    for report in reports:
        assert report["schedule"] == pytest.approx([0.3 * step / 12 for step in range(12)])
        assert report["resumed_schedule"] == pytest.approx(report["schedule"][8:])


def test_changed_rules_win(reports):
    for report in reports:
        live = pytest.approx(0.3 * 11 / 12)
        assert report["changed"] == {"scale": live, "vectors": 0.5, "matrices": live}


def test_parameters_of_other_learning_rates_cannot_join(reports):
    for report in reports:
        assert "joins parameters whose initial_lr differs in the checkpoint" in report["joined"]


def test_param_groups_hold_what_they_held_before(reports):
    for report in reports:
        assert not [key for key in report["keys"] if key.startswith("whole_group_")]
