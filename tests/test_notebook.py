"""A notebook that is run: what the last line of a cell shows, as HTML and as text."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

SETUP = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]}
from helpers import LitRules, trainer
from lightning_regdecay import WeightDecayMonitor, compare, groups_in_force
model, monitor = LitRules(), WeightDecayMonitor(summary=False)
"""
CELLS = {
    "groups": "model.decay_groups",
    "explanation": "model.decay_groups.explain('head.bias')",
    "comparison": "compare(model, model.decay_rules, {'*.bias': 0.0, '*': 0.1})",
    "monitor before": "monitor",
    "fit": "trainer = trainer(callbacks=[monitor]); trainer.fit(model)",
    "in force": "groups_in_force(trainer.optimizers[0])",
    "monitor": "monitor",
    "table": "monitor.table",
}


@pytest.fixture(scope="module")
def shown():
    """What each cell shows: its output by type."""
    cells = [nbformat.v4.new_code_cell(source) for source in (SETUP, *CELLS.values())]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    results = [[one.data for one in cell.outputs if one.output_type == "execute_result"] for cell in notebook.cells[1:]]
    return {name: result[0] for name, result in zip(CELLS, results) if result}


OF_RULES = ["group", "rule", "tensors", "parameters", "weight_decay", "lr"]
OF_FIGURES = ["group", "l2_norm", "penalty", "weight_decay"]


@pytest.mark.parametrize(
    ("name", "header"),
    [("groups", OF_RULES), ("in force", OF_RULES), ("monitor", OF_FIGURES), ("table", OF_FIGURES)],
)
def test_tables(shown, name, header):
    page, text = shown[name]["text/html"], shown[name]["text/plain"]
    assert page.startswith("<table>")
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert rows[0] == header
    first = ["group", "bias", "norm", "head", "rest", "total"]
    assert [row[0] for row in rows] == [line.split()[0] for line in text.splitlines()] == first


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("explanation", "head.bias (1 dimensions, in Linear) is in group 'bias', weight_decay 0"),
        ("comparison", "3 of 6 tensors move, 1,200 of 1,242 parameters"),
        ("monitor before", "WeightDecayMonitor: nothing was logged yet"),
    ],
)
def test_text_of_several_lines(shown, name, first):
    page, text = shown[name]["text/html"], shown[name]["text/plain"]
    assert text.splitlines()[0] == first
    assert html.unescape(page) == f"<pre>{text}</pre>"
