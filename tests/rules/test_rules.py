"""Rules: every form means the same, every mistake has its message."""

from __future__ import annotations

import copy
import json
import math
import posixpath
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
import yaml
from helpers import LitHparams, trainer
from omegaconf import OmegaConf
from torch import nn

from lightning_regdecay import DecayRule, build_decay_groups
from lightning_regdecay.rules.forms import parse_rules, plain_rules, rules_by_group
from lightning_regdecay.rules.names import name_of_pattern, safe_name


def is_small(name, parameter, module):
    return parameter.numel() < 100


class TestForms:
    def test_pattern_to_strength(self):
        assert parse_rules({"*.bias": 0.0}) == (DecayRule(0.0, params="*.bias", group="bias"),)

    def test_name_to_fields(self):
        rules = parse_rules({"no_decay": {"params": ["*.bias", "*norm*"], "weight_decay": 0}})
        assert rules == (DecayRule(0.0, params=["*.bias", "*norm*"], group="no_decay"),)

    def test_name_to_rule(self):
        assert parse_rules({"big": DecayRule(0.1, min_ndim=2)}) == (DecayRule(0.1, min_ndim=2, group="big"),)

    def test_a_key_is_the_pattern_where_the_rule_has_no_selector(self):
        expected = (DecayRule(0.1, params="head.*", group="head"),)
        assert parse_rules({"head.*": {"weight_decay": 0.1}}) == expected
        assert parse_rules({"head.*": DecayRule(0.1)}) == expected

    def test_list_of_rules_or_their_fields(self):
        expected = (DecayRule(0.0, params="*.bias", group="bias"), DecayRule(0.1, group="rest"))
        assert parse_rules([DecayRule(0.0, params="*.bias"), DecayRule(0.1)]) == expected
        assert parse_rules([{"params": "*.bias", "weight_decay": 0.0}, {"weight_decay": 0.1}]) == expected

    def test_forms_mix_in_one_mapping(self):
        rules = parse_rules({"a.*": 0.1, "b": {"params": "b.*", "decay_mult": 2}, "c.*": DecayRule(0.3)})
        assert [rule.group for rule in rules] == ["a", "b", "c"]

    def test_yaml_json_and_omegaconf_mean_the_same(self):
        rules = {
            "*.bias": 0.0,
            "slow": {"params": ["a.*", "b.*"], "weight_decay": 1e-3, "options": {"lr": 1e-4, "betas": [0.9, 0.99]}},
            "*": {"decay_mult": 0.5},
        }
        text = """
            "*.bias": 0.0
            slow: {params: [a.*, b.*], weight_decay: 1e-3, options: {lr: 1e-4, betas: [0.9, 0.99]}}
            "*": {decay_mult: 0.5}
        """
        assert yaml.safe_load(text)["slow"]["weight_decay"] == "1e-3"  # PyYAML's reading
        expected = parse_rules(rules)
        assert parse_rules(yaml.safe_load(text)) == expected
        assert parse_rules(json.loads(json.dumps(rules))) == expected
        assert parse_rules(OmegaConf.create(rules)) == expected

    def test_omegaconf_interpolations_are_resolved(self):
        config = OmegaConf.create({"base": 0.1, "decay_rules": {"*.bias": 0.0, "*": "${base}"}})
        assert parse_rules(config.decay_rules)[1].weight_decay == 0.1

    @pytest.mark.parametrize("number", [1, "1", " 1.0 ", "1e0", np.float32(1), np.int64(1), Fraction(1), Decimal(1)])
    def test_numbers_of_every_kind(self, number):
        (rule,) = parse_rules({"*": number})
        assert rule.weight_decay == 1.0
        assert type(rule.weight_decay) is float

    def test_numbers_of_dimensions_of_every_kind(self):
        assert DecayRule(0.1, min_ndim=np.int64(2)).min_ndim == 2

    def test_a_tensor_as_learning_rate_stays_one(self):
        lr = torch.tensor(1e-3)
        assert DecayRule(0.1, options={"lr": lr}).options["lr"] is lr

    @pytest.mark.parametrize(
        ("given", "plain"),
        [
            *((kind(0.25), 0.25) for kind in (np.float64, np.float32, np.float16, np.array, Decimal, Fraction)),
            *((kind(3), 3) for kind in (np.int64, np.uint8, np.array)),
            *((np.bool_(value), value) for value in (True, False)),
            (np.array([0.5, 0.75]), (0.5, 0.75)),
            ([np.float64(0.5), Decimal("0.75")], (0.5, 0.75)),
            (np.array([[1, 2], [3, 4]]), ((1, 2), (3, 4))),
            (np.str_("text"), "text"),
            (None, None),
        ],
    )
    def test_options_of_every_kind_are_pythons_own(self, given, plain):
        (rule,) = parse_rules([DecayRule(0.1, options={"x": given})])
        (group,) = build_decay_groups(nn.Linear(1, 1), [rule])
        # By what is written: np.float64(0.25) == 0.25, and hash and type of it are others.
        assert repr(rule.options["x"]) == repr(group.as_param_group()["x"]) == repr(plain)
        as_json = json.loads(json.dumps(plain))
        for rules in ([rule], [{"weight_decay": 0.1, "options": {"x": given}}]):
            assert repr(plain_rules(rules)[0]["options"]["x"]) == repr(as_json)

    @pytest.mark.parametrize("lr", [np.float64(0.25), np.float32(0.25), np.array(0.25), Decimal("0.25"), "0.25", 0.25])
    def test_a_learning_rate_of_every_kind_is_a_float(self, lr):
        assert repr(DecayRule(0.1, options={"lr": lr}).options) == "{'lr': 0.25}"

    def test_a_checkpoint_of_a_fit_with_numbers_of_every_kind_is_plain_data(self, tmp_path):
        given = {
            "lr": Decimal("0.01"),
            "betas": np.array([0.5, 0.75]),
            "eps": np.float32(0.125),
            "amsgrad": np.bool_(1),
        }
        plain = {"lr": 0.01, "betas": (0.5, 0.75), "eps": 0.125, "amsgrad": True}
        rules = [DecayRule(np.float64(0.25), params="*.bias", options=given), {"weight_decay": Fraction(1, 8)}]
        run = trainer(limit_train_batches=1)
        run.fit(LitHparams(decay_rules=rules))
        run.save_checkpoint(tmp_path / "x.ckpt")
        stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
        bias, rest = stored["optimizer_states"][0]["param_groups"]
        assert {name: bias[name] for name in ("weight_decay", *plain)} == {"weight_decay": 0.25, **plain}
        assert rest["weight_decay"] == 0.125
        assert parse_rules(stored["hyper_parameters"]["decay_rules"]) == parse_rules(rules)

    def test_rules_are_frozen_and_compare_by_value(self):
        rule = DecayRule(0.1, params="*.bias", options={"lr": 1e-3})
        assert rule == DecayRule("0.1", params=["*.bias"], options={"lr": "1e-3"})
        assert hash(rule) == hash(DecayRule(0.1, params="*.bias", options={"lr": 1e-3}))
        with pytest.raises(AttributeError):
            rule.weight_decay = 0.2

    def test_a_rule_is_not_changed_by_what_it_was_made_of(self):
        patterns, options = ["a"], {"lr": 1.0}
        rule = DecayRule(0.1, params=patterns, options=options)
        patterns.append("b")
        options["lr"] = 2.0
        assert rule == DecayRule(0.1, params="a", options={"lr": 1.0})


class TestGroupNames:
    @pytest.mark.parametrize(
        ("pattern", "name"),
        [
            ("*.bias", "bias"),
            ("*norm*", "norm"),
            ("head.*", "head"),
            ("encoder.*.weight", "encoder.weight"),
            ("*", "rest"),
            ("*.*", "rest"),
            ("0.*", "0"),
            ("layer[0-3].?ias", "layer.ias"),
            ("re:.*", "rest"),
            (r"re:\.bias$", "bias"),
            (r"re:layers\.\d+\.(q|k)_proj", "layers.q_k_proj"),
            (r"re:(?P<kind>q|k)\.w", "q_k.w"),
            (r"re:(?<!norm)\.weight$", "weight"),
            (r"re:(?i:LAYER)[0-9]{1,2}", "LAYER"),
            ("a b/c:d", "a_b_c_d"),
            ("größe", "gr__e"),
        ],
    )
    def test_from_a_pattern(self, pattern, name):
        (rule,) = parse_rules({pattern: 0.1})
        assert rule.group == name == name_of_pattern(pattern)

    @pytest.mark.parametrize(
        ("text", "name"),
        [
            ("", "_"),
            (".", "_"),
            ("..", "__"),
            ("...", "___"),
            ("/", "_"),
            (".a", ".a"),
            ("..a..", "..a.."),
            (". .", "._."),
        ],
    )
    def test_is_never_empty_or_a_folder(self, text, name):
        assert safe_name(text) == name
        key = f"decay/{name}/l2_norm"
        assert posixpath.normpath(key) == key  # as MLflow checks its keys

    def test_a_long_name_is_cut_and_ends_in_what_tells_it_from_others(self):
        long = [end.join(["x" * 200, "y"]) for end in ("a", "b", "é", "ü")]
        names = [safe_name(text) for text in long]
        assert names == [safe_name(text) for text in long]
        assert len(set(names)) == 4
        assert all(re.fullmatch(r"x{56}[0-9a-f]{8}", name) for name in names)
        assert safe_name("x" * 64) == "x" * 64
        rules = parse_rules({f"{text}*": 0.1 for text in long})
        assert len({rule.group for rule in rules}) == 4

    def test_a_clash_gets_a_number(self):
        rules = parse_rules({"*.bias": 0.0, "*bias": 0.1, "bias*": 0.2})
        assert [rule.group for rule in rules] == ["bias", "bias_2", "bias_3"]

    def test_a_given_group_keeps_its_name_in_a_clash(self):
        rules = parse_rules([DecayRule(0.1, params="bias"), DecayRule(0.2, params="x", group="bias")])
        assert [rule.group for rule in rules] == ["bias_2", "bias"]

    def test_total_is_kept_for_the_sum(self):
        assert parse_rules({"total.*": 0.1})[0].group == "total_2"
        with pytest.raises(ValueError, match="group 'total' would clash with the logged total"):
            DecayRule(0.1, group="total")

    def test_without_patterns_from_what_else_selects(self):
        rules = parse_rules(
            [
                DecayRule(0.1, modules=["*Norm*", nn.Linear]),
                DecayRule(0.1, min_ndim=2, max_ndim=3),
                DecayRule(0.1, where=is_small),
                DecayRule(0.1, where=lambda n, p, m: True),
                DecayRule(0.1),
            ]
        )
        assert [rule.group for rule in rules[:3]] == ["Norm_Linear", "min_ndim_2_max_ndim_3", "is_small"]
        assert rules[4].group == "rest"
        assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", rule.group) for rule in rules)

    @pytest.mark.parametrize("text", ["torch.nn.LayerNorm", "torch.nn.modules.normalization.LayerNorm", "LayerNorm"])
    def test_a_class_and_its_full_name_make_the_same(self, text):
        (by_class,), (by_name,) = (parse_rules([DecayRule(0.1, modules=m)]) for m in (nn.LayerNorm, text))
        assert by_class.group == by_name.group == "LayerNorm"

    def test_a_given_group_is_made_safe(self):
        assert [DecayRule(0.1, group=name).group for name in ("no decay", "a*", "a?")] == ["no_decay", "a_", "a_"]

    def test_rules_that_share_a_group(self):
        rules = parse_rules(
            [DecayRule(0.0, params="*.bias", group="no decay"), DecayRule(0.0, max_ndim=1, group="no decay")]
        )
        assert [rule.group for rule in rules] == ["no_decay", "no_decay"]


class TestMistakes:
    @pytest.mark.parametrize(
        ("rules", "error", "message"),
        [
            (5, TypeError, "decay rules are a mapping or a list of rules, got int 5"),
            ("*: 0.1", TypeError, "must be read first, with yaml.safe_load or json.loads"),
            ({3: 0.1}, TypeError, "got the key 3; write '3'"),
            ([0.1], TypeError, r"rule 1 of the list must be a DecayRule or a mapping of its fields, got 0.1; write"),
            ({"*": -1}, ValueError, r"decay rule '\*': weight_decay must be a finite number of at least 0, got -1"),
            ({"*": math.nan}, ValueError, "weight_decay must be a finite number of at least 0, got nan"),
            ({"*": math.inf}, ValueError, "weight_decay must be a finite number of at least 0, got inf"),
            ({"*": "inf"}, ValueError, "weight_decay must be a finite number of at least 0, got 'inf'"),
            ({"*": True}, TypeError, "weight_decay must be a number, got True of type bool"),
            ({"*": "strong"}, ValueError, "weight_decay must be a number, got the text 'strong'"),
            ({"*": [0.1]}, TypeError, "stage 1: it must be a schedule, such as .* got 0.1"),
            ({"*": None}, ValueError, "exactly one of weight_decay and decay_mult must be given, got neither"),
            ({"*": {"weight_decay": 1, "decay_mult": 1}}, ValueError, "exactly one of .* must be given, got both"),
            ({"*": 10**400}, ValueError, "weight_decay must be a finite number of at least 0, got 1000"),
            ({"*": {"decay_mult": -1}}, ValueError, "decay_mult must be a finite number of at least 0, got -1"),
            ({"*": {"decay_mult": math.nan}}, ValueError, "decay_mult must be a finite number of at least 0, got nan"),
            ({"*": {"decay_mult": True}}, TypeError, "decay_mult must be a number, got True of type bool"),
            ({"*": {"weight_decay": 1, "lr": 1}}, TypeError, "unknown field 'lr'; .* such as lr, go into options"),
            ({"re:": 0.1}, ValueError, "params holds an empty pattern"),
            ([{"weight_decay": 1, "params": []}], ValueError, "params is an empty list, which matches nothing"),
            ([{"weight_decay": 1, "modules": []}], ValueError, "modules is an empty list, which matches nothing"),
            ([{"weight_decay": 1, "options": {"lr": -1}}], ValueError, "lr must be a finite number of at least 0"),
            ([("*.bias", 0.0)], TypeError, r"got \('\*.bias', 0.0\); write DecayRule\(0.05, params="),
            ({"*": {"wieght_decay": 1}}, TypeError, "unknown field 'wieght_decay'; did you mean 'weight_decay'?"),
            ({"*": {"xyz": 1}}, TypeError, "unknown field 'xyz'; known are block, blocks, decay_mult, "),
            ({"re:(": 0.1}, ValueError, r"decay rule 're:\(': bad regular expression 're:\(': missing \)"),
            ([{"weight_decay": 1, "params": ""}], ValueError, "rule 1 of the list: params holds an empty pattern"),
            ([{"weight_decay": 1, "params": [3]}], TypeError, "params must be str, or a list of them, got 3"),
            ([{"weight_decay": 1, "params": 3}], TypeError, "params must be a pattern or a list of patterns, got 3"),
            ([{"weight_decay": 1, "modules": nn.ReLU()}], TypeError, r"modules must be .*, got ReLU\(\)"),
            ([{"weight_decay": 1, "min_ndim": "2"}], TypeError, "min_ndim must be a whole number .*, got '2'"),
            ([{"weight_decay": 1, "max_ndim": True}], TypeError, "max_ndim must be a whole number .*, got True"),
            ([{"weight_decay": 1, "max_ndim": -1}], ValueError, "max_ndim must be at least 0, got -1"),
            ([{"weight_decay": 1, "min_ndim": 3, "max_ndim": 2}], ValueError, "min_ndim=3 is above max_ndim=2"),
            (
                [{"weight_decay": 1, "where": "f"}],
                TypeError,
                "got the text 'f': YAML and checkpoints keep only the name",
            ),
            ([{"weight_decay": 1, "where": 3}], TypeError, "where must be a function where.*, got 3"),
            ([{"weight_decay": 1, "group": 3}], TypeError, "group must be a name .*, got 3"),
            ([{"weight_decay": 1, "options": 3}], TypeError, "options must be a mapping of the optimizer's options"),
            ([{"weight_decay": 1, "options": {3: 1}}], TypeError, "options must have text as keys, got 3"),
            ([{"weight_decay": 1, "options": {"params": 1}}], ValueError, "options may not hold 'params'"),
        ],
    )
    def test_has_a_message_of_its_own(self, rules, error, message):
        with pytest.raises(error, match=message):
            parse_rules(rules)

    @pytest.mark.parametrize(("field", "value"), [("weight_decay", 0.2), ("options", {"lr": 0.1}), ("decay_mult", 0.1)])
    def test_rules_of_one_group_that_disagree(self, field, value):
        other = {"weight_decay": 0.1, field: value}
        if field == "decay_mult":
            del other["weight_decay"]
        rules = [DecayRule(0.1, params="a", group="g"), DecayRule(**other, params="b", group="g")]
        with pytest.raises(ValueError, match="the rules 'a' and 'b' share the group 'g' but disagree on "):
            parse_rules(rules)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (torch.tensor([0.5, 0.75]), torch.tensor([0.5, 0.25])),
            (torch.tensor(0.5), torch.tensor(0.25)),
            (torch.tensor([0.5, 0.75]), torch.tensor([0.5])),
            (np.array([0.5, 0.75]), np.array([0.5, 0.25])),
            ([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 3.0])]),
        ],
        ids=["tensor", "number", "of another size", "array", "in a list"],
    )
    def test_options_that_are_tensors_are_compared_as_data(self, one, other):
        def rules(*values):
            return [DecayRule(0.1, params=p, group="g", options={"x": value}) for p, value in zip("ab", values)]

        assert [rule.group for rule in parse_rules(rules(one, copy.deepcopy(one)))] == ["g", "g"]
        with pytest.raises(ValueError, match="'a' and 'b' share the group 'g' but disagree on options"):
            parse_rules(rules(one, other))


class TestPlainData:
    def test_plain_rules_stay_as_they_are(self):
        rules = {"*.bias": 0.0, "x": {"params": ["a", "b"], "weight_decay": "1e-3"}, "*": 1}
        assert plain_rules(rules) == rules

    def test_rules_with_objects_become_plain_and_mean_the_same(self):
        rules = {
            "norm": DecayRule(0, modules=[nn.LayerNorm, "*BatchNorm*"]),
            "big": DecayRule(np.float64(0.1), min_ndim=2, options={"betas": (0.9, 0.99)}),
        }
        plain = plain_rules(rules)
        assert plain == yaml.safe_load(yaml.safe_dump(plain))
        assert plain == {
            "norm": {"weight_decay": 0.0, "modules": ["torch.nn.modules.normalization.LayerNorm", "*BatchNorm*"]},
            "big": {"weight_decay": 0.1, "min_ndim": 2, "options": {"betas": [0.9, 0.99]}},
        }
        assert parse_rules(plain)[1] == parse_rules(rules)[1]

    def test_tensors_become_numbers(self):
        assert plain_rules({"*": {"weight_decay": torch.tensor(0.5), "options": {"lr": torch.tensor(1.0)}}}) == {
            "*": {"weight_decay": 0.5, "options": {"lr": 1.0}}
        }

    def test_with_the_names_of_groups_as_keys_no_rule_is_lost(self):
        rules = {"*.bias": 0.0, "*bias": 0.1, "x": {"max_ndim": 1, "weight_decay": 0.2, "group": "g"}}
        assert rules_by_group(rules) == {
            "bias": {"params": "*.bias", "weight_decay": 0.0},
            "bias_2": {"params": "*bias", "weight_decay": 0.1},
            "x": {"max_ndim": 1, "weight_decay": 0.2, "group": "g"},
        }

    def test_a_predicate_is_stored_as_text_that_says_so_when_used(self):
        plain = plain_rules([DecayRule(0.0, where=is_small)])
        assert plain[0]["where"].endswith("test_rules.is_small>")
        with pytest.raises(TypeError, match="pass the rules with the function again, in code"):
            parse_rules(plain)

    def test_repr_is_code_that_makes_the_rule(self):
        rule = DecayRule(0.1, params=["a", "b"], min_ndim=2, options={"lr": 0.1})
        assert eval(repr(rule)) == rule
