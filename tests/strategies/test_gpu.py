"""Lightning's FSDPStrategy and DeepSpeedStrategy, which refuse CPUs: all GPUs of the machine against one process."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers import run_python
from strategies.sharded_run import EXPECTED


def run(name, accelerator, devices, out):
    script = Path(__file__).with_name("gpu_run.py")
    run_python(script, name, accelerator, devices, out, cwd=out, timeout=300, may_abort=True)
    return [json.loads((out / f"{name}-{rank}.json").read_text()) for rank in range(devices)]


def check(reports, reference):
    """Every rank has the groups of one process and, training the same on all ranks, its figures."""
    for report in reports:
        assert report["groups"] == EXPECTED
        assert report["history"] == reports[0]["history"]
        assert len(report["history"]) == len(reference["history"]) == 4
        for record, expected in zip(report["history"], reference["history"]):
            # Sums on the GPU are added in another order, so the runs part by rounding errors.
            assert record == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    (report,) = run("auto", "cpu", 1, tmp_path_factory.mktemp("reference"))
    return report


def test_ddp_on_the_cpu(tmp_path, reference):
    check(run("ddp", "cpu", 2, tmp_path), reference)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["ddp", "FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
def test_fsdp(tmp_path, reference, name):
    check(run(name, "gpu", torch.cuda.device_count(), tmp_path), reference)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed(tmp_path, reference, stage):
    check(run(f"deepspeed{stage}", "gpu", torch.cuda.device_count(), tmp_path), reference)
