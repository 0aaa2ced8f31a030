"""DeepSpeed ZeRO 1 to 3, by DeepSpeed's own engine on the CPU where it is installed: Lightning needs a GPU for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run_python
from strategies.sharded_run import EXPECTED

pytest.importorskip("deepspeed", reason="needs deepspeed, which the extras do not bring: pip install deepspeed")


@pytest.fixture(scope="module", params=[1, 2, 3])
def stage(request):
    return request.param


@pytest.fixture(scope="module")
def reports(stage, tmp_path_factory):
    out = tmp_path_factory.mktemp("zero")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 3]
    run_python(*torchrun, Path(__file__).with_name("zero_run.py"), stage, out, cwd=out, timeout=240)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(3)]


def test_groups_and_weight_decay_are_those_of_one_process(reports):
    for report in reports:
        assert report["groups"] == EXPECTED
        # On a schedule from 0 to 0.1 over 10 steps: 3 are done, and the start of a fit sets the λ of the next.
        assert report["weight_decay_of_the_third_step"] == pytest.approx(0.02)
        assert report["weight_decay"] == {"scale": 0.02, "vectors": 0.0, "up": 0.01, "linear": pytest.approx(0.03)}
        assert report["table"].splitlines()[-1].split() == ["total", "9", "1,291"]


def test_norms_are_those_of_the_whole_parameters_on_every_rank(reports):
    for report in reports:
        assert report["norms"] == pytest.approx(report["truths"], rel=1e-6)
        assert report["norms_of_gathered"] == pytest.approx(report["truths"], rel=1e-6)
        assert report["norms"] == reports[0]["norms"]


def test_one_collective_where_parameters_are_partitioned(stage, reports):
    for report in reports:
        assert report["collectives"] == ({"c10d.allreduce_": 1} if stage == 3 else {})


def test_rules_for_parts_and_starts_are_an_error(reports):
    for report in reports:
        assert all(error.startswith("DeepSpeed steps parameters of its own, so that") for error in report["by element"])
