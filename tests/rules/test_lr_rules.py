"""Lr rules: the forms they come in, what they refuse, and the groups that they make where they cross decay rules."""

from __future__ import annotations

import pytest
import torch
import yaml
from helpers import Net
from torch import nn

from lightning_regdecay import DecayRule, DecaySchedule, LrRule, build_decay_groups, compare, rules_as_yaml
from lightning_regdecay.rules.crossing import GivenRules, parse_rule_set
from lightning_regdecay.rules.forms import loggable_rules, parse_lr_rules, plain_rules, rules_by_group, shortest_rules

DECAY = {"*.bias": 0.0, "*norm*": 0.01, "*": 0.05}


class TestForms:
    @pytest.mark.parametrize(
        "rules",
        [
            {"head.*": 1e-3, "rest": {"params": "*", "lr_mult": 0.1}},
            {"head.*": "1e-3", "rest": {"params": "*", "lr_mult": "1e-1"}},
            {"head.*": LrRule(1e-3), "rest": LrRule(lr_mult=0.1, params="*")},
            [LrRule(1e-3, params="head.*", group="head"), {"lr_mult": 0.1, "params": "*", "group": "rest"}],
            yaml.safe_load("{'head.*': 1e-3, rest: {params: '*', lr_mult: 0.1}}"),
        ],
        ids=["numbers", "text", "objects", "list", "yaml"],
    )
    def test_all_mean_the_same(self, rules):
        parsed = parse_lr_rules(rules)
        assert parsed == (LrRule(1e-3, params="head.*", group="head"), LrRule(lr_mult=0.1, params="*", group="rest"))
        assert parse_lr_rules(plain_rules(parsed)) == parsed
        assert parse_lr_rules(shortest_rules(rules, LrRule)) == parsed
        assert parse_lr_rules(rules_by_group(loggable_rules(rules, LrRule), LrRule)) == parsed

    def test_none_is_none(self):
        assert parse_lr_rules(None) == ()

    @pytest.mark.parametrize(
        ("rules", "error", "message"),
        [
            ({"a": {}}, ValueError, "lr rule 'a': nothing is set; write lr=1e-4"),
            ({"a": None}, ValueError, "lr rule 'a': nothing is set"),
            ({"a": {"lr": 0.1, "lr_mult": 0.5}}, ValueError, "lr, lr_mult and the option lr say the same thing"),
            ({"a": {"lr": 0.1, "options": {"lr": 0.5}}}, ValueError, "lr, lr_mult and the option lr say the same"),
            ({"a": {"lr_mult": 0.1, "options": {"lr": 0.5}}}, ValueError, "lr_mult and the option lr say the same"),
            ({"a": -1}, ValueError, "lr must be a finite number of at least 0, got -1"),
            ({"a": {"lr_mult": float("nan")}}, ValueError, "lr_mult must be a finite number"),
            (
                {"a": {"weight_decay": 0.1}},
                TypeError,
                "unknown field 'weight_decay'.*weight decay goes into decay_rules",
            ),
            ({"a": {"lr_mul": 0.1}}, TypeError, "unknown field 'lr_mul'; did you mean 'lr_mult'"),
            ({"a": DecayRule(0.1)}, TypeError, "must be an LrRule, got a DecayRule, which goes into decay_rules"),
            ([0.1], TypeError, "lr rule 1 of the list must be an LrRule or a mapping"),
            (0.1, TypeError, "lr rules are a mapping or a list of rules, got float 0.1"),
            ("timm", ValueError, "unknown preset 'timm'"),
            ({"a": {"lr": {"schedule": "linear"}}}, TypeError, "lr must be a number"),
            (
                [LrRule(0.1, params="a", group="g"), LrRule(0.2, params="b", group="g")],
                ValueError,
                "share the group 'g' but disagree on lr",
            ),
        ],
    )
    def test_mistakes_are_told(self, rules, error, message):
        with pytest.raises(error, match=message):
            parse_lr_rules(rules)

    def test_an_lr_rule_among_decay_rules_is_told(self):
        with pytest.raises(TypeError, match="must be a DecayRule, got an LrRule, which goes into lr_rules"):
            build_decay_groups(Net(), {"*": LrRule(0.1)})

    def test_a_timescale_without_lr_is_told(self):
        timescale = DecaySchedule("timescale", steps=10)
        with pytest.raises(ValueError, match="a timescale divides by the lr, which has no value at lr_mult=0"):
            DecayRule(timescale, lr_mult=0.0)
        with pytest.raises(ValueError, match="have parameters in common: a timescale divides by the lr"):
            build_decay_groups(Net(), {"*": timescale}, lr_rules={"head.*": {"lr_mult": 0}})


class TestCrossing:
    def test_a_group_is_what_one_rule_of_each_kind_has_taken(self):
        lr_rules = {"head.*": 1e-2, "body.*": {"lr_mult": 0.1}}
        groups = build_decay_groups(Net(), DECAY, lr_rules=lr_rules)
        assert {group.name: list(group.params) for group in groups} == {
            "head.bias": ["head.bias"],
            "body.bias": ["body.bias"],
            "bias": ["norm.bias"],
            "norm": ["norm.weight"],
            "head.rest": ["head.weight"],
            "body.rest": ["body.weight"],
        }
        assert [(group.treatment.lr_text, group.strength_text) for group in groups] == [
            ("0.01", "0"),
            ("0.1 x optimizer's", "0"),
            ("optimizer's", "0"),
            ("optimizer's", "0.01"),
            ("0.01", "0.05"),
            ("0.1 x optimizer's", "0.05"),
        ]

    def test_what_no_decay_rule_takes_keeps_its_own_weight_decay(self):
        groups = build_decay_groups(Net(), {"*.bias": 0.0}, lr_rules={"head.*": {"lr_mult": 2.0}})
        assert groups.names == ["head.bias", "bias", "head.default", "default"]
        assert groups["head.default"].rule is None
        assert "weight_decay" not in groups["head.default"].as_param_group(lr=1.0)

    def test_lr_rules_alone(self):
        groups = build_decay_groups(Net(), {}, lr_rules={"head.*": {"lr_mult": 2.0}})
        assert groups.names == ["head.default", "default"]

    def test_the_first_lr_rule_wins(self):
        groups = build_decay_groups(Net(), {"*": 0.1}, lr_rules={"*.bias": 1e-3, "*": 1e-2})
        assert {name: g.treatment.options["lr"] for g in groups for name in g.params if name.startswith("head")} == {
            "head.bias": 1e-3,
            "head.weight": 1e-2,
        }

    def test_names_are_unique_and_stay_whatever_is_empty(self):
        decay = {"head.bias": 0.1, "bias": {"params": "*.bias", "weight_decay": 0.0}, "*": 0.2}
        names = build_decay_groups(Net(), decay, lr_rules={"head": {"params": "head.*", "lr_mult": 0.1}}).names
        assert names == ["head.head.bias", "bias", "head.rest", "rest"]
        model = Net()
        model.head.bias.requires_grad_(False)
        rules = {"x": {"params": "head.*", "lr_mult": 0.1, "optional": True}}
        every = build_decay_groups(
            Net(), {"*.bias": 0.0, "x.bias": {"params": "*", "weight_decay": 0.1}}, lr_rules=rules
        )
        fewer = build_decay_groups(
            model, {"*.bias": 0.0, "x.bias": {"params": "*", "weight_decay": 0.1}}, lr_rules=rules
        )
        assert every.names == ["x.bias_2", "bias", "x.x.bias", "x.bias"]
        assert fewer.names == every.names[1:]

    def test_lr_rules_that_take_nothing_are_told(self):
        with pytest.raises(ValueError, match=r"lr rule 1 'haed\.\*' takes nothing.*nearest: 'head"):
            build_decay_groups(Net(), DECAY, lr_rules={"haed.*": 0.1})
        with pytest.raises(ValueError, match=r"lr rule 2 'head.bias' takes nothing: .* earlier rules"):
            build_decay_groups(Net(), DECAY, lr_rules={"head.*": 0.1, "head.bias": 0.2})
        with pytest.warns(UserWarning, match=r"lr rule 1 'haed\.\*' takes nothing"):
            build_decay_groups(Net(), DECAY, lr_rules={"haed.*": 0.1}, strict=False)

    @pytest.mark.parametrize(
        ("decay", "lr"),
        [
            ({"lr_mult": 0.5}, {"lr_mult": 0.1}),
            ({"lr_mult": 0.5}, {"lr": 0.1}),
            ({"options": {"lr": 0.1}}, {"lr_mult": 0.1}),
            ({"options": {"lr": 0.1}}, {"lr": 0.1}),
        ],
    )
    def test_the_lr_in_rules_of_both_kinds_is_told(self, decay, lr):
        rules = {"head.*": {"weight_decay": 0.1, **decay}, "*": 0.2}
        with pytest.raises(ValueError, match="have parameters in common, and both set lr"):
            build_decay_groups(Net(), rules, lr_rules={"head.*": lr})
        build_decay_groups(Net(), rules, lr_rules={"body.*": lr})

    def test_other_options_of_both_come_together(self):
        rules = {"*": {"weight_decay": 0.1, "options": {"eps": 1e-5}}}
        lr_rules = {"head.*": {"lr": 0.5, "options": {"betas": [0.8, 0.9]}}}
        group = build_decay_groups(Net(), rules, lr_rules=lr_rules)["head.rest"].as_param_group()
        assert (group["lr"], group["eps"], group["betas"]) == (0.5, 1e-5, (0.8, 0.9))
        with pytest.raises(ValueError, match="both set eps"):
            build_decay_groups(Net(), rules, lr_rules={"head.*": {"options": {"eps": 1e-4}}})

    def test_as_param_groups_needs_the_lr_that_is_multiplied(self):
        groups = build_decay_groups(Net(), {"*": 0.1}, lr_rules={"head.*": {"lr_mult": 0.1}})
        with pytest.raises(ValueError, match=r"group 'head.rest' has lr_mult=0.1.*as_param_group\(lr=1e-3\)"):
            groups.as_param_groups()
        assert [group.get("lr") for group in groups.as_param_groups(lr="1e-3")] == [pytest.approx(1e-4), None]
        with pytest.raises(ValueError, match="lr must be a finite number"):
            groups.as_param_groups(lr=-1)

    def test_explain_tells_of_both(self):
        text = build_decay_groups(Net(), DECAY, lr_rules={"head.*": {"lr_mult": 0.1}}).explain("norm.weight")
        assert text.splitlines() == [
            "norm.weight (1 dimensions, in LayerNorm) is in group 'norm', weight_decay 0.01",
            "  rule 1 '*.bias' does not take it: its name does not match '*.bias'",
            "  rule 2 '*norm*' takes it",
            "  lr rule 1 'head.*' does not take it: its name does not match 'head.*'",
            "  no lr rule takes it: it keeps the optimizer's own lr",
        ]

    def test_a_predicate_that_fails_says_of_which_kind_its_rule_is(self):
        with pytest.raises(RuntimeError, match=r"lr rule 'where=.*' failed on parameter"):
            build_decay_groups(Net(), DECAY, lr_rules=[LrRule(0.1, where=lambda *_: 1 / 0)])

    def test_compare_tells_of_the_lr(self):
        found = compare(Net(), {"*": 0.1}, {"*": 0.1}, lr_after={"head.*": {"lr_mult": 0.1}})
        assert str(found).splitlines()[1:3] == [
            "rest, weight_decay 0.1 → head.rest, weight_decay 0.1, lr 0.1 x optimizer's: 2 tensors, 170 parameters",
            "  head.weight",
        ]
        assert not compare(Net(), {"*": 0.1}, {"*": 0.1}, lr_after={"head.*": {"lr_mult": 1.0}}).moves
        assert compare(Net(), {"*": 0.1}, {"*": 0.1}, lr_after={"head.*": {"lr": 1.0}}).moves

    def test_checkpoints_hold_both(self):
        given = GivenRules(None, {"head.*": {"lr_mult": 0.1}})
        assert given.plain() == {
            "decay_rules": [],
            "lr_rules": [{"lr_mult": 0.1, "params": "head.*", "group": "head"}],
        }
        assert parse_rule_set(**given.plain()) == given.parsed()
        assert "lr_rules" not in GivenRules({"*": 0.1}).plain()

    def test_as_yaml_writes_both(self):
        text = rules_as_yaml({"*.bias": 0}, lr_rules={"head.*": "1e-5", "rest": {"params": "*", "lr_mult": 0.1}})
        assert text == (
            "decay_rules:\n  '*.bias': 0.0\nlr_rules:\n  head.*: 1.0e-05\n  rest: {lr_mult: 0.1, params: '*'}\n"
        )
        read = yaml.safe_load(text)
        assert parse_rule_set(**read) == parse_rule_set(
            {"*.bias": 0}, {"head.*": "1e-5", "rest": {"params": "*", "lr_mult": 0.1}}
        )


def test_training_is_that_of_groups_by_hand():
    found = []
    for by_rules in (True, False):
        torch.manual_seed(0)
        model = Net()
        if by_rules:
            groups = build_decay_groups(model, DECAY, lr_rules={"head.*": 0.1, "body.*": {"lr_mult": 0.5}})
            params = groups.as_param_groups(lr=0.2)
        else:
            params = [
                {"params": [model.head.bias], "weight_decay": 0.0, "lr": 0.1},
                {"params": [model.body.bias], "weight_decay": 0.0, "lr": 0.1},
                {"params": [model.norm.bias], "weight_decay": 0.0},
                {"params": [model.norm.weight], "weight_decay": 0.01},
                {"params": [model.head.weight], "weight_decay": 0.05, "lr": 0.1},
                {"params": [model.body.weight], "weight_decay": 0.05, "lr": 0.1},
            ]
        optimizer = torch.optim.SGD(params, lr=0.2)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.ones(4, 64)), torch.arange(4)).backward()
            optimizer.step()
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *found))


def test_a_group_called_none_is_a_group():
    rules = {"None*.weight": {"params": "head.weight", "weight_decay": 0.9, "group": "None"}}
    groups = build_decay_groups(Net(), rules, lr_rules={"x": {"params": "*.bias", "lr": 7.0, "group": "None"}})
    assert {g.name: (g.rule is not None, g.treatment.options) for g in groups} == {
        "None": (True, {}),
        "None.default": (False, {"lr": 7.0}),
        "default": (False, {}),
    }
