"""Presets: each gives every parameter the weight decay that the convention's own code gives it."""

from __future__ import annotations

import copy

import pytest
import torch
import yaml
from helpers import LitHparams, Net, members, trainer
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_regdecay import DecayRule, build_decay_groups
from lightning_regdecay.rules.forms import parse_rules, plain_rules, rules_by_group
from lightning_regdecay.rules.presets import (
    PRESETS,
    dino_rules,
    dinov2_rules,
    lightly_rules,
    lightly_train_rules,
    mmengine_rules,
    timm_rules,
    transformers_rules,
)
from lightning_regdecay.rules.schedules import DecaySchedule

OF_PARTS = ("attention", "gates", "embeddings")
"""Those that take parts of tensors, before rules for the rest."""
CONVENTIONAL = [name for name in PRESETS if name not in ("layerwise", "muon", *OF_PARTS)]
"""Those that fit every model and need no argument."""


class RMSNorm(nn.Module):
    """A norm that no list of torch's classes has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Block(nn.Module):
    """Attention as in BERT, norms of three classes with telling and other names, layer scales of one and two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.input_layernorm = RMSNorm()
        self.ln_2 = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 4), RMSNorm(), nn.Linear(4, 4))
        self.gamma = nn.Parameter(torch.ones(4))
        self.layer_scale = nn.Parameter(torch.ones(4, 1))


class Vision(nn.Module):
    """A small vision transformer with a convolutional stem, which lists what is not to decay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU())
        self.bn1 = nn.GroupNorm(2, 6)
        self.instance = nn.InstanceNorm2d(6, affine=True)
        self.patch_embed = nn.Conv2d(6, 4, 2)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 9, 4))
        self.table = nn.Embedding(3, 4)
        self.temperature = nn.Parameter(torch.ones(()))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.attention_biases = nn.Parameter(torch.zeros(2, 9))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed", "blocks.*.layer_scale"}

    def no_weight_decay_keywords(self) -> set[str]:
        return {"attention_bias"}


class Around(nn.Module):
    """A model as a part of another."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def decays(module, rules):
    """Parameter name to its weight decay, where an optimizer's own is 7."""
    found = {}
    for group in build_decay_groups(module, rules):  # of models on the meta device, of which no param group is made
        rule = group.rule or DecayRule(decay_mult=1.0)
        strength = 7.0 * rule.decay_mult if rule.weight_decay is None else rule.weight_decay
        found.update(dict.fromkeys(group.params, strength))
    return found


def owners(module):
    return {f"{path}.{name}".lstrip("."): m for path, m in module.named_modules() for name in m._parameters}


def chosen(module, leave_out):
    """Parameter name to weight decay, 0 where ``leave_out(name, parameter, owner)`` says so, by plain torch."""
    owner = owners(module)
    return {
        name: 0.0 if leave_out(name, p, owner[name]) else 0.1
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def moved(module, before, after):
    return sorted(name for name, λ in decays(module, after).items() if λ != decays(module, before)[name])


NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm)

# Each convention in the plainest Python, as its own code does it.
CONVENTIONS = {
    "ndim": lambda n, p, m: p.dim() < 2,
    "timm": lambda n, p, m: (
        p.ndim <= 1 or n.endswith(".bias") or n in ("cls_token", "pos_embed") or n.endswith("layer_scale")
    ),
    "transformers_examples": lambda n, p, m: any(word in n for word in ("bias", "LayerNorm.weight")),
    "detectron2": lambda n, p, m: isinstance(m, NORMS),
    "dino": lambda n, p, m: n.endswith(".bias") or len(p.shape) == 1,
    "dinov2": lambda n, p, m: n.endswith(".bias") or "norm" in n or "gamma" in n,
    "lightly": lambda n, p, m: isinstance(m, NORMS) or n.rpartition(".")[2].endswith("bias"),
}


class TestTheConventions:
    @pytest.mark.parametrize("name", CONVENTIONS)
    def test_parameter_by_parameter(self, name):
        model = Vision()
        assert decays(model, {"preset": name, "weight_decay": 0.1}) == chosen(model, CONVENTIONS[name])

    def test_detectron2_with_three_strengths(self):
        def expected(name, owner):
            if name.rpartition(".")[2] == "bias":
                return 0.2
            return 0.3 if isinstance(owner, NORMS) else 0.1

        model = Vision()
        rules = {"preset": "detectron2", "weight_decay": 0.1, "bias": 0.2, "norm": 0.3}
        assert decays(model, rules) == {name: expected(name, owners(model)[name]) for name in decays(model, rules)}

    @pytest.mark.parametrize(
        "given",
        [
            {"norm": 0.2, "bias": 0.3, "depthwise": 0.4, "flat": 0.5},
            {"bias": 0.3, "flat": 0.0},
            {"norm": 0.0, "depthwise": 0.4},
            {},
        ],
    )
    def test_mmengine_with_up_to_five_strengths(self, given):
        def expected(name, parameter, owner):
            if isinstance(owner, NORMS) and "norm" in given:
                return given["norm"]
            if name.rpartition(".")[2] == "bias" and "bias" in given:
                return given["bias"]
            if isinstance(owner, nn.Conv2d) and owner.in_channels == owner.groups and "depthwise" in given:
                return given["depthwise"]
            return given["flat"] if parameter.ndim == 1 and "flat" in given else 0.1

        model = Vision()
        assert decays(model, mmengine_rules(0.1, **given)) == {
            name: expected(name, p, owners(model)[name]) for name, p in model.named_parameters()
        }

    def test_lightly_train_keeps_tokens_queries_embeddings_and_scales(self):
        assert {name for name, λ in decays(Vision(), lightly_train_rules(0.1)).items() if λ} == {
            "stem.0.weight",
            "stem.2.weight",
            "patch_embed.weight",
            "attention_biases",
            "blocks.0.mlp.0.weight",
            "blocks.0.mlp.2.weight",
            "blocks.1.mlp.0.weight",
            "blocks.1.mlp.2.weight",
            "head.weight",
        }


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 60,
}
AS_SMALL = {
    "bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 60},
    "convnext": {"hidden_sizes": [4, 4, 8, 8], "depths": [1, 1, 1, 1]},
    "distilbert": {"dim": 16, "n_heads": 2, "n_layers": 2, "hidden_dim": 24, "vocab_size": 60},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 60},
    "resnet": {"embedding_size": 4, "hidden_sizes": [4, 4, 8, 8], "depths": [1, 1, 1, 1]},
    "swin": {"embed_dim": 4, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "image_size": 16},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 60},
    "whisper": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
}
ARCHITECTURES = [
    *("albert", "bart", "beit", "bert", "bloom", "convnext", "deberta-v2", "dinov2"),
    *("distilbert", "efficientnet", "electra", "falcon", "gemma", "gpt2", "gpt_neox", "hubert"),
    *("llama", "mamba", "mistral", "mixtral", "mpnet", "opt", "phi", "qwen2"),
    *("resnet", "roberta", "swin", "t5", "vit", "wav2vec2", "whisper"),
]


class TestTheConventionsOwnCode:
    """Where it is installed."""

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_transformers(self, architecture):
        transformers = pytest.importorskip("transformers", minversion="5")
        config = transformers.AutoConfig.for_model(architecture, **AS_SMALL.get(architecture, SMALL))
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config)
        theirs = set(transformers.Trainer.get_decay_parameter_names(None, model))
        assert decays(model, transformers_rules(0.1)) == chosen(model, lambda name, p, m: name not in theirs)

    @pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18"])
    def test_timm(self, architecture):
        timm = pytest.importorskip("timm")
        optim = pytest.importorskip("timm.optim")
        with torch.device("meta"):
            model = timm.create_model(architecture)
        listed = getattr(model, "no_weight_decay", set)()
        self.check(model, timm_rules(0.1), optim.param_groups_weight_decay(model, 0.1, no_weight_decay_list=listed))
        assert set(decays(Around(model), timm_rules(0.1)).values()) == {0.0, 0.1}

    @pytest.mark.parametrize("factors", [{"norm": 0.0, "bias": 0.5, "dwconv": 0.25, "flat": 0.125}, {"bias": 0.5}])
    def test_mmengine(self, factors):
        optim = pytest.importorskip("mmengine.optim")
        wrapper = {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 0.5}}
        build = optim.DefaultOptimWrapperConstructor(wrapper, {f"{k}_decay_mult": v for k, v in factors.items()})
        groups: list[dict[str, object]] = []
        model = Vision()
        build.add_params(groups, model)
        ours = {"depthwise" if name == "dwconv" else name: 0.5 * factor for name, factor in factors.items()}
        self.check(model, mmengine_rules(0.5, **ours), [{"weight_decay": 0.5, **group} for group in groups])

    def test_lightly(self):
        lightly = pytest.importorskip("lightly.models.utils")
        model = Vision()
        decay, without = lightly.get_weight_decay_parameters([model])
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": without, "weight_decay": 0.0}]
        self.check(model, lightly_rules(0.1), groups)

    def test_lightly_train(self):
        helpers = pytest.importorskip("lightly_train._optim.optimizer_helpers")
        model = Vision()
        decay, without = helpers.get_weight_decay_parameters([model])
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": without, "weight_decay": 0.0}]
        self.check(model, lightly_train_rules(0.1), groups)

    def check(self, model, rules, groups):
        theirs = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
        assert decays(model, rules) == {name: theirs[p] for name, p in model.named_parameters()}


class TestOptionsThatMendAFault:
    def test_embeddings_without_decay(self):
        before = {"preset": "ndim", "weight_decay": 0.1}
        assert moved(Vision(), before, {**before, "embeddings": False}) == ["table.weight"]

    def test_keywords_that_timm_does_not_ask_for(self):
        assert moved(Vision(), timm_rules(0.1), timm_rules(0.1, keywords=True)) == ["attention_biases"]

    def test_norms_that_have_no_norm_in_their_name(self):
        expected = ["blocks.0.mlp.1.weight", "blocks.1.mlp.1.weight", "bn1.weight", "instance.weight", "stem.1.weight"]
        assert moved(Vision(), transformers_rules(0.1), transformers_rules(0.1, all_norms=True)) == expected

    @pytest.mark.parametrize("name", ["transformers_examples", "detectron2", "mmengine", "dinov2", "lightly"])
    def test_with_all_norms_no_norm_decays(self, name):
        model = Vision()
        given = {"preset": name, "weight_decay": 0.1, **({"norm": 0.0} if name == "mmengine" else {})}
        norms = [n for n, owner in owners(model).items() if "Norm" in type(owner).__name__]
        assert any(decays(model, given)[n] for n in norms)
        assert not any(decays(model, {**given, "all_norms": True})[n] for n in norms)

    @pytest.mark.parametrize("rules", [dino_rules, dinov2_rules, lightly_rules])
    def test_tokens_position_embeddings_and_layer_scales(self, rules):
        found = moved(Vision(), rules(0.1), rules(0.1, tokens=False))
        kept = ["blocks.0.layer_scale", "blocks.1.layer_scale", "cls_token", "pos_embed"]
        assert [name for name in found if not name.endswith("gamma")] == kept

    @pytest.mark.parametrize("weight_decay", [0.1, None])
    def test_projections_onto_queries_decay(self, weight_decay):
        before = lightly_train_rules(weight_decay)
        after = lightly_train_rules(weight_decay, query_projections=True)
        assert moved(Vision(), before, after) == ["blocks.0.query.weight", "blocks.1.query.weight"]


class TestWhatTheModelLists:
    @pytest.mark.parametrize(
        "listed",
        [lambda self: {"head.weight"}, property(lambda self: ["head.weight"]), {"head.weight"}, ["head.weight"]],
        ids=["method", "property", "set", "list"],
    )
    @pytest.mark.parametrize("test", ["no_weight_decay", "no_weight_decay_keywords"])
    def test_by_a_method_or_an_attribute(self, test, listed):
        model = Around(type("Lists", (Net,), {test: listed})())
        rules = [DecayRule(0.0, where=test), DecayRule(0.1)]
        assert [name for name, λ in decays(model, rules).items() if not λ] == ["model.head.weight"]

    @pytest.mark.parametrize("listed", [lambda: ("head.weight",), ["head.weight"], {"head.weight"}])
    def test_by_an_attribute_of_the_instance(self, listed):
        model = Around(Net())
        model.model.no_weight_decay = listed
        rules = [DecayRule(0.0, where="no_weight_decay"), DecayRule(0.1)]
        assert [name for name, λ in decays(model, rules).items() if not λ] == ["model.head.weight"]

    def test_a_model_inside_another_is_asked(self):
        inside = decays(Around(Vision()), timm_rules(0.1, keywords=True))
        assert inside == {f"model.{name}": λ for name, λ in decays(Vision(), timm_rules(0.1, keywords=True)).items()}

    def test_the_outermost_list_counts(self):
        class Outer(Around):
            def no_weight_decay(self):
                return ["model.head.weight"]

        found = decays(Outer(Vision()), timm_rules(0.1))
        assert (found["model.head.weight"], found["model.cls_token"]) == (0.0, 0.1)

    def test_wrappers_change_nothing(self):
        model = Vision()
        model.blocks[1] = checkpoint_wrapper(model.blocks[1])
        model.no_weight_decay = lambda: {n for n, _ in model.named_parameters() if "layer_scale" in n}
        rules = [DecayRule(0.0, where="no_weight_decay"), DecayRule(0.1)]
        assert [n for n, λ in decays(torch.compile(model), rules).items() if not λ] == [
            "blocks.0.layer_scale",
            "blocks.1.layer_scale",
        ]

    def test_a_weight_under_a_parametrization_goes_by_its_plain_name(self):
        model = Around(Vision())
        model.model.no_weight_decay = lambda: {"head.weight"}
        nn.utils.parametrizations.weight_norm(model.model.head)
        found = decays(model, timm_rules(0.1))
        assert {λ for name, λ in found.items() if name.startswith("model.head")} == {0.0}

    def test_the_list_is_made_once(self):
        model, calls = Vision(), []
        model.no_weight_decay = lambda: calls.append(1) or {"cls_token"}
        build_decay_groups(model, timm_rules(0.1))
        assert len(calls) == 1

    def test_a_method_that_fails_is_named_with_the_rule(self):
        model = Vision()
        model.no_weight_decay = lambda skip: {skip}
        with pytest.raises(RuntimeError, match=r"rule 'where=no_weight_decay' failed on parameter .*: TypeError"):
            build_decay_groups(model, timm_rules(0.1))
        build_decay_groups(model, {"*": 0.1})  # which does not ask

    def test_a_rule_of_ones_own_on_a_model_without_a_list_is_an_error(self):
        rule = {"listed": {"where": "no_weight_decay", "weight_decay": 0.0}, "*": 0.1}
        with pytest.raises(ValueError, match="rule 1 'where=no_weight_decay' takes nothing: no parameter passes"):
            build_decay_groups(Net(), rule)

    def test_an_explanation(self):
        groups = build_decay_groups(Vision(), timm_rules(0.1))
        assert "rule 3 'where=no_weight_decay' takes it" in groups.explain("cls_token")
        assert "does not take it: 'no_weight_decay' is false for it" in groups.explain("head.weight")


class Experts(nn.Module):
    """Stacked, with biases of two dimensions, as gpt-oss's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 8))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(2, 8))
        self.router = nn.Linear(4, 2)


def test_what_the_presets_miss_on_stacked_experts():
    kept = {
        name
        for name in CONVENTIONAL
        if not decays(Experts(), {"preset": name, "weight_decay": 0.1})["gate_up_proj_bias"]
    }
    assert kept == {"transformers", "transformers_examples", "lightly"}
    for name in CONVENTIONAL:
        rules = [{"params": "*_bias", "weight_decay": 0.0}, {"preset": name, "weight_decay": 0.1}]
        assert decays(Experts(), rules)["gate_up_proj_bias"] == 0.0


class TestMarks:
    """As Mamba and S4 mark parameters, for code of their own to find."""

    @pytest.mark.parametrize("name", [*CONVENTIONAL, "muon"])
    def test_what_is_marked_does_not_decay(self, name):
        model = Vision()
        model.head.weight._no_weight_decay = True
        model.blocks[1].mlp[0].weight._no_weight_decay = False
        before = {"preset": name, "weight_decay": 0.1, **({"adamw_weight_decay": 0.1} if name == "muon" else {})}
        assert moved(model, {**before, "marks": False}, before) == ["head.weight"]
        assert decays(model, before)["head.weight"] == 0.0

    def test_an_option_of_another_kind_is_told(self):
        with pytest.raises(TypeError, match="marks must be True or False, got 1"):
            timm_rules(0.1, marks=1)


class TestAnyModel:
    @pytest.mark.parametrize("name", CONVENTIONAL)
    @pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.LayerNorm(2), nn.Embedding(2, 2), Net(), Vision()])
    @pytest.mark.filterwarnings("error")
    def test_a_preset_fits_every_model(self, name, model):
        for given in ({}, {"weight_decay": 0.1}):
            found = decays(model, {"preset": name, **given})
            assert list(found) != []
            assert set(found) == {n for n, _ in model.named_parameters()}

    @pytest.mark.parametrize("name", CONVENTIONAL)
    def test_without_a_strength_what_decays_keeps_the_optimizers_own(self, name):
        model = Vision()
        own = decays(model, {"preset": name})
        assert own == decays(model, {"preset": name, "weight_decay": 7.0})
        assert 7.0 in own.values()

    def test_a_rule_of_ones_own_is_held_to_as_before(self):
        with pytest.raises(ValueError, match=r"rule 1 'haed\.\*' takes nothing"):
            build_decay_groups(Net(), [DecayRule(0.1, params="haed.*"), *timm_rules(0.1)])

    @pytest.mark.filterwarnings("error")
    def test_an_optional_rule_may_find_nothing_or_be_shadowed(self):
        rules = {"*": 0.1, "haed.*": {"weight_decay": 0.1, "optional": True}}
        assert list(members(build_decay_groups(Net(), rules))) == ["rest"]
        rules = {"none": {"params": ["*.bias", "*.scale"], "weight_decay": 0.1, "optional": True}}
        assert list(members(build_decay_groups(Net(), rules))) == ["none", "default"]


class TestByName:
    def test_a_name_alone_is_a_preset(self):
        assert parse_rules("ndim") == parse_rules({"preset": "ndim"})
        first = DecayRule(0.3, params="head.*", group="head")
        assert parse_rules([first, "ndim"]) == parse_rules([first, {"preset": "ndim"}])

    @pytest.mark.parametrize("text", ["*: 0.1", "{'*': 0.1}", "a\nb", ""])
    def test_other_text_is_to_be_read_first(self, text):
        with pytest.raises(TypeError, match=r"text is the name of a preset, or must be read first, with yaml"):
            parse_rules(text)

    def test_a_name_that_no_preset_has(self):
        with pytest.raises(ValueError, match=r"unknown preset 'tim'; did you mean 'timm'\?"):
            parse_rules("tim")

    @pytest.mark.parametrize("name", CONVENTIONAL)
    def test_is_the_same_as_in_code(self, name):
        assert parse_rules({"preset": name, "weight_decay": 0.1}) == parse_rules(PRESETS[name](0.1))

    def test_from_yaml_and_omegaconf(self):
        text = "{preset: dinov2, weight_decay: {schedule: cosine, start: 4e-2, end: 0.4}, tokens: false}"
        expected = parse_rules(dinov2_rules(DecaySchedule("cosine", 0.04, 0.4), tokens=False))
        assert parse_rules(yaml.safe_load(text)) == expected
        assert parse_rules(OmegaConf.create(text)) == expected

    def test_after_rules_of_ones_own(self):
        rules = [{"params": "head.*", "weight_decay": 1e-3}, {"preset": "ndim", "weight_decay": 0.1}]
        assert members(build_decay_groups(Net(), rules)) == {
            "head": ["head.weight", "head.bias"],
            "no_decay": ["body.bias", "norm.weight", "norm.bias"],
            "decay": ["body.weight"],
        }

    def test_a_parameter_called_preset_is_still_a_pattern(self):
        for value in (0.1, "1e-1", {"weight_decay": 0.1}):
            assert parse_rules({"preset": value}) == (DecayRule(0.1, params="preset", group="preset"),)

    def test_stays_a_name_in_the_hyperparameters(self, tmp_path):
        rules = {"preset": "timm", "weight_decay": 0.05}
        fit = trainer(enable_checkpointing=False, limit_train_batches=1)
        model = LitHparams(decay_rules=rules)
        fit.fit(model)
        fit.save_checkpoint(tmp_path / "x.ckpt")
        stored = torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]
        assert stored["decay_rules"] == rules == rules_by_group(rules)
        again = LitHparams.load_from_checkpoint(tmp_path / "x.ckpt")
        assert members(again.decay_groups) == members(model.decay_groups)

    def test_from_code_it_is_plain_data(self):
        rules = timm_rules(0.05)
        assert plain_rules(rules) == rules == copy.deepcopy(rules)

    @pytest.mark.parametrize(
        ("rules", "error", "message"),
        [
            ({"preset": "tim"}, ValueError, "unknown preset 'tim'; did you mean 'timm'?"),
            ({"preset": "xyz"}, ValueError, "unknown preset 'xyz'; known are attention, detectron2, dino, "),
            ([{"preset": "tim"}], ValueError, "unknown preset 'tim'; did you mean 'timm'?"),
            (
                {"preset": "timm", "wd": 0.1},
                TypeError,
                "'timm' has no argument 'wd'; known are keywords, marks, weight_decay",
            ),
            ({"preset": "timm", "weight_decay": -1}, ValueError, "preset 'timm': weight_decay must be a finite number"),
            ({"preset": "timm", "*.bias": 0.1}, TypeError, r"preset 'timm' has no argument '\*.bias'"),
            ({"preset": "timm", "keywords": "yes"}, TypeError, "keywords must be True or False, got 'yes'"),
            ({"preset": "mmengine", "norm": "x"}, ValueError, "preset 'mmengine': weight_decay must be a number, got"),
            ({"*": {"preset": "timm"}}, TypeError, r"rule '\*': a preset has groups of its own; write it as an entry"),
            ({"*": {"weight_decay": 1, "optional": 1}}, TypeError, "optional must be True or False, got 1"),
            (
                {"*": {"weight_decay": 1, "where": "deptwise"}},
                TypeError,
                "'deptwise': .* depthwise, marked, no_",
            ),
        ],
    )
    def test_mistakes(self, rules, error, message):
        with pytest.raises(error, match=message):
            parse_rules(rules)
