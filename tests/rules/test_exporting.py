"""Rules as text: what is read back is the same rules, to the last bit."""

from __future__ import annotations

import pytest
import torch
import yaml
from helpers import Net
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from lightning_regdecay import DecayRule
from lightning_regdecay.rules.exporting import rules_as_yaml
from lightning_regdecay.rules.forms import parse_rules
from lightning_regdecay.rules.presets import PRESETS
from lightning_regdecay.rules.schedules import DecaySchedule
from lightning_regdecay.rules.selectors import class_path

STRENGTHS = st.floats(0, allow_infinity=False, allow_nan=False)
NUMBERS = STRENGTHS | STRENGTHS.map(repr) | st.sampled_from([0, 3, "1e-3", " 5e-2 ", 1e22, 5e-324, "1E5"])
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False, allow_nan=False)
SCHEDULES = st.one_of(
    st.builds(DecaySchedule, st.just("constant"), STRENGTHS, delay_steps=st.none() | st.integers(0, 10**12)),
    st.builds(DecaySchedule, st.sampled_from(["linear", "cosine"]), STRENGTHS, STRENGTHS, epochs=st.none() | POSITIVE),
    st.builds(DecaySchedule, st.just("exponential"), POSITIVE, POSITIVE, steps=st.integers(1, 10**6)),
    st.builds(DecaySchedule, st.just("follow_lr"), STRENGTHS, peak_lr=st.none() | POSITIVE),
    st.builds(DecaySchedule, st.just("timescale"), epochs=POSITIVE, peak_lr=st.none() | POSITIVE),
)
STAGES = st.lists(
    st.one_of(
        st.builds(DecaySchedule, st.just("constant"), STRENGTHS, fraction=st.floats(0, 0.3, exclude_min=True)),
        st.builds(DecaySchedule, st.sampled_from(["linear", "cosine"]), STRENGTHS, STRENGTHS, epochs=POSITIVE),
    ),
    min_size=1,
    max_size=3,
)
SCHEDULE_FORMS = st.one_of(
    SCHEDULES,
    SCHEDULES.map(DecaySchedule.as_dict),
    STAGES,
    STAGES.map(lambda stages: [stage.as_dict() for stage in stages]),
    STAGES.map(lambda stages: DecaySchedule("stages", stages=stages)),
)
# fmt: off
AWKWARD = st.sampled_from([
    "1e-3", "0", "1_000", "0x1", "yes", "null", "~", "on", "2026-11-23", "1:30", "=", "<<", "- a", "a: b", "#", "'",
    '"', "{a}", "[a]", "*", "&a", "!x", "%", "@", "`", "|", ">", "? a", "a\nb", "\t", " a ", "\x85", "\u2028", "é",
    "🙂", "\x00", "preset", "schedule", "weight_decay", "nan", ".inf", "a" * 200, "\\", "..", "١", "\ufeff", "\ud800",
])
# fmt: on
TEXT = (AWKWARD | st.text(min_size=1)).filter(lambda text: text != "re:")
REGEXES = st.sampled_from([r"re:^(a|b)\.\d+$", r"re:(?i)norm", "re:[\\[\\]'\"]", r"re:\bx{1,2}\b", "re: #"])
GLOBS = TEXT.filter(lambda text: not text.startswith("re:"))
PATTERNS = GLOBS | REGEXES
CLASSES = st.sampled_from([nn.LayerNorm, nn.modules.conv._ConvNd, Net, torch.nn.Module])


def one_or_more(entries):
    return entries | st.lists(entries, min_size=1, max_size=3)


NO_OPTIONS = {"params", "param_names", "name", "lr", "weight_decay", "decay_schedule", "decay_step"}
NOT_NAN = TEXT.filter(lambda text: text.strip().lower().lstrip("+-") != "nan")  # which is not equal to itself
OPTIONS = st.dictionaries(
    TEXT.filter(lambda text: text not in NO_OPTIONS),
    st.one_of(
        st.booleans(), st.none(), st.integers(), st.floats(allow_nan=False), NOT_NAN, st.lists(NUMBERS, max_size=2)
    ),
    max_size=2,
)


@st.composite
def fields(draw, group=True):
    """The fields of a rule."""
    multiple = draw(st.booleans())
    given = {"decay_mult": draw(NUMBERS)} if multiple else {"weight_decay": draw(NUMBERS | SCHEDULE_FORMS)}
    optional = {
        "params": one_or_more(PATTERNS),
        "modules": one_or_more(CLASSES | PATTERNS),
        "min_ndim": st.integers(0, 2),
        "max_ndim": st.integers(2, 4),
        "where": st.sampled_from(["depthwise", "no_weight_decay"]),
        "options": OPTIONS | st.fixed_dictionaries({"lr": NUMBERS}),
        "optional": st.booleans(),
    }
    return {**given, **draw(st.fixed_dictionaries({}, optional=optional))}


RULES = fields() | fields().map(lambda given: DecayRule(**given))
PRESET_ENTRIES = st.builds(
    lambda name, strength: {"preset": name, "weight_decay": strength},
    st.sampled_from([name for name in PRESETS if name not in ("layerwise", "embeddings")]),  # which have others
    st.none() | NUMBERS | SCHEDULE_FORMS,
)
MAPPINGS = st.dictionaries(PATTERNS, NUMBERS | SCHEDULE_FORMS | RULES, max_size=5)


def with_a_part(rules, factor):
    """Rules with one more, at a factor of the λ of the first."""
    of = parse_rules(rules)[0].group
    return {**rules, "the part": {"params": "part.*", "decay_mult": factor, "of": of}}


def is_readable(rules):
    """Whether parse_rules takes the rules: parts of presets may disagree with each other."""
    try:
        return bool(parse_rules(rules)) or True
    except ValueError:
        return False


PARTS = st.builds(with_a_part, MAPPINGS.filter(bool).filter(is_readable), STRENGTHS)
FORMS = (MAPPINGS | PARTS | st.lists(RULES | PRESET_ENTRIES, max_size=4) | PRESET_ENTRIES).filter(is_readable)


def without_classes(rules):
    """Parsed rules with classes by their full names, as text has them."""
    return [
        {
            **{name: getattr(rule, name) for name in rule.__dataclass_fields__},
            "modules": tuple(class_path(m) if isinstance(m, type) else m for m in rule.modules),
        }
        for rule in parse_rules(rules)
    ]


@settings(max_examples=400, deadline=None)
@given(FORMS)
def test_any_rules_are_read_back_the_same(rules):
    text = rules_as_yaml(rules)
    read = yaml.safe_load(text)
    assert without_classes(read) == without_classes(rules)
    assert rules_as_yaml(read) == text


class TestTheText:
    def test_is_short_and_in_the_form_that_the_rules_have(self):
        rules = {
            "*.bias": "0",
            "head.*": DecayRule(1e-5),
            "norms": DecayRule(0.0, modules=[nn.LayerNorm, "*BatchNorm*"]),
            "slow": {"params": r"re:^enc\.\d", "decay_mult": "5e-1", "options": {"betas": ("0.9", 0.99)}},
            "*": DecaySchedule("cosine", 0.04, 0.4),
        }
        assert rules_as_yaml(rules).splitlines() == [
            "'*.bias': 0.0",
            "head.*: 1.0e-05",
            "norms: {weight_decay: 0.0, modules: [torch.nn.modules.normalization.LayerNorm, '*BatchNorm*']}",
            r"slow: {decay_mult: 0.5, params: 're:^enc\.\d', options: {betas: [0.9, 0.99]}}",
            "'*': {schedule: cosine, start: 0.04, end: 0.4}",
        ]

    def test_of_a_list_with_a_preset(self):
        text = rules_as_yaml([DecayRule(0.1, params="head.*"), {"preset": "timm", "weight_decay": "1e-3"}])
        assert text == "- {weight_decay: 0.1, params: head.*}\n- {preset: timm, weight_decay: 0.001}\n"

    def test_of_a_preset(self):
        assert rules_as_yaml({"preset": "ndim", "embeddings": False}) == "preset: ndim\nembeddings: false\n"

    def test_numbers_are_numbers_for_other_readers_too(self):
        text = rules_as_yaml({"1e-3": "1e-3", "a": 1e-7})
        assert text == "'1e-3': 0.001\na: 1.0e-07\n"
        assert OmegaConf.create(text) == {"1e-3": 0.001, "a": 1e-7}

    def test_a_class_and_its_full_name_make_the_same_group(self):
        rules = [DecayRule(0.0, modules=nn.LayerNorm)]
        assert [rule.group for rule in parse_rules(yaml.safe_load(rules_as_yaml(rules)))] == ["LayerNorm"]


class TestWhatCannotTravel:
    def test_a_predicate(self):
        rules = [DecayRule(0.1, params="a"), DecayRule(0.0, where=lambda name, parameter, module: True)]
        with pytest.raises(
            ValueError, match=r"rule 2 .* cannot be written as YAML: where is a function, which text ca"
        ):
            rules_as_yaml(rules)

    def test_an_option_that_is_no_plain_data(self):
        with pytest.raises(ValueError, match=r"rule 1 'a' cannot be written as YAML: the option 'x' is <object"):
            rules_as_yaml({"a": {"weight_decay": 0.1, "options": {"x": object()}}})

    def test_what_is_no_rule(self):
        with pytest.raises(ValueError, match="must be a finite number of at least 0, got -1"):
            rules_as_yaml({"a": -1})
        with pytest.raises(TypeError, match="decay rules are a mapping or a list of rules, got int 5"):
            rules_as_yaml(5)
