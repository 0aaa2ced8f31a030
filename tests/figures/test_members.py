"""Figures of parts of tensors, and of what decays toward a start: against float64 on the elements themselves."""

from __future__ import annotations

import pytest
import torch
from helpers import trainer
from optim.test_by_element import INSIDE, LitOver, net, toward
from torch import nn

from lightning_regdecay import WeightDecayMonitor, apply_decay_rules, groups_in_force
from lightning_regdecay.figures.measuring import Measurer, live_groups

STEP = ("grad_norm", "update_ratio", "angle", "decay_share")


class Recording(LitOver):
    """Notes all tensors around each step."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.02)
        self.before, self.gradients = [], []
        return optimizer

    def on_before_optimizer_step(self, optimizer):
        self.before.append({name: p.detach().double().clone() for name, p in self.named_parameters()})

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        self.gradients.append({name: p.grad.double() for name, p in self.named_parameters()})


def chosen(values, group):
    """The elements of a group of INSIDE among those of all tensors, in one vector."""
    blocks = {"qkv.q": slice(0, 3), "qkv.k": slice(3, 6), "qkv.v": slice(6, 9)}
    if group in blocks:
        parts = [values["0.weight"][blocks[group]], values["0.bias"][blocks[group]]]
    elif group == "last":
        parts = [values["2.weight"][1:]]
    elif group == "columns":
        parts = [values["1.weight"][:, [0, 2, 5]]]
    else:
        others = [1, 3, 4, 6, 7, 8]
        parts = [values["1.weight"][:, others], values["1.bias"], values["2.weight"][:1], values["2.bias"]]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.filterwarnings("error:.*was called before the .*update.* method")
def test_all_figures_of_parts_are_those_of_their_elements():
    torch.manual_seed(0)
    lit = Recording(net(), INSIDE)
    monitor = WeightDecayMonitor(figures="all", every_n_steps=1, summary="both")
    trainer(max_epochs=4, callbacks=[monitor]).fit(lit)
    last = {key.removeprefix("decay/"): value for key, value in monitor.history[-1].items()}
    after = {name: p.detach().double() for name, p in lit.named_parameters()}
    strengths = {"qkv.q": 0.1, "qkv.k": 0.5, "qkv.v": 0.0, "last": 0.3, "columns": 0.06, "rest": 0.05}
    assert {key.split("/")[0] for key in last} == {*strengths, "total", "epoch", "step"}
    for group, decay in strengths.items():
        new, old, gradient = (chosen(v, group) for v in (after, lit.before[-1], lit.gradients[-1]))
        step = new - old
        expected = {
            "l2_norm": new.norm(),
            "penalty": 0.5 * decay * new.norm() ** 2,
            "weight_decay": decay,
            "rms": new.norm() / new.numel() ** 0.5,
            "grad_norm": gradient.norm(),
            "update_ratio": step.norm() / old.norm(),
            "decay_share": 0.05 * decay * old.norm() / step.norm(),
            "angle": torch.acos(torch.dot(old, new) / old.norm() / new.norm()),
        }
        for name, value in expected.items():
            assert last[f"{group}/{name}"] == pytest.approx(float(value), rel=1e-4, abs=1e-9), (group, name)
    assert monitor.largest["qkv.k"] in ("0.weight rows 3:6", "0.bias rows 3:6")
    assert "rest" in str(monitor.table)


@pytest.mark.parametrize("fields", [{}, {"toward_dtype": "bfloat16"}], ids=["", "bfloat16"])
def test_penalty_and_share_are_of_the_distance(fields):
    torch.manual_seed(0)
    lit = Recording(net(), toward(**fields))
    start = (
        lit.get_submodule("0").weight.detach().double().clone(),
        lit.get_submodule("0").bias.detach().double().clone(),
    )
    if fields:
        start = tuple(one.to(torch.bfloat16).double() for one in start)
    monitor = WeightDecayMonitor(figures="all", every_n_steps=1)
    trainer(max_epochs=4, callbacks=[monitor]).fit(lit)
    last = monitor.history[-1]

    def away(values):
        return torch.cat([(values[n] - s).flatten() for n, s in zip(("0.weight", "0.bias"), start)])

    after = {name: p.detach().double() for name, p in lit.named_parameters()}
    step = away(after) - away(lit.before[-1])
    assert last["decay/back/distance"] == pytest.approx(away(after).norm().item(), rel=1e-6)
    assert last["decay/back/penalty"] == pytest.approx(0.5 * 0.4 * away(after).norm().item() ** 2, rel=1e-5)
    share = 0.05 * 0.4 * away(lit.before[-1]).norm() / step.norm()
    assert last["decay/back/decay_share"] == pytest.approx(share.item(), rel=1e-4)
    assert not {"decay/rest/distance", "decay/back/equilibrium"} & last.keys()
    assert "decay/rest/equilibrium" in last


def test_tables_tell_of_a_start(capsys):
    lit = Recording(net(), toward())
    run = trainer(max_epochs=1, callbacks=[WeightDecayMonitor()])
    run.fit(lit)
    assert "0.4 toward start" in capsys.readouterr().out
    (optimizer,) = run.optimizers
    assert "0.4 toward start" in str(groups_in_force(optimizer))
    assert [group.get("toward") for group in groups_in_force(optimizer)] == ["start", None]


def test_before_the_first_step_the_distance_is_0():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    apply_decay_rules(optimizer, model, toward())
    found = Measurer(("distance", "penalty")).measure(dict(live_groups([optimizer])))
    assert found["back"] == {"distance": 0.0, "penalty": 0.0}


def test_many_rows_are_measured_without_a_view_for_each():
    table = nn.Embedding(1000, 3)
    rows = list(range(0, 1000, 3))
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1)
    apply_decay_rules(optimizer, table, {"some": {"params": "weight", "rows": rows, "weight_decay": 1.0}, "*": 0.0})
    found = Measurer(("l2_norm",)).measure(dict(live_groups([optimizer])))
    assert found["some"]["l2_norm"] == pytest.approx(table.weight.detach().double()[rows].norm().item(), rel=1e-6)
    before = table.weight.detach().clone()
    table.weight.grad = torch.zeros_like(table.weight)
    optimizer.step()
    expected = before.clone()
    expected[rows] *= 1 - 0.1
    assert torch.equal(table.weight, expected)
    assert groups_in_force(optimizer)[0]["regions"] == ["rows 0, 3, 6, …"]
