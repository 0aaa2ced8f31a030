"""Comparisons: what moves from which λ to which, in a table that stays short."""

from __future__ import annotations

import pytest
import torch
from helpers import Net
from torch import nn

from lightning_regdecay.groups.comparing import compare


def names(comparison):
    return [(move.before.name, move.after.name, list(move.params)) for move in comparison.moves]


class TestMoves:
    def test_from_group_to_group(self):
        found = compare(Net(), {"*.bias": 0.0, "*": 0.1}, {"*.bias": 0.0, "norm.*": 0.0, "head.*": 0.2, "*": 0.1})
        assert names(found) == [("rest", "norm", ["norm.weight"]), ("rest", "head", ["head.weight"])]
        assert found.moves[0].numel == 16

    def test_another_name_alone_is_none(self):
        found = compare(
            Net(),
            {"*.bias": 0.0, "*": 0.1},
            {"bias": {"max_ndim": 1, "params": "*.bias", "weight_decay": 0}, "x": {"min_ndim": 0, "weight_decay": 0.1}},
        )
        assert found.moves == ()
        assert str(found) == "0 of 6 tensors move, 0 of 1,242 parameters"

    def test_another_option_is_one(self):
        found = compare(Net(), {"*": 0.1}, {"head.*": {"weight_decay": 0.1, "options": {"lr": 1e-4}}, "*": 0.1})
        assert names(found) == [("rest", "head", ["head.weight", "head.bias"])]
        assert "rest, weight_decay 0.1 → head, weight_decay 0.1, lr 0.0001: 2 tensors" in str(found)

    def test_once_the_optimizers_own_is_the_optimizers_own(self):
        assert compare(Net(), {}, {"*": {"decay_mult": 1}}).moves == ()
        assert names(compare(Net(), {}, {"head.bias": 0.01})) == [("default", "head.bias", ["head.bias"])]

    def test_a_schedule_is_another_strength(self):
        found = compare(Net(), {"*": 0.1}, {"*": {"schedule": "linear", "start": 0.1, "end": 0.0}})
        assert "rest, weight_decay 0.1 → rest, weight_decay linear 0.1 to 0: 6 tensors" in str(found)

    def test_frozen_parameters_are_left_out(self):
        model = Net()
        model.body.requires_grad_(False)
        assert names(compare(model, {"*": 0.1}, {"*": 0.2}))[0][2][0] == "norm.weight"

    def test_mistakes_are_errors_unless_it_is_not_strict(self):
        with pytest.raises(ValueError, match="takes nothing"):
            compare(Net(), {"*": 0.1}, {"haed.*": 0.1})
        with pytest.warns(UserWarning, match="takes nothing"):
            compare(Net(), {"*": 0.1}, {"haed.*": 0.1}, strict=False)


class TestTheTable:
    def test_numbers_in_names_are_put_together(self):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(4)))
        del model[2][1]
        assert str(compare(model, {"*": 0.1}, {"*.bias": 0.0, "*": 0.1})).splitlines() == [
            "7 of 14 tensors move, 14 of 36 parameters",
            "rest, weight_decay 0.1 → bias, weight_decay 0: 7 tensors, 14 parameters",
            "  [0-3].[0-1].bias  (7)",
        ]

    def test_ten_thousand_parameters_make_a_short_one(self):
        with torch.device("meta"):
            model = nn.ModuleDict(
                {f"part{i}": nn.Sequential(*(nn.Linear(2, 2) for _ in range(100))) for i in range(50)}
            )
        found = compare(model, {"*": 0.1}, {"*.bias": 0.0, "*": 0.1})
        lines = str(found).splitlines()
        assert lines[0] == "5,000 of 10,000 tensors move, 10,000 of 30,000 parameters"
        assert lines[2] == "  part0.[0-99].bias  (100)"
        assert lines[-1] == "  … and 38 lines more"
        assert len(lines) == 15
        assert len(found.moves[0].params) == 5000

    def test_of_many_layers_names_each_that_moves(self):
        model = nn.ModuleList(nn.Linear(1, 1, device="meta") for _ in range(2000))
        rules = {"none": {"params": r"re:^(\d|1\d\d\d|1[57])\.weight$", "weight_decay": 0.0}, "*": 0.1}
        found = compare(model, {"*": 0.1}, rules)
        moved = [*range(10), 15, 17, *range(1000, 2000)]
        assert names(found) == [("rest", "none", [f"{i}.weight" for i in moved])]
        assert str(found).splitlines()[2] == "  [0-9,15,17,1000-1999].weight  (1,012)"

    def test_names_with_braces_stay_as_they_are(self):
        model = nn.ModuleDict({"a{0}": nn.Linear(2, 2)})
        assert str(compare(model, {"*": 0.1}, {"*": 0.2})).splitlines()[2] == "  a{0}.weight"

    def test_reprs_are_short(self):
        found = compare(Net(), {"*": 0.1}, {"*": 0.2})
        assert repr(found) == "Comparison(1 moves)"
        assert repr(found.moves[0]) == "Move('rest' → 'rest', 6 tensors)"
