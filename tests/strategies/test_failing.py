"""A rank that raises does not leave the others hanging without a message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_other_rank_ends_with_a_message(tmp_path):
    script, store = Path(__file__).with_name("failing_run.py"), tmp_path / "store"
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), store], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert "unknown groups ['typo']" in errors[1]
    assert ranks[0].returncode != 0
    assert any(text in errors[0] for text in ("closed by peer", "reset by peer", "Broken pipe"))
