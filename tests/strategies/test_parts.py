"""λ within tensors and toward a start, however tensors are cut up: as by hand on the whole ones, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import FSDP2_RUNS_ON_CPU, run_python

WAYS = {"fsdp2": 2, "fsdp2 tensor": 4, "fsdp1": 2, "zero": 2}
STRENGTHS = {"rest": 0.05, "up.i": 0.1, "up.f": 0.0, "up.g": 0.5, "columns": 0.4, "back": 0.3}


@pytest.fixture(scope="module", params=WAYS)
def reports(request, tmp_path_factory):
    if "fsdp2" in request.param and not FSDP2_RUNS_ON_CPU:
        pytest.skip("this torch does not run FSDP2 on CPUs")
    out = tmp_path_factory.mktemp("parts")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", WAYS[request.param]]
    program = Path(__file__).with_name("parts_run.py")
    run_python(*torchrun, program, request.param, out, cwd=out, timeout=240)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(WAYS[request.param])]


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_trains_as_by_hand_on_whole_tensors(reports, kind):
    for report in reports:
        assert all(report[kind]["as by hand"].values())
        assert report[kind]["groups"] == STRENGTHS


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_figures_are_those_of_the_whole_on_every_rank(reports, kind):
    for report in reports:
        found, truths, away = (report[kind][key] for key in ("found", "truths", "away"))
        assert {group: figures["l2_norm"] for group, figures in found.items()} == pytest.approx(truths, rel=1e-6)
        assert found["back"]["distance"] == pytest.approx(away, rel=1e-6)
        assert found["back"]["penalty"] == pytest.approx(0.5 * 0.3 * away**2, rel=1e-5)
        assert found["up.g"]["penalty"] == pytest.approx(0.5 * 0.5 * truths["up.g"] ** 2, rel=1e-5)
        assert report[kind]["collectives"] <= 1


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_a_sharded_checkpoint_has_the_start(reports, kind):
    for report in reports:
        assert report[kind].get("resumed", [True, True]) == [True, True]
