"""FSDP2, tensor parallel and both: the groups of one process, the norms of whole parameters, one collective."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import FSDP2_RUNS_ON_CPU, run_python
from strategies.sharded_run import EXPECTED

WAYS = {
    "one process": 1,
    "fsdp": 2,
    "fsdp nested": 3,  # uneven shards
    "fsdp nested keep": 2,  # reshard_after_forward=False
    "fsdp mixed": 2,  # a mixed precision policy
    "fsdp tensor": 4,  # 2 x 2: data parallel x tensor parallel
    "fsdp nested hybrid": 4,  # 2 x 2: replicas x shards
}


@pytest.fixture(scope="module", params=WAYS.items(), ids=list(WAYS))
def reports(request, tmp_path_factory):
    """What each rank of one run wrote down."""
    way, devices = request.param
    if devices > 1 and not FSDP2_RUNS_ON_CPU:
        pytest.skip("this torch does not run FSDP2 on CPUs")
    out = tmp_path_factory.mktemp("sharded")
    run_python(Path(__file__).with_name("sharded_run.py"), way, devices, out, cwd=out, timeout=180)
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in range(devices)]
    assert all(report["world_size"] == devices for report in found)
    return found


def test_groups_and_weight_decay_are_those_of_one_process(reports):
    for report in reports:
        assert report["groups"] == EXPECTED
        assert report["weight_decay"] == {"scale": 0.02, "vectors": 0.0, "up": 0.01, "linear": 0.05}


def test_every_rank_logs_the_figures_of_the_whole_parameters(reports):
    for report in reports:
        assert report["history"] == reports[0]["history"]
        assert [record["step"] for record in report["history"]] == [3, 4, 6, 8]
        for record, truth in zip(report["history"], report["truths"], strict=True):
            for name, norm in truth.items():
                decay = report["weight_decay"][name]
                assert record[f"decay/{name}/l2_norm"] == pytest.approx(norm, rel=1e-6)
                assert record[f"decay/{name}/penalty"] == pytest.approx(0.5 * decay * norm**2, rel=1e-6)


def test_every_rank_logs_what_a_step_did_to_the_whole_parameters(reports):
    for report in reports:
        assert report["largest"] == reports[0]["largest"]
        assert report["largest"]["scale"] == "net.scale"
        for record, truth in zip(report["history"], report["steps"], strict=True):
            for name, figures in truth.items():
                for figure, value in figures.items():
                    key = f"decay/{name}/{figure}"
                    # A change of the length alone, as of one element, hides a small angle.
                    least = (2e-7 * figures["update_ratio"]) ** 0.5 if figure == "angle" else 0.0
                    assert record[key] == pytest.approx(value, rel=1e-5, abs=least), key


def test_one_collective_for_each_event_and_none_where_nothing_is_sharded(reports):
    expected = {} if len(reports) == 1 else {"c10d.allreduce_": 1}
    for report in reports:
        assert report["collectives"] == [expected] * 4


def test_training_is_bit_for_bit_that_of_groups_written_by_hand(reports):
    assert all(report["as_by_hand"] for report in reports)


def test_the_model_was_really_sharded(reports):
    if len(reports) == 1:
        return
    for report in reports:
        assert report["types"] == ["DTensor"]
        assert report["elements_here"] < 1291
    assert any(report["empty_parts"] for report in reports)
