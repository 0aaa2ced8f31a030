"""Groups: every trainable parameter in one group, training as with groups written by hand, a table that explains."""

from __future__ import annotations

import copy
import re
from fnmatch import fnmatchcase

import pytest
import torch
import yaml
from helpers import Net, digits, members
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

from lightning_regdecay import DecayGroup, DecayRule, build_decay_groups

OPTIMIZERS = {
    "Adam": lambda groups: torch.optim.Adam(groups, lr=1e-2),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
}


def train(model, optimizer, steps=60):
    """Full-batch training on real digits; the parameters at the end."""
    pixels, classes = digits()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels), classes).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def by_hand(model, assignment):
    """Param groups from λ to parameter names, as users write them."""
    parameters = dict(model.named_parameters())
    return [{"params": [parameters[name] for name in names], "weight_decay": λ} for λ, names in assignment]


class TestTrainsLikeGroupsWrittenByHand:
    @pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
    @pytest.mark.parametrize(
        ("model", "rules", "assignment"),
        [
            (
                nn.Linear(64, 10),
                {"*weight": 0.01, "*bias": 0.001},
                [(0.01, ["weight"]), (0.001, ["bias"])],
            ),
            (
                nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)),
                {"0.*": 0.005, "2.*": 0.01},
                [(0.005, ["0.weight", "0.bias"]), (0.01, ["2.weight", "2.bias"])],
            ),
            (
                nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)),
                {"*1*weight": 0.02, "*bias": 1e-4, "*weight": 0.005},
                [(0.02, ["1.weight"]), (1e-4, ["0.bias", "1.bias", "2.bias"]), (0.005, ["0.weight", "2.weight"])],
            ),
        ],
        ids=["weight-bias", "layers", "hand-picked"],
    )
    def test_bit_for_bit(self, model, rules, assignment, build):
        ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
        groups = build_decay_groups(ours, rules)
        assert [(group.rule.weight_decay, list(group.params)) for group in groups] == assignment
        trained = train(ours, build([group.as_param_group() for group in groups]))
        expected = train(theirs, build(by_hand(theirs, assignment)))
        assert all(map(torch.equal, trained, expected))
        other = copy.deepcopy(model)
        uniform = train(other, build(other.parameters()))
        assert not torch.equal(trained[0], uniform[0])

    def test_a_hand_picked_pattern_that_picks_nothing_is_an_error(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        with pytest.raises(ValueError, match=re.escape("no parameter name matches '*1*weight'")):
            build_decay_groups(model, {"*1*weight": 0.02, "*bias": 1e-4, "*weight": 0.005})

    def test_convolutions_apart_from_linear_layers(self):
        model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(124, 10))
        rules = [DecayRule(0.1, modules="_ConvNd"), DecayRule(0.2, modules=nn.Linear)]
        assert list(members(build_decay_groups(model, rules)).values()) == [
            ["0.weight", "0.bias"],
            ["2.weight", "2.bias"],
        ]


class TestMembership:
    def test_what_no_rule_takes_is_in_default(self):
        groups = build_decay_groups(Net(), {"*.bias": 0.0})
        assert members(groups) == {
            "bias": ["body.bias", "norm.bias", "head.bias"],
            "default": ["body.weight", "norm.weight", "head.weight"],
        }
        assert groups[1].rule is None

    def test_no_rules_at_all(self):
        assert list(members(build_decay_groups(Net(), {}))) == ["default"]

    def test_default_gives_way_to_a_rule_of_that_name(self):
        groups = build_decay_groups(Net(), {"default": {"params": "*.bias", "weight_decay": 0.0}})
        assert list(members(groups)) == ["default", "default_2"]

    def test_frozen_parameters_are_left_out(self):
        model = Net()
        model.body.weight.requires_grad_(False)
        assert members(build_decay_groups(model, {"body.*": 0.1}))["body"] == ["body.bias"]

    def test_a_shared_group_is_one_in_the_order_of_the_model(self):
        rules = [
            DecayRule(0.0, params="norm.*", group="none"),
            DecayRule(0.1, params="*.weight"),
            DecayRule(0.0, params="*.bias", group="none"),
        ]
        groups = build_decay_groups(Net(), rules)
        assert members(groups)["none"] == ["body.bias", "norm.weight", "norm.bias", "head.bias"]
        assert [group.name for group in groups] == ["none", "weight"]

    def test_on_the_meta_device(self):
        with torch.device("meta"):
            model = Net()
        assert members(build_decay_groups(model, {"*": 0.1})) == {"rest": [n for n, _ in model.named_parameters()]}

    @pytest.mark.parametrize("module", [None, [torch.ones(1)], torch.optim.SGD([torch.ones(1)])])
    def test_of_something_else_than_a_module(self, module):
        with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got \w+; pass the model itself"):
            build_decay_groups(module, {"*": 0.1})


def tied(net):
    net.norm.bias = net.body.bias
    return net


def normed(net):
    nn.utils.parametrizations.weight_norm(net.head)
    return net


class TestParamGroups:
    def test_hold_names_strength_and_options(self):
        model = Net()
        rules = {"head": {"params": "head.*", "weight_decay": 0.1, "options": {"lr": "1e-4", "betas": [0.8, 0.9]}}}
        head, default = (group.as_param_group() for group in build_decay_groups(model, rules))
        assert head == {
            "params": [model.head.weight, model.head.bias],
            "decay_params": ["head.weight", "head.bias"],
            "name": "head",
            "weight_decay": 0.1,
            "lr": 1e-4,
            "betas": (0.8, 0.9),
        }
        assert "weight_decay" not in default
        optimizer = torch.optim.AdamW([head, default], weight_decay=0.7)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.7]

    @pytest.mark.parametrize(
        ("value", "error", "message"),
        [
            ("x", ValueError, "weight_decay must be a number, got the text 'x'"),
            (-0.1, ValueError, "weight_decay must be a finite number of at least 0, got -0.1"),
            ([0.1], TypeError, r"weight_decay must be a number, got \[0.1\] of type list"),
        ],
    )
    def test_a_wrong_weight_decay_is_an_error(self, value, error, message):
        groups = build_decay_groups(Net(), {"*": {"decay_mult": 0.5}})
        with pytest.raises(error, match=message):
            groups.as_param_groups(value)

    def test_a_multiple_needs_the_optimizers_own(self):
        (group,) = build_decay_groups(Net(), {"*": {"decay_mult": 0.5}})
        assert group.as_param_group(weight_decay=0.2)["weight_decay"] == 0.1
        with pytest.raises(ValueError, match=r"group 'rest' has decay_mult=0.5, .* as_param_group\(weight_decay=0.1\)"):
            group.as_param_group()

    @pytest.mark.parametrize("change", [lambda net: net, tied, normed], ids=["plain", "tied", "normed"])
    def test_of_a_model_on_the_meta_device_are_an_error_also_after_to_empty(self, change):
        with torch.device("meta"):
            model = change(Net())
        groups = build_decay_groups(model, {"*.bias": 0.0, "*": 0.1})
        for make_memory in (lambda: None, lambda: model.to_empty(device="cpu")):
            make_memory()
            for group in groups:
                with pytest.raises(ValueError, match=f"group '{group.name}' holds parameters on the meta device"):
                    group.as_param_group()
        today = build_decay_groups(model, {"*.bias": 0.0, "*": 0.1}).as_param_groups()
        assert {p for group in today for p in group["params"]} == set(model.parameters())

    def test_of_what_the_model_has_no_more_after_loading_with_assign_are_an_error(self):
        model = Net()
        groups = build_decay_groups(model, {"*.bias": 0.0, "body.*": 0.1, "*": 0.2})
        model.body.load_state_dict(copy.deepcopy(model.body.state_dict()), assign=True)
        with pytest.raises(ValueError, match=r"group 'body' holds 'body\.weight', in whose place"):
            groups["body"].as_param_group()
        with pytest.raises(ValueError, match=r"group 'bias' holds 'body\.bias', in whose place"):
            groups.as_param_groups()
        assert groups["rest"].as_param_group()["params"] == [model.norm.weight, model.head.weight]

    @pytest.mark.parametrize(
        "change",
        [
            tied,
            normed,
            lambda net: prune.l1_unstructured(net.head, "weight", amount=1),
            lambda net: nn.utils.spectral_norm(net.head),
            lambda net: net.body.requires_grad_(False),
            lambda net: net.load_state_dict(copy.deepcopy(net.state_dict())),
        ],
        ids=["tied", "normed", "pruned", "old spectral norm", "frozen", "loaded"],
    )
    @pytest.mark.parametrize("wrap", [lambda net: net, torch.compile, checkpoint_wrapper, nn.DataParallel])
    def test_of_what_the_model_has_are_none(self, change, wrap):
        model = Net()
        change(model)
        groups = build_decay_groups(wrap(model), {"*.bias": 0.0, "*": 0.1}).as_param_groups()
        trainable = {p for p in model.parameters() if p.requires_grad}
        assert {p for group in groups for p in group["params"]} == trainable


class TestExplanations:
    def test_the_table(self):
        rules = {"*.bias": 0.0, "head": {"params": "head.*", "decay_mult": 0.5, "options": {"lr": 1e-4}}}
        assert str(build_decay_groups(Net(), rules)).splitlines() == [
            "group    rule       tensors  parameters       weight_decay           lr",
            "bias     *.bias           3          42                  0  optimizer's",
            "head     head.*           1         160  0.5 x optimizer's       0.0001",
            "default  (no rule)        2       1,040        optimizer's  optimizer's",
            "total                     6       1,242",
        ]

    def test_why_a_parameter_is_where_it_is(self):
        rules = [
            DecayRule(0.0, params="*.bias"),
            DecayRule(0.0, modules="*Norm*"),
            DecayRule(0.1, where=lambda name, parameter, module: "head" in name, group="head"),
        ]
        groups = build_decay_groups(Net(), rules)
        assert groups.explain("head.weight").splitlines() == [
            "head.weight (2 dimensions, in Linear) is in group 'head', weight_decay 0.1",
            "  rule 1 '*.bias' does not take it: its name does not match '*.bias'",
            "  rule 2 'modules=*Norm*' does not take it: its module is a Linear, not a '*Norm*'",
            f"  rule 3 '{rules[2].selector_text}' takes it",
        ]
        assert groups.explain("body.weight").splitlines()[-2:] == [
            f"  rule 3 '{rules[2].selector_text}' does not take it: where(...) is false for it",
            "  no rule takes it: it keeps the optimizer's own weight decay",
        ]

    def test_dimensions_in_an_explanation(self):
        groups = build_decay_groups(Net(), [DecayRule(0.0, max_ndim=1), DecayRule(0.1, min_ndim=2)])
        assert "rule 1 'max_ndim=1' does not take it: it has 2 dimensions, above max_ndim=1" in groups.explain(
            "head.weight"
        )
        groups = build_decay_groups(Net(), [DecayRule(0.1, min_ndim=2)])
        assert "rule 1 'min_ndim=2' does not take it: it has 1 dimensions, below min_ndim=2" in groups.explain(
            "head.bias"
        )

    def test_a_tied_parameter_is_found_by_any_name(self):
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        model["head"].weight = model["embed"].weight
        text = build_decay_groups(model, {"head.*": 0.1}).explain("head.weight")
        assert text.startswith("embed.weight = head.weight (2 dimensions, in Embedding, Linear) is in group 'head'")

    def test_of_a_weight_that_is_made_of_two_tensors_both(self):
        groups = build_decay_groups(normed(Net()), {"*original0": 0.0, "*.weight": 0.1})
        heads = [line for line in groups.explain("head.weight").splitlines() if not line.startswith(" ")]
        original = "head.parametrizations.weight.original"
        assert heads == [
            f"{original}0 = head.weight (2 dimensions, in ParametrizedLinear) is in group 'original0', weight_decay 0",
            f"{original}1 = head.weight (2 dimensions, in ParametrizedLinear) is in group 'weight', weight_decay 0.1",
        ]

    def test_a_frozen_and_an_unknown_parameter(self):
        model = Net()
        model.body.requires_grad_(False)
        groups = build_decay_groups(model, {"*": 0.1})
        frozen = "was frozen (requires_grad=False) when the groups were made: it is in none"
        assert groups.explain("body.weight").endswith(frozen)
        model.body.requires_grad_(True)
        assert groups.explain("body.weight").endswith(frozen)
        with pytest.raises(TypeError, match="name must be the name of a parameter"):
            groups.explain(model.body.weight)
        with pytest.raises(KeyError, match=r"no parameter 'head\.wieght'; nearest: 'head\.weight'"):
            groups.explain("head.wieght")

    def test_repr_is_short(self):
        groups = build_decay_groups(Net(), {"*.bias": 0.0})
        assert repr(groups[0]) == "DecayGroup('bias', 3 tensors, 42 parameters, weight_decay=0)"
        assert isinstance(groups, list)
        assert all(isinstance(group, DecayGroup) for group in groups)


LEAVES = st.sampled_from(
    [lambda: nn.Linear(2, 3), lambda: nn.Conv1d(2, 2, 3), lambda: nn.LayerNorm(3), lambda: nn.BatchNorm1d(2), nn.ReLU]
)
KEYS = st.sampled_from(["a", "norm", "head", "x0", "x1", "x10", "0", "2", "bias", "Encoder"])


@st.composite
def module_trees(draw, depth=3):
    """Modules in modules, some of them or their parameters shared, some frozen."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(LEAVES)()
    children = {
        key: draw(module_trees(depth=depth - 1)) for key in draw(st.lists(KEYS, min_size=1, max_size=3, unique=True))
    }
    tree = nn.ModuleDict(children)
    if draw(st.booleans()):
        tree["again"] = draw(st.sampled_from(list(children.values())))
    linears = [m for m in tree.modules() if isinstance(m, nn.Linear)]
    if len(linears) > 1 and draw(st.booleans()):
        linears[-1].weight = linears[0].weight
    for parameter in tree.parameters():
        if draw(st.integers(0, 5)) == 0:
            parameter.requires_grad_(False)
    return tree


PATTERNS = st.sampled_from(
    [
        "*",
        "*.bias",
        "*bias",
        "*norm*",
        "head.*",
        "*weight",
        "*.a.*",
        "x0*",
        "*?.weight",
        "*[xa]*",
        "*[!1-9].*",
        "*[+-Z]*",
        "*1*",
        "re:^x0",
        r"re:\.a\.",
        r"re:\d\.",
        r"re:x[^2-9]",
        r"re:\N{DIGIT ONE}",
        r"re:(?P<key>\w+)\.(.*\.)?(?P=key)",
    ]
)
CLASSES = st.sampled_from(["*Norm*", "Linear", "_ConvNd", "Module", "Conv*", "LayerNorm"])
FIELDS = st.fixed_dictionaries(
    {"weight_decay": st.sampled_from([0.0, 0.1, 0.5])},
    optional={
        "params": st.lists(PATTERNS, min_size=1, max_size=2),
        "modules": st.lists(CLASSES, min_size=1, max_size=2),
        "min_ndim": st.integers(0, 2),
        "max_ndim": st.integers(2, 3),
        "group": st.sampled_from(["one group", "other*group"]),
    },
)


def matches(name, pattern):
    return bool(re.search(pattern[3:], name)) if pattern.startswith("re:") else fnmatchcase(name, pattern)


def agree(rules):
    """Whether the rules of each group have one weight decay."""
    return all(
        rule["weight_decay"] == other["weight_decay"]
        for rule in rules
        for other in rules
        if rule.get("group", rules) == other.get("group")
    )


def reference_rule(model, parameter, rules):
    """Slow and obvious: the first rule that holds at any place of the parameter, by torch's own names and owners."""
    places = [
        (name, model.get_submodule(name.rpartition(".")[0]))
        for name, other in model.named_parameters(remove_duplicate=False)
        if other is parameter
    ]
    for index, rule in enumerate(rules):
        for name, owner in places:
            bases = [base.__name__ for base in type(owner).__mro__]
            if (
                ("params" not in rule or any(matches(name, pattern) for pattern in rule["params"]))
                and ("modules" not in rule or any(fnmatchcase(b, p) for b in bases for p in rule["modules"]))
                and rule.get("min_ndim", 0) <= parameter.ndim <= rule.get("max_ndim", 99)
            ):
                return index
    return None


def unwrapped_path(model, path):
    """The path to a submodule through the wrappers that are already there."""
    real, module = [], model
    for key in filter(None, path.split(".")):
        module = module.get_submodule(key)
        real.append(key)
        while hasattr(module, "_checkpoint_wrapped_module"):
            module = module._checkpoint_wrapped_module
            real.append("_checkpoint_wrapped_module")
    return ".".join(real)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model=module_trees(), rules=st.lists(FIELDS, max_size=4).filter(agree), data=st.data())
@pytest.mark.filterwarnings("ignore:decay rule")
def test_random_models_and_rules(model, rules, data):
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        with pytest.raises(ValueError, match="has nothing to train"):
            build_decay_groups(model, rules, strict=False)
        return

    groups = build_decay_groups(model, rules, strict=False)

    # Every trainable parameter in exactly one group, under its first name.
    flat = [(name, p) for group in groups for name, p in group.params.items()]
    assert len(flat) == len(trainable)
    assert all(trainable[name] is p for name, p in flat)
    # Names are unique and safe, and no group is empty.
    names = [group.name for group in groups]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in names)
    assert all(group.params for group in groups)
    # Each parameter is where the reference puts it: rules of one group by its name, others by their number.
    expected: dict[object, list[str]] = {}
    for name, parameter in trainable.items():
        index = reference_rule(model, parameter, rules)
        expected.setdefault(None if index is None else rules[index].get("group", index), []).append(name)
    keys = list(dict.fromkeys(rule.get("group", index) for index, rule in enumerate(rules)))
    order = sorted(expected, key=lambda key: len(rules) if key is None else keys.index(key))
    assert [list(group.params) for group in groups] == [expected[key] for key in order]
    decay = {rule.get("group", index): rule["weight_decay"] for index, rule in enumerate(rules)}
    assert [None if g.rule is None else g.rule.weight_decay for g in groups] == [decay.get(key) for key in order]
    # Wrappers change nothing.
    wrapped = copy.deepcopy(model)
    for path, module in list(wrapped.named_modules())[1:]:
        if data.draw(st.booleans()):
            parent, _, key = path.rpartition(".")
            wrapped.get_submodule(unwrapped_path(wrapped, parent))._modules[key] = checkpoint_wrapper(module)
    assert members(build_decay_groups(checkpoint_wrapper(wrapped), rules, strict=False)) == members(groups)
    # The same from objects, from YAML and from a mapping.
    as_objects = build_decay_groups(model, [DecayRule(**rule) for rule in rules], strict=False)
    as_yaml = build_decay_groups(model, yaml.safe_load(yaml.safe_dump(rules)), strict=False)
    assert members(as_objects) == members(as_yaml) == members(groups)
    named = {f"rule{i}": {**rule, "params": rule.get("params", ["*"])} for i, rule in enumerate(rules)}
    from_mapping = build_decay_groups(model, named, strict=False)
    assert list(members(from_mapping).values()) == list(members(groups).values())
