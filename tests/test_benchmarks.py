"""The benchmarks run, and print what they say; how fast anything is, is no matter of a test."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import run_python

RUN = Path(__file__).parent / "benchmarks" / "run.py"


def test_one_command_prints_one_table(tmp_path):
    output = run_python(RUN, "--small", cwd=tmp_path, timeout=300)
    for start in (
        "norms, float32",
        "norms, bfloat16",
        "memory of one event",
        "an epoch, logged each epoch",
        "an epoch, logged every 50 steps",
        "AdamW step, fused",
        "AdamW step, foreach",
        "an event: all that ask for no step",
        "looking on at a step: updates",
        "groups by 10 rules",
        "configure_optimizers",
        "import lightning_regdecay",
    ):
        assert any(line.startswith(start) for line in output.splitlines()), start
    [imported] = [line for line in output.splitlines() if line.startswith("imports rich")]
    assert imported.split()[-1] == "none"


def test_the_cost_against_growth_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    run_python(RUN, "--small", "--growth", tmp_path / "growth.png", cwd=tmp_path, timeout=300)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_that_is_not_there_is_named(tmp_path):
    output = run_python(RUN, "--only", "norm", cwd=tmp_path, timeout=300, returncode=2)
    assert "unknown norm; known are norms, training, watching, grouping, importing" in output


@pytest.mark.parametrize("option", ["--growth", "--markdown"])
def test_a_folder_that_is_not_there_is_named_before_anything_is_measured(option, tmp_path):
    output = run_python(RUN, option, "nowhere/file", cwd=tmp_path, timeout=300, returncode=2)
    assert "there is no folder 'nowhere' to write 'file' to" in output
