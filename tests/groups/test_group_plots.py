"""Which parameter is in which group, as a picture."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lightning_regdecay import DecaySchedule, build_decay_groups
from lightning_regdecay.groups.plots import _strength

pytestmark = pytest.mark.usefixtures("no_window")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Linear(4, 4)


class Transformer(nn.Module):
    def __init__(self, depth=12):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 4))
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.head = nn.Linear(4, 2)


RULES = {"*.bias": 0.0, "*norm*": 0.0, "*": 0.05}


def drawn(rules, model=None):
    """Rows as {label: [(name, group, cell)]} with the cell a patch, the axes, and the texts of the legend."""
    figure, ax = build_decay_groups(Transformer() if model is None else model, rules).plot()
    figure.canvas.draw()
    texts = [text.get_text() for text in ax.texts]
    rows = {tick.get_text(): [] for tick in ax.get_yticklabels()}
    labels = list(rows)
    for name, group, patch in zip(texts[::2], texts[1::2], ax.patches):
        rows[labels[round(patch.get_y() + patch.get_height() / 2)]].append((name, group, patch))
    return rows, ax, [text.get_text() for text in ax.get_legend().get_texts()]


def colour(cell):
    return cell[2].get_facecolor()


def test_a_row_for_each_module_with_layers_put_together():
    rows, _, legend = drawn(RULES)
    assert {label: [cell[:2] for cell in cells] for label, cells in rows.items()} == {
        "(Transformer)": [("cls_token", "rest")],
        "layers.[0-11].norm  (12)": [("weight", "norm"), ("bias", "bias")],
        "layers.[0-11].mlp  (12)": [("weight", "rest"), ("bias", "bias")],
        "head": [("weight", "rest"), ("bias", "bias")],
    }
    assert legend == ["bias (λ 0)", "norm (λ 0)", "rest (λ 0.05)"]


def test_colours_go_by_the_weight_decay():
    rows, _, _ = drawn({"head.weight": 0.01, **RULES})
    (token,), (norm_weight, norm_bias), (mlp, _), (head, head_bias) = rows.values()
    assert colour(token) == colour(mlp)
    assert colour(norm_weight) == colour(norm_bias) == colour(head_bias)
    assert len({colour(token), colour(norm_weight), colour(head)}) == 3


def test_layers_that_differ_have_rows_of_their_own():
    rows, _, _ = drawn({"layers.3.mlp.weight": 0.1, **RULES})
    assert "layers.[0-2,4-11].mlp  (11)" in rows
    assert [cell[:2] for cell in rows["layers.3.mlp"]] == [("weight", "layers.3.mlp.weight"), ("bias", "bias")]


def test_what_goes_by_the_optimizers_own_is_striped():
    rules = [{"params": "*.bias", "decay_mult": 0.0}, {"params": "*norm*", "decay_mult": 0.5}]
    rows, _, legend = drawn(rules)
    (token,), (norm, bias), *_ = rows.values()
    assert token[1] == "default"
    assert token[2].get_hatch() == norm[2].get_hatch() == "//"
    assert bias[2].get_hatch() is None
    assert legend == ["bias (λ 0 x optimizer's)", "norm (λ 0.5 x optimizer's)", "default (λ optimizer's)"]


def test_a_list_of_schedules_has_the_colour_of_its_highest():
    stages = [{"schedule": "linear", "start": 0.0, "end": 0.4, "steps": 5}, {"schedule": "per_step", "start": 3.0}]
    assert _strength(build_decay_groups(nn.Linear(2, 1), {"*": stages})[0]) == 0.4


def test_schedules_are_dotted_in_the_colour_of_their_highest():
    rows, _, legend = drawn({"*mlp*": DecaySchedule("cosine", 0.04, 0.4), "head.*": 0.4, "*": 0.0})
    mlp, head = rows["layers.[0-11].mlp  (12)"][0], rows["head"][0]
    assert mlp[2].get_hatch() == "..."
    assert colour(mlp) == colour(head)
    assert legend[0] == "mlp (λ cosine 0.04 to 0.4)"


def test_a_timescale_has_no_value_yet():
    rows, _, _ = drawn({"*": DecaySchedule("timescale", steps=100)}, nn.Linear(2, 1))
    assert rows["(Linear)"][0][2].get_hatch() == "..."


def test_frozen_and_tied_parameters():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "body": nn.Linear(4, 4), "out": nn.Linear(4, 4, bias=False)})
    model["out"].weight = model["embed"].weight
    model["body"].requires_grad_(False)
    rows, _, legend = drawn({"*": 0.1}, model)
    assert {label: [cell[:2] for cell in cells] for label, cells in rows.items()} == {
        "embed": [("weight", "rest")],
        "out": [("weight (tied)", "rest")],
        "body": [("weight", "frozen"), ("bias", "frozen")],
    }
    assert legend == ["rest (λ 0.1)", "frozen, in no group"]


def test_many_groups_have_a_colour_bar():
    rules = {**{f"layers.{i}.*": 0.1 * 0.9**i for i in range(30)}, "*": 0.0}
    _, ax, legend = drawn(rules, Transformer(30))
    assert legend == ["λ 0"]
    assert [other.get_ylabel() for other in ax.figure.axes] == ["", "weight decay λ"]


def test_on_axes_of_the_user():
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    assert build_decay_groups(nn.Linear(2, 1), {"*": 0.1}).plot(ax) == (figure, ax)


def test_what_are_no_axes():
    with pytest.raises(TypeError, match="ax must be matplotlib axes, got 5"):
        build_decay_groups(nn.Linear(2, 1), {"*": 0.1}).plot(5)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"plot\(\) needs matplotlib: pip install matplotlib"):
        build_decay_groups(nn.Linear(2, 1), {"*": 0.1}).plot()
