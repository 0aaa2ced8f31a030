"""Tables: as plain text, in notebooks, in consoles with rich."""

from __future__ import annotations

import html
import io
import re

import pytest
import torch
from helpers import LitRules, Net, trainer

from lightning_regdecay import WeightDecayMonitor, apply_decay_rules, build_decay_groups, compare, groups_in_force
from lightning_regdecay.groups.tables import Table

RULES = {"re:[b]ias$": 0.0, "*": 0.1}


def in_force():
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    apply_decay_rules(optimizer, net, RULES)
    return groups_in_force(optimizer)


def cells(shown):
    found = re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", shown._repr_html_())
    return [html.unescape(cell) for cell in found]


SHOWN = {"groups": lambda: build_decay_groups(Net(), RULES), "in force": in_force}


@pytest.mark.parametrize("make", SHOWN.values(), ids=SHOWN)
class TestGroups:
    def test_text_and_notebooks_show_the_same_cells(self, make):
        shown = make()
        rows = [re.split(" {2,}", line) for line in str(shown).splitlines()]
        assert [cell for row in rows for cell in row] == [cell for cell in cells(shown) if cell]

    def test_in_a_console_with_rich(self, make):
        console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=120)
        shown = make()
        console.print(shown)
        printed = console.file.getvalue()
        assert all(cell in printed for cell in cells(shown))  # brackets of patterns too, which are markup to rich


def test_the_groups_in_force_stay_a_list_of_dictionaries():
    groups = in_force()
    assert isinstance(groups, list)
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.1]
    assert "re:[b]ias$" in str(groups)


def test_markup_in_names_is_text():
    table = Table(("a", "b"), [["<script>", "1"]], left=1, has_total=False)
    assert "<script>" not in table._repr_html_()
    assert "&lt;script&gt;" in table._repr_html_()


def test_explanations_and_comparisons_keep_their_lines_in_notebooks():
    text = build_decay_groups(Net(), RULES).explain("body.bias")
    assert html.unescape(text._repr_html_()) == f"<pre>{text}</pre>"
    other = compare(Net(), RULES, {"*": 0.1})
    assert other._repr_html_().count("\n") == str(other).count("\n") > 0


def test_the_monitor_shows_the_figures_that_were_logged_last():
    monitor = WeightDecayMonitor(summary=False)
    assert "nothing was logged yet" in monitor._repr_html_()
    trainer(callbacks=[monitor]).fit(LitRules())
    last = monitor.history[-1]
    shown = cells(monitor)
    assert shown[:4] == ["group", "l2_norm", "penalty", "weight_decay"]
    assert shown[4:8] == ["bias", *(f"{last[f'decay/bias/{figure}']:.6g}" for figure in shown[1:4])]
    assert shown[-4:] == ["total", "", f"{last['decay/total/penalty']:.6g}", ""]


def test_in_a_notebook():
    formatters = pytest.importorskip("IPython.core.formatters")
    shown = formatters.DisplayFormatter().format(build_decay_groups(Net(), RULES))[0]
    assert shown["text/html"].startswith("<table>")
