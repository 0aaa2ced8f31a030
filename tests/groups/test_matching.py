"""Selectors: what each takes, and what users are told where one takes nothing."""

from __future__ import annotations

import copy
import fnmatch
import io
import re

import numpy as np
import pytest
import torch
from helpers import Net, members
from torch import nn

from lightning_regdecay import DecayRule, build_decay_groups


def vision():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2), nn.LayerNorm(2))


def taken(model, **selectors):
    groups = build_decay_groups(model, [DecayRule(0.1, group="taken", **selectors)])
    return members(groups).get("taken", [])


class MyLinear(nn.Linear):
    pass


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    file.seek(0)
    return torch.jit.load(file)


SCRIPTS = {
    "script": torch.jit.script,
    "trace": lambda module: torch.jit.trace(module, torch.ones(1, 64)),
    "loaded": saved_and_loaded,
}


def named(names):
    """A model with parameters of any names, all under ``p``."""
    return nn.ModuleDict({"p": nn.ParameterDict({name: torch.ones(1) for name in names})})


class TestSelectors:
    def test_a_glob_crosses_dots_and_must_match_the_whole_name(self):
        model = nn.Sequential(vision(), nn.Linear(2, 2))
        assert taken(model, params="0.*") == [name for name, _ in model.named_parameters() if name.startswith("0.")]
        assert taken(model, params="?.weight") == ["1.weight"]
        assert taken(model, params="0.[34].bias") == ["0.3.bias", "0.4.bias"]

    def test_parameters_that_the_model_has_marked(self):
        model = nn.Linear(2, 2)
        model.weight._no_weight_decay = True
        assert taken(model, where="marked") == ["weight"]
        assert build_decay_groups(model, {"marked": {"where": "marked", "weight_decay": 0}, "*": 0.1}).names == [
            "marked",
            "rest",
        ]

    def test_case_counts(self):
        model = nn.ModuleDict({"Norm": nn.Linear(1, 1), "norm": nn.Linear(1, 1)})
        assert taken(model, params="Norm.*") == ["Norm.weight", "Norm.bias"]

    def test_a_regular_expression_is_searched(self):
        assert taken(vision(), params=r"re:[03]\.w") == ["0.weight", "3.weight"]

    def test_any_of_a_list_does(self):
        assert taken(vision(), params=["*.bias", "3.*"]) == ["0.bias", "1.bias", "3.weight", "3.bias", "4.bias"]

    @pytest.mark.parametrize(
        ("modules", "layers"),
        [
            (nn.LayerNorm, "4"),
            ("LayerNorm", "4"),
            ("*Norm*", "14"),
            ("_ConvNd", "0"),
            ("re:^(Conv2d|Linear)$", "03"),
            ([nn.Conv2d, "_BatchNorm"], "01"),
            ("torch.nn.Linear", "3"),
            ("torch.nn.modules.linear.Linear", "3"),
            ("torch.nn.modules.*norm.*Norm*", "1"),
            ("Module", "0134"),
        ],
    )
    def test_modules_by_class_name_and_base(self, modules, layers):
        model = vision()
        expected = [name for name, _ in model.named_parameters() if name[0] in layers]
        assert taken(model, modules=modules) == expected

    @pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
    @pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
    @pytest.mark.parametrize("modules", [nn.LayerNorm, "LayerNorm", "*Norm*", "torch.nn.LayerNorm", "torch.nn.*Norm"])
    def test_scripted_modules_are_of_their_class(self, script, modules):
        model = nn.Sequential(script(Net()), nn.LayerNorm(10))
        expected = ["0.norm.weight", "0.norm.bias", "1.weight", "1.bias"]
        assert taken(model, modules=modules) == expected
        everything = build_decay_groups(model, [DecayRule(0.0, modules=modules), DecayRule(0.1)])
        assert list(everything[1].params) == ["0.body.weight", "0.body.bias", "0.head.weight", "0.head.bias"]
        assert everything.explain("0.norm.bias").startswith("0.norm.bias (1 dimensions, in LayerNorm) is in group")

    @pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
    def test_scripted_modules_of_a_users_class_go_by_its_name(self):
        model = torch.jit.script(nn.Sequential(MyLinear(2, 2), nn.Linear(2, 2)))
        assert taken(model, modules="MyLinear") == ["0.weight", "0.bias"]
        assert taken(model, modules="*Linear") == ["0.weight", "0.bias", "1.weight", "1.bias"]

    def test_subclasses_are_taken_by_the_base(self):
        model = nn.Sequential(MyLinear(2, 2), nn.Bilinear(2, 2, 2))
        for selector in (nn.Linear, "Linear", "torch.nn.Linear", "MyLinear"):
            assert taken(model, modules=selector) == ["0.weight", "0.bias"]

    def test_dimensions(self):
        model = vision()
        assert taken(model, max_ndim=1) == [name for name, p in model.named_parameters() if p.ndim <= 1]
        assert taken(model, min_ndim=2, max_ndim=3) == ["3.weight"]
        assert taken(model, min_ndim=4) == ["0.weight"]

    def test_predicate_gets_name_parameter_and_module(self):
        model = vision()
        seen = []

        def where(name, parameter, module):
            seen.append((name, parameter, module))
            return parameter.numel() == 32

        assert taken(model, where=where) == ["3.weight"]
        assert ("3.weight", model[3].weight, model[3]) in seen

    def test_all_selectors_must_hold(self):
        assert taken(vision(), params="*.weight", modules="*Norm*", max_ndim=1) == ["1.weight", "4.weight"]

    def test_a_tied_parameter_is_taken_by_any_of_its_names_and_owners(self):
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
        model["head"].weight = model["embed"].weight
        for selectors in ({"params": "head.weight"}, {"params": "embed.*"}, {"modules": "Embedding"}):
            assert taken(model, **selectors) == ["embed.weight"]
        assert taken(model, modules=nn.Linear) == ["embed.weight", "head.bias"]
        # Name and owner must be of one place.
        with pytest.raises(ValueError, match="no parameter passes all its selectors"):
            taken(model, params="embed.*", modules="Linear")

    @pytest.mark.parametrize("name", ["a[0]", "[!x]", "[", "]", "a[1-3]b", "c*[d]?", "re[x]"])
    def test_a_name_in_full_takes_its_parameter_brackets_and_all(self, name):
        assert taken(named([name, "other"]), params=f"p.{name}") == [f"p.{name}"]

    def test_a_bracket_stands_for_a_class_of_characters(self):
        model = named(["a[0]", "a0", "a1"])
        assert taken(model, params="*a[01]") == ["p.a0", "p.a1"]
        assert taken(model, params="*a[[]0]") == ["p.a[0]"]

    def test_a_parametrized_weight_is_taken_by_its_plain_name(self):
        model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)))
        assert taken(model, params="*.weight", modules=nn.Linear) == ["0.parametrizations.weight.original"]


class TestLayersThatRepeat:
    """Rules are held against one of the parameters whose names differ in digits alone, where that is enough."""

    MODEL = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=i % 2 == 0)) for i in range(12))
    NAMES = tuple(name for name, _ in MODEL.named_parameters())

    @pytest.mark.parametrize(
        "pattern",
        [
            "1.*",
            "1[01].*",
            "*[!02-9].weight",
            "*[+-/].bias",
            "*[:-Z]*",
            "?.[+-Z].bias",
            r"re:^\d\.",
            r"re:^\d{2}\.",
            r"re:^(\d)\1",
            r"re:^(?P<layer>\d)(?P=layer)\.",
            r"re:^(?P<layer>\d)\.(?P=layer)\.",
            r"re:^\N{DIGIT ONE}\.",
            r"re:^\x31\.",
            r"re:^\x33\.|^\u0032\.",
            r"re:(?<!\d)[^0-8]\.",
            "re:(?x) ^[0-9] \\. 0",
        ],
    )
    def test_patterns_that_tell_digits_apart(self, pattern):
        matches = (
            re.compile(pattern[3:]).search
            if pattern.startswith("re:")
            else re.compile(fnmatch.translate(pattern)).match
        )
        expected = [name for name in self.NAMES if matches(name)]
        if expected:
            assert taken(self.MODEL, params=pattern) == expected
        else:
            with pytest.raises(ValueError, match="no parameter name matches"):
                taken(self.MODEL, params=pattern)

    def test_a_predicate_is_asked_for_each_parameter_that_the_other_selectors_leave(self):
        asked = []

        def even(name, parameter, module):
            asked.append(name)
            return int(name.split(".")[0]) % 2 == 0

        names = taken(self.MODEL, params="*.weight", where=even)
        assert names == [n for n in self.NAMES if n.endswith("weight") and int(n.split(".")[0]) % 2 == 0]
        assert asked == [n for n in self.NAMES if n.endswith("weight")]

    def test_layers_of_other_classes_and_dimensions_are_told_apart(self):
        model = nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2), nn.Embedding(2, 2), nn.Linear(2, 2)])
        assert taken(model, params="*weight", modules=nn.Linear) == ["0.weight", "3.weight"]
        assert taken(model, params="*weight", min_ndim=2) == ["0.weight", "2.weight", "3.weight"]

    def test_what_a_module_lists_is_asked_for_each_parameter(self):
        class Lists(nn.ModuleList):
            def no_weight_decay(self):
                return {"1.weight"}

        model = Lists(nn.Linear(2, 2, bias=False) for _ in range(3))
        assert taken(model, where="no_weight_decay") == ["1.weight"]

    def test_a_tied_parameter_is_taken_by_any_of_its_names(self):
        model = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(4))
        model[3].weight = model[1].weight
        assert taken(model, params="3.*") == ["1.weight"]


def message(model, rules):
    with pytest.raises(ValueError, match="decay rule") as error:
        build_decay_groups(model, rules)
    return str(error.value)


class TestMessages:
    def test_a_typo_names_the_nearest_parameter(self):
        assert message(Net(), {"haed.*": 0.1, "*": 0.2}) == (
            "decay rule 1 'haed.*' takes nothing: no parameter name matches 'haed.*'; nearest: 'head.weight', "
            "'head.bias'"
        )
        assert "nearest: 'norm.weight'" in message(Net(), {"*.wieght": 0.1, "norm.wight": 0.2})

    def test_a_missing_wildcard_is_named(self):
        assert message(Net(), {"bias": 0.1}).endswith("the whole name must match: did you mean '*bias'?")
        assert message(Net(), {"head": 0.1}).endswith("did you mean 'head*'?")
        assert message(Net(), {"eigh": 0.1}).endswith("did you mean '*eigh*'?")
        lit = nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 2))})
        assert message(lit, {"0.*": 0.1}).endswith("did you mean '*0.*'?")

    def test_names_are_ranked_by_how_near_they_are(self):
        layer = nn.ModuleDict({"output": nn.ModuleDict({"norm": nn.LayerNorm(2), "dense": nn.Linear(2, 2)})})
        layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(12))
        model = nn.ModuleDict({"encoder": layers, "pooler": nn.Linear(2, 2), "classifier": nn.Linear(2, 2)})
        for pattern, nearest in {
            "model.classifier.weight": "classifier.weight",  # a name with too much in front
            "encoder.3.output.dens.bias": "encoder.3.output.dense.bias",
            "encoder.11.output.nrm.weight": "encoder.11.output.norm.weight",
            "pooler.dense.bias": "pooler.bias",
            "clasifier.*": "classifier.weight",
        }.items():
            assert f"; nearest: '{nearest}'" in message(model, {pattern: 0.1})

    @pytest.mark.parametrize("pattern", ["a[0]", "*a[0]", "a[0]*", "p.a[0]*"])
    def test_a_bracket_that_was_meant_as_one_is_named_with_what_takes_it(self, pattern):
        model = named(["a[0]", "a[1]", "b"])
        text = message(model, {pattern: 0.1})
        assert "a bracket in a glob stands for a class of characters: did you mean '" in text
        assert taken(model, params=re.search("did you mean '(.*)'", text)[1]) == ["p.a[0]"]

    def test_names_with_brackets_are_near(self):
        assert "nearest: 'p.a[0]', 'p.a[1]'" in message(named(["x", "y", "z", "a[0]", "a[1]"]), {"p.a[2]": 0.1})

    def test_a_pattern_like_nothing_gets_some_names(self):
        assert "nearest: 'body.weight', 'body.bias', 'norm.weight'" in message(Net(), {"zzz": 0.1})

    def test_a_typo_inside_a_list_is_found_though_the_rule_takes_something(self):
        text = message(Net(), [DecayRule(0.0, params=["*.bias", "*.scael"]), DecayRule(0.1)])
        assert text.startswith("decay rule 1 '*.bias | *.scael' is wrong in part: no parameter name matches '*.scael'")
        text = message(Net(), [DecayRule(0.0, modules=["Linear", "LayerNrm"]), DecayRule(0.1)])
        assert "is wrong in part: no module is of a class 'LayerNrm'; did you mean 'LayerNorm'?" in text

    def test_a_shadowed_rule_names_the_earlier_ones(self):
        rules = {"head.*": 0.1, "*.weight": 0.2, "body.bias": 0.4, "*.bias": 0.3, "head.bias": 0.5, "body.*": 0.6}
        assert message(Net(), rules).splitlines() == [
            "decay rule 5 'head.bias' takes nothing: the 1 trainable parameters that it matches are all taken by "
            "earlier rules, rule 1 'head.*'; the first match wins, so move it before them",
            "decay rule 6 'body.*' takes nothing: the 2 trainable parameters that it matches are all taken by "
            "earlier rules, rule 2 '*.weight', rule 3 'body.bias'; the first match wins, so move it before them",
        ]

    def test_a_class_that_no_module_has(self):
        text = message(Net(), [DecayRule(0.1, modules="LayerNrom")])
        assert text.endswith("no module is of a class 'LayerNrom'; did you mean 'LayerNorm'?")
        text = message(Net(), [DecayRule(0.1, modules=nn.GRU)])
        assert text.endswith("no module is of a class 'GRU'; known are LayerNorm, Linear, Net")

    def test_a_class_that_owns_no_parameters(self):
        text = message(nn.Sequential(vision()), [DecayRule(0.1, modules=nn.Sequential)])
        assert "modules of class 'Sequential' own no parameters themselves" in text

    def test_dimensions_that_no_parameter_has(self):
        text = message(Net(), [DecayRule(0.1, min_ndim=3)])
        assert text.endswith("no parameter passes all its selectors; the model's have 1, 2 dimensions")

    def test_all_problems_come_at_once(self):
        assert len(message(Net(), {"x": 0.1, "y": 0.1, "*": 0.1}).splitlines()) == 2

    def test_strict_false_warns_and_goes_on(self):
        with pytest.warns(UserWarning, match=re.escape("decay rule 1 'haed.*' takes nothing")):
            groups = build_decay_groups(Net(), {"haed.*": 0.1, "*": 0.2}, strict=False)
        assert [group.name for group in groups] == ["rest"]

    def test_strict_is_true_or_false(self):
        with pytest.raises(TypeError, match="strict must be True or False, got 'False'"):
            build_decay_groups(Net(), {"*": 0.2}, strict="False")
        assert build_decay_groups(Net(), {"*": 0.2}, strict=np.bool_(True)).names == ["rest"]

    def test_strict_false_warns_of_every_kind(self):
        rules = [DecayRule(0.1), DecayRule(0.2, params="*.bias"), DecayRule(0.3, modules="LayerNrom")]
        with pytest.warns(UserWarning, match="decay rule") as caught:
            build_decay_groups(Net(), rules, strict=False)
        texts = [str(w.message) for w in caught]
        assert any("taken by earlier rules" in text for text in texts)
        assert any("did you mean 'LayerNorm'?" in text for text in texts)

    def test_frozen_parameters_only_also_where_earlier_rules_take_the_trainable_ones(self):
        net = Net()
        net.body.requires_grad_(False)
        with pytest.warns(UserWarning, match=r"rule 3 '\*' takes frozen parameters only"):
            groups = build_decay_groups(net, {"norm.*": 0.0, "head.*": 0.01, "*": 0.1})
        assert [group.name for group in groups] == ["norm", "head"]

    def test_frozen_parameters_only_is_a_warning_as_finetuning_begins_so(self):
        model = Net()
        model.body.requires_grad_(False)
        with pytest.warns(UserWarning, match="rule 1 'body.*' takes frozen parameters only"):
            groups = build_decay_groups(model, {"body.*": 0.1, "*": 0.2})
        assert members(groups) == {"rest": ["norm.weight", "norm.bias", "head.weight", "head.bias"]}

    def test_a_typo_in_a_huge_model_is_answered_at_once(self):
        model = nn.ModuleList(nn.Linear(1, 1, device="meta") for _ in range(20_000))
        assert "nearest: '0.weight'" in message(model, {"*.wieght": 0.1})

    def test_nothing_to_train(self):
        with pytest.raises(ValueError, match="Linear has nothing to train: all its 2 parameters are frozen"):
            build_decay_groups(nn.Linear(1, 1).requires_grad_(False), {"*": 0.1})
        with pytest.raises(ValueError, match="ReLU has nothing to train: it has no parameters"):
            build_decay_groups(nn.ReLU(), {"*": 0.1})

    def test_a_glob_with_alternatives(self):
        for pattern in ("0.*|1.*", "*.{weight,bias}", "head.*,body.*"):
            assert "a glob knows no alternatives: write a list of patterns, or a regular" in message(
                Net(), {pattern: 0.1}
            )
        assert message(Net(), {"*.bias ": 0.1}).endswith("did you mean '*.bias'?")

    def test_a_failing_predicate_is_named_with_its_parameter(self):
        rule = DecayRule(0.1, where=lambda n, p, m: 1 / 0, group="x")
        with pytest.raises(RuntimeError, match=r"failed on parameter 'weight' of Linear: ZeroDivisionError: division"):
            build_decay_groups(torch.nn.Linear(1, 1), [rule])

    @pytest.mark.parametrize("answer", [lambda p: p > 0, lambda p: p.detach().numpy() > 0], ids=["tensor", "array"])
    def test_a_predicate_that_answers_with_many_is_named_with_its_parameter(self, answer):
        rules = [DecayRule(0.0, where=lambda name, parameter, module: answer(parameter), group="x"), DecayRule(0.1)]
        with pytest.raises(RuntimeError, match=r"rule 'where=.*' failed on parameter 'weight' of Linear: \w+Error"):
            build_decay_groups(nn.Linear(2, 2), rules)

    def test_a_predicate_may_answer_with_anything_that_is_true_or_false(self):
        assert taken(Net(), where=lambda name, p, module: (p != 0).any() and "norm" in name) == ["norm.weight"]
        assert taken(Net(), where=lambda name, p, module: re.search("^head", name)) == ["head.weight", "head.bias"]
