"""The lr and λ by depth: against the conventions' formulas, and where it is installed against timm's own code."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch import nn

from lightning_regdecay import apply_decay_rules, build_decay_groups, groups_in_force
from lightning_regdecay.rules.forms import parse_lr_rules, parse_rules, plain_rules
from lightning_regdecay.rules.presets import layerwise_lr_rules, layerwise_rules


def block(width=4):
    return nn.ModuleDict({"norm": nn.LayerNorm(width), "mlp": nn.Linear(width, width)})


class Vit(nn.Module):
    def __init__(self, depth=3, name="blocks"):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.patch_embed = nn.Conv2d(3, 4, 2)
        self.add_module(name, nn.ModuleList(block() for _ in range(depth)))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def no_weight_decay(self):
        return {"pos_embed", "cls_token"}


class Inside(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


def factors(model, rules):
    """Parameter name to the factor on its lr."""
    groups = build_decay_groups(model, {}, lr_rules=rules)
    return {name: 1.0 if g.treatment.lr_mult is None else g.treatment.lr_mult for g in groups for name in g.params}


def strengths(model, rules):
    """Parameter name to factor on the lr and λ, where an optimizer's own is 7."""
    found = {}
    for group in build_decay_groups(model, rules):
        value = group.rule.decay_mult * 7.0 if group.rule.weight_decay is None else group.rule.weight_decay
        lr_mult = 1.0 if group.treatment.lr_mult is None else group.treatment.lr_mult
        found.update(dict.fromkeys(group.params, (lr_mult, value)))
    return found


def of_beit(name, depth, decay):
    """``get_num_layer_for_vit`` and its scales, in the plainest Python."""
    name = name.removeprefix("model.")
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        layer = 0
    elif name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1
    else:
        layer = depth + 1
    return decay ** (depth + 1 - layer)


@pytest.mark.parametrize("wrap", [lambda model: model, Inside], ids=["", "inside another"])
@pytest.mark.parametrize("depth", [1, 3, 12])
def test_a_vit_as_in_beit(wrap, depth):
    model = wrap(Vit(depth))
    expected = {name: of_beit(name, depth, 0.65) for name, _ in model.named_parameters()}
    rules = {"preset": "layerwise", "depths": depth, "layer_decay": 0.65}
    assert factors(model, rules) == pytest.approx(expected)
    found = strengths(model, {**rules, "weight_decay": 0.05})
    assert {name: factor for name, (factor, _) in found.items()} == pytest.approx(expected)
    for name, parameter in model.named_parameters():
        kept = parameter.ndim <= 1 or name.removeprefix("model.") in ("pos_embed", "cls_token")
        assert found[name][1] == (0.0 if kept else 0.05)


def test_the_norm_after_the_layers_as_in_timm():
    rules = layerwise_lr_rules(3, layer_decay=0.5, norm_with_layers=True)
    for model, front in ((Vit(), ""), (Inside(Vit()), "model.")):
        found = factors(model, rules)
        assert found[f"{front}norm.weight"] == found[f"{front}blocks.2.norm.weight"] == 0.5
        assert found[f"{front}head.weight"] == 1.0


def test_a_least_factor():
    found = factors(Vit(), {"preset": "layerwise", "depths": 3, "layer_decay": 0.1, "min_lr_mult": 0.05})
    assert sorted(set(found.values())) == pytest.approx([0.05, 0.1, 1.0])


def test_the_strength_by_depth():
    found = strengths(Vit(), layerwise_rules(3, 0.08, layer_decay=1.0, strength_decay=0.5))
    by_name = {name: λ for name, (_, λ) in found.items() if name.endswith("mlp.weight") or name.startswith("head")}
    assert by_name == {
        "blocks.0.mlp.weight": 0.01,
        "blocks.1.mlp.weight": 0.02,
        "blocks.2.mlp.weight": 0.04,
        "head.weight": 0.08,
        "head.bias": 0.0,
    }
    own = strengths(Vit(), layerwise_rules(3, layer_decay=1.0, strength_decay=0.5))
    assert own["blocks.0.mlp.weight"][1] == 7.0 * 0.5**3
    assert own["patch_embed.weight"][1] == 7.0 * 0.5**4
    with pytest.raises(ValueError, match="strength_decay is a factor on a number"):
        layerwise_rules(3, {"schedule": "linear", "start": 0.1, "end": 0.0}, strength_decay=0.5)


class Resnet(nn.Module):
    def __init__(self, depths=(2, 1)):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        for stage, depth in enumerate(depths, start=1):
            layers = [nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 3), "bn1": nn.BatchNorm2d(4)}) for _ in range(depth)]
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.fc = nn.Linear(4, 2)


class Stages(nn.Module):
    """As ConvNeXt's in timm."""

    def __init__(self, depths=(2, 1), names=("stages", "blocks")):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        stages = [
            nn.ModuleDict({"downsample": nn.Conv2d(4, 4, 2), names[1]: nn.ModuleList(block() for _ in range(depth))})
            for depth in depths
        ]
        self.add_module(names[0], nn.ModuleList(stages))
        self.head = nn.Linear(4, 2)


class TestStages:
    def test_resnet(self):
        assert factors(Resnet(), layerwise_lr_rules([2, 1], layer_decay=0.5)) == {
            **dict.fromkeys(["conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"], 0.0625),
            **{f"layer1.0.{m}.{p}": 0.125 for m in ("conv1", "bn1") for p in ("weight", "bias")},
            **{f"layer1.1.{m}.{p}": 0.25 for m in ("conv1", "bn1") for p in ("weight", "bias")},
            **{f"layer2.0.{m}.{p}": 0.5 for m in ("conv1", "bn1") for p in ("weight", "bias")},
            **{"fc.weight": 1.0, "fc.bias": 1.0},
        }

    @pytest.mark.parametrize("names", [("stages", "blocks"), ("layers", "blocks"), ("stages", "layers")])
    def test_blocks_in_stages(self, names):
        found = factors(Inside(Stages(names=names)), layerwise_lr_rules([2, 1], layer_decay=0.5))
        front = f"model.{names[0]}"
        assert {
            name: factor for name, factor in found.items() if name.endswith(("mlp.weight", "downsample.weight"))
        } == {
            f"{front}.0.downsample.weight": 0.125,
            f"{front}.0.{names[1]}.0.mlp.weight": 0.125,
            f"{front}.0.{names[1]}.1.mlp.weight": 0.25,
            f"{front}.1.downsample.weight": 0.5,
            f"{front}.1.{names[1]}.0.mlp.weight": 0.5,
        }
        assert found["model.stem.weight"] == 0.0625

    def test_a_pattern_for_each(self):
        model = Resnet()
        rules = layerwise_lr_rules([2, 1], layer_decay=0.5, layers=["layer1.{}.*", r"re:^layer2\.{}\."])
        assert factors(model, rules) == factors(model, layerwise_lr_rules([2, 1], layer_decay=0.5))
        rules = layerwise_lr_rules([2, 1], layer_decay=0.5, layers="stages.{}.blocks.{}.*")
        assert factors(Stages(), rules)["stages.0.blocks.1.mlp.weight"] == 0.25


@pytest.mark.parametrize("name", ["blocks", "block", "layers", "layer", "h", "resblocks"])
def test_usual_names(name):
    assert factors(Vit(name=name), layerwise_lr_rules(3))[f"{name}.1.mlp.weight"] == 0.75**2


@pytest.mark.parametrize("front", ["net2", "swinv2", "v3_model"])
def test_numbers_in_names_above_are_none_of_layers(front):
    model = nn.ModuleDict({front: Vit()})
    assert factors(model, layerwise_lr_rules(3))[f"{front}.blocks.1.mlp.weight"] == 0.75**2


@pytest.mark.parametrize("stem", [None, (), ""])
def test_no_stem(stem):
    found = factors(Vit(), layerwise_lr_rules(3, stem=stem))
    assert (found["patch_embed.weight"], found["head.weight"], found["blocks.0.mlp.weight"]) == (1.0, 1.0, 0.75**3)


def test_names_of_ones_own():
    model = Vit(name="steps")
    with pytest.raises(ValueError, match=r"lr rule 2 .* takes nothing"):
        build_decay_groups(model, {}, lr_rules=layerwise_lr_rules(3))
    rules = {"preset": "layerwise", "depths": 3, "layers": "steps.{}.*", "stem": ["*embed*", "cls_token"]}
    usual = factors(Vit(), layerwise_lr_rules(3))
    assert factors(model, rules) == {name.replace("blocks", "steps"): factor for name, factor in usual.items()}


class TestMistakes:
    @pytest.mark.parametrize("preset", [layerwise_lr_rules, layerwise_rules])
    @pytest.mark.parametrize(("model", "depths"), [(Vit(), 2), (Resnet(), [1, 1]), (Resnet(), [2]), (Stages(), [2])])
    def test_fewer_layers_than_the_model_has_are_told(self, model, depths, preset):
        given = {"lr_rules": preset(depths)} if preset is layerwise_lr_rules else {}
        message = "the rules say that there is no parameter such as .* of the preset that they are of"
        with pytest.raises(ValueError, match=message):
            build_decay_groups(model, {} if given else preset(depths), **given)

    @pytest.mark.parametrize("preset", [layerwise_lr_rules, layerwise_rules])
    @pytest.mark.parametrize(("model", "depths"), [(Vit(), 4), (Resnet(), [2, 2]), (Resnet(), [2, 1, 1])])
    def test_more_layers_than_the_model_has_are_told(self, model, depths, preset):
        given = {"lr_rules": preset(depths)} if preset is layerwise_lr_rules else {}
        with pytest.raises(ValueError, match="takes nothing: no parameter name matches"):
            build_decay_groups(model, {} if given else preset(depths), **given)

    def test_a_layer_that_is_not_there_goes_by_its_group(self):
        with pytest.raises(ValueError, match="lr rule 2 of group 'layer_0' takes nothing: no parameter name matches"):
            build_decay_groups(nn.Linear(2, 1), {}, lr_rules=layerwise_lr_rules(2))

    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ({}, TypeError, "preset 'layerwise' needs depths"),
            ({"depths": 0}, ValueError, "depths must be a whole number of at least 1"),
            ({"depths": None}, ValueError, "depths must be given"),
            ({"depths": 10**7}, ValueError, "depths must be at most 1000"),
            ({"depths": []}, ValueError, "depths must be the layers of each stage"),
            ({"depths": "many"}, ValueError, "depths must be a number"),
            ({"depths": 3, "layer_decay": 0}, ValueError, "layer_decay must be above 0"),
            ({"depths": 3, "layers": "blocks.*"}, ValueError, r"layers must have {} in it once"),
            ({"depths": [3, 1], "layers": "blocks.{}"}, ValueError, r"layers must have {} in it twice"),
            ({"depths": [3, 1], "layers": ["a{}"]}, ValueError, "layers has 1 patterns, and depths 2 stages"),
            ({"depths": 3, "layers": 5}, TypeError, "layers must be a pattern"),
            ({"depths": 3, "stem": 5}, TypeError, "stem must be a pattern or a list of patterns, got 5"),
            ({"depths": -1}, ValueError, "depths must be a whole number of at least 1, got -1"),
            ({"depths": 3, "norm_with_layers": 1}, TypeError, "norm_with_layers must be True or False"),
            ({"depths": 3, "wd": 1}, TypeError, "preset 'layerwise' has no argument 'wd'"),
        ],
    )
    def test_arguments(self, given, error, message):
        with pytest.raises(error, match=message):
            parse_lr_rules({"preset": "layerwise", **given})


def test_from_yaml():
    text = "{preset: layerwise, depths: '3', layer_decay: 5e-1, weight_decay: 1e-2}"
    given = yaml.safe_load(text)
    assert parse_rules(given) == parse_rules(layerwise_rules(3, 0.01, layer_decay=0.5))
    assert parse_rules(plain_rules(parse_rules(given))) == parse_rules(given)


def test_crosses_other_rules():
    groups = build_decay_groups(Vit(2), {"preset": "timm", "weight_decay": 0.05}, lr_rules=layerwise_lr_rules(2))
    assert groups.names == [
        *("layer_0.no_decay", "layer_1.no_decay", "stem.no_decay", "no_decay"),
        *("layer_0.decay", "layer_1.decay", "stem.decay", "decay"),
    ]


def test_in_force_in_an_optimizer_of_others():
    model = Vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    apply_decay_rules(optimizer, model, layerwise_rules(3, 0.05, layer_decay=0.5))
    lrs = {name: group["lr"] for group in groups_in_force(optimizer) for name in group["param_names"]}
    assert lrs == {
        name: 0.5 * factor for name, factor in factors(model, layerwise_lr_rules(3, layer_decay=0.5)).items()
    }


TIMM = {
    "vit_tiny_patch16_224": 12,
    "deit3_small_patch16_224": 12,
    "beit_base_patch16_224": 12,
    "eva02_tiny_patch14_224": 12,
    "swin_tiny_patch4_window7_224": [2, 2, 6, 2],
    "convnext_tiny": [3, 3, 9, 3],
    "resnet50": [3, 4, 6, 3],
}


@pytest.mark.parametrize("architecture", TIMM)
def test_timms_own_code(architecture):
    timm, optim = pytest.importorskip("timm"), pytest.importorskip("timm.optim")
    with torch.device("meta"):
        model = timm.create_model(architecture)
    listed = getattr(model, "no_weight_decay", set)()
    groups = optim.param_groups_layer_decay(model, 0.05, no_weight_decay_list=listed, layer_decay=0.75)
    theirs = {p: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    rules = layerwise_rules(TIMM[architecture], 0.05, norm_with_layers=True)
    expected = {name: theirs[p] for name, p in model.named_parameters()}
    found = strengths(model, rules)
    assert {name: pytest.approx(value) for name, value in found.items()} == expected
