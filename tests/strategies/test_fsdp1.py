"""FSDP1, wrapped by hand: flattened parameters keep their names, dimensions, groups and norms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run_python
from strategies.sharded_run import EXPECTED

WAYS = {"FULL_SHARD": 3, "SHARD_GRAD_OP": 2, "NO_SHARD": 2, "HYBRID_SHARD": 4, "flat": 2}


def run(way, processes, out):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    run_python(*torchrun, Path(__file__).with_name("fsdp1_run.py"), way, out, cwd=out, timeout=180)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module", params=["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD"])
def way(request):
    return request.param


@pytest.fixture(scope="module")
def reports(way, tmp_path_factory):
    return run(way, WAYS[way], tmp_path_factory.mktemp("fsdp1"))


def test_groups_are_those_of_one_process(reports):
    # Each live tensor of the sharded ways has one dimension: by these max_ndim=1 would take all.
    assert all(report["groups"] == EXPECTED for report in reports)


def test_norms_are_those_of_the_whole_parameters_on_every_rank(reports):
    for report in reports:
        assert report["norms"] == pytest.approx(report["truths"], rel=1e-6)
        assert report["norms"] == reports[0]["norms"]


def test_parameters_that_are_there_as_a_whole_count_once(reports):
    for report in reports:
        assert report["norms_of_summoned"] == pytest.approx(report["truths"], rel=1e-6)


def test_one_collective_and_none_where_nothing_is_sharded(way, reports):
    for report in reports:
        assert report["collectives"] == ({} if way == "NO_SHARD" else {"c10d.allreduce_": 1})


def test_training_is_bit_for_bit_that_of_groups_written_by_hand(reports):
    assert all(report["as_by_hand"] for report in reports)


def test_the_table_counts_whole_parameters(way, reports):
    for report in reports:
        assert report["table"].splitlines()[-1].split() == ["total", "9", "1,291"]
        assert (report["elements_here"] < 1291) == (way != "NO_SHARD")


def test_flat_parameters_alone_are_an_error(tmp_path):
    for report in run("flat", 2, tmp_path):
        assert report["in a strategy"] == EXPECTED
        assert "wrap the model with use_orig_params=True" in report["flat"]
        assert "call build_decay_groups on the model with its outermost FSDP wrapper first" in report["unknown"]
