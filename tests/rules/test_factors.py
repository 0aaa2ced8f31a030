"""λ of a group as a factor times that of another of the same rules."""

from __future__ import annotations

import io
import math
import re

import pytest
import torch
import yaml
from helpers import LitHparams, digits, trainer
from omegaconf import OmegaConf
from torch import nn

from lightning_regdecay import (
    DecayRule,
    DecaySchedule,
    apply_decay_rules,
    build_decay_groups,
    compare,
    rules_as_yaml,
    schedule_weight_decay,
)
from lightning_regdecay.rules.forms import loggable_rules, parse_rules, plain_rules, rules_by_group, shortest_rules

DINO = {"schedule": "cosine", "start": 0.04, "end": 0.4}
TENTH = {"params": "head.*", "decay_mult": 0.1, "of": "rest"}


def strength(of, decay_mult=0.5):
    """What a rule at a factor of another stands for."""
    return parse_rules({"part": {"params": "a", "decay_mult": decay_mult, "of": "rest"}, "*": of})[0].weight_decay


class TestWhatItStandsFor:
    @pytest.mark.parametrize(
        ("of", "expected"),
        [
            (0.5, 0.25),
            ("1e-1", 0.05),
            (0, 0.0),
            ({"schedule": "constant", "start": 0.2, "delay_epochs": 1}, DecaySchedule("constant", 0.1, delay_epochs=1)),
            (
                {"schedule": "linear", "start": 0.2, "end": 0, "steps": 9, "delay_steps": 3},
                DecaySchedule("linear", 0.1, 0.0, steps=9, delay_steps=3),
            ),
            (DINO, DecaySchedule("cosine", 0.02, 0.2)),
            ({"schedule": "exponential", "start": 0.1, "end": 1}, DecaySchedule("exponential", 0.05, 0.5)),
            (
                {"schedule": "follow_lr", "start": 0.1, "power": 2, "peak_lr": 3},
                DecaySchedule("follow_lr", 0.05, power=2, peak_lr=3),
            ),
            ({"schedule": "per_step", "start": 1e-3}, DecaySchedule("per_step", 5e-4)),
            ({"schedule": "timescale", "epochs": 3}, DecaySchedule("timescale", epochs=6)),
            ({"schedule": "timescale", "fraction": 0.3}, DecaySchedule("timescale", fraction=0.6)),
            ({"schedule": "timescale", "steps": 500}, DecaySchedule("timescale", steps=1000)),
            (
                [{"schedule": "linear", "start": 0, "end": 0.2, "steps": 5}, {"schedule": "timescale", "steps": 50}],
                DecaySchedule(
                    "stages", stages=[DecaySchedule("linear", 0, 0.1, steps=5), DecaySchedule("timescale", steps=100)]
                ),
            ),
        ],
    )
    def test_half_of_each_kind(self, of, expected):
        assert strength(of) == expected

    @pytest.mark.parametrize(
        "kind", ["constant", "linear", "cosine", "exponential", "follow_lr", "per_step", "timescale"]
    )
    @pytest.mark.parametrize("factor", [0.1, 0.3, 1, 7])
    def test_is_the_factor_times_the_other_at_every_step(self, kind, factor):
        fields = {"start": 0.2} if kind != "timescale" else {"fraction": 0.5}
        fields |= {"end": 0.4} if kind in ("linear", "cosine", "exponential") else {}
        whole = DecaySchedule(kind, **fields)
        part = strength(whole, factor)
        for step in range(12):
            lr = 0.1 * (12 - step) / 12

            def value(schedule, step=step, lr=lr):
                delay, length = schedule.in_steps(lambda: 420, lambda: 5)
                return schedule.value(step, length=length, delay=delay, lr=lr, peak_lr=0.1)

            assert value(part) == pytest.approx(factor * value(whole), rel=1e-12)

    def test_times_nothing_it_is_zero(self):
        assert strength({"schedule": "exponential", "start": 0.1, "end": 1}, 0) == 0.0
        assert strength({"schedule": "timescale", "steps": 5}, 0) == 0.0

    def test_along_several_groups(self):
        rules = {
            "a": {"decay_mult": 0.5, "of": "b"},
            "b": {"decay_mult": 0.5, "of": "rest"},
            "*": DINO,
        }
        assert [rule.weight_decay for rule in parse_rules(rules)[:2]] == [
            DecaySchedule("cosine", 0.01, 0.1),
            DecaySchedule("cosine", 0.02, 0.2),
        ]

    def test_on_a_factor_on_the_optimizers_own(self):
        rules = parse_rules({"a": {"decay_mult": 0.5, "of": "rest"}, "*": {"decay_mult": 0.5}})
        assert [(rule.decay_mult, rule.weight_decay) for rule in rules] == [(0.25, None), (0.5, None)]

    def test_of_a_group_of_several_rules(self):
        rules = [
            DecayRule(0.1, params="a", group="some"),
            DecayRule(0.1, params="b", group="some"),
            DecayRule(decay_mult=0.5, of="some"),
        ]
        assert parse_rules(rules)[-1] == DecayRule(0.05, group="rest")

    def test_rules_that_share_a_group_may_say_it_in_two_ways(self):
        both = {"params": "b", "group": "a", "weight_decay": 0.05}
        rules = parse_rules({"a": {"decay_mult": 0.5, "of": "rest", "group": "a"}, "b": both, "*": 0.1})
        assert [rule.weight_decay for rule in rules] == [0.05, 0.05, 0.1]

    def test_of_a_group_of_a_preset(self):
        rules = [DecayRule(decay_mult=0.1, of="decay", params="head.weight"), {"preset": "timm", "weight_decay": DINO}]
        assert parse_rules(rules)[0].weight_decay == DecaySchedule("cosine", 0.004, 0.1 * 0.4)

    def test_of_a_group_by_a_name_that_loggers_would_not_take(self):
        rules = {"no decay": {"params": "a", "weight_decay": 0.2}, "*": {"decay_mult": 0.5, "of": "no decay"}}
        assert parse_rules(rules)[1].weight_decay == 0.1


class TestForms:
    RULES = {"head": TENTH, "*": DINO}

    def test_yaml_and_code_mean_the_same(self):
        text = '{head: {params: head.*, decay_mult: 1e-1, of: rest}, "*": {schedule: cosine, start: 0.04, end: 0.4}}'
        expected = (
            DecayRule(DecaySchedule("cosine", 0.1 * 0.04, 0.1 * 0.4), params="head.*", group="head"),
            DecayRule(DecaySchedule("cosine", 0.04, 0.4), params="*", group="rest"),
        )
        for rules in (
            self.RULES,
            yaml.safe_load(text),
            OmegaConf.create(text),
            [DecayRule(decay_mult=0.1, of="rest", params="head.*"), DecayRule(DINO, params="*")],
            {"head.*": {"decay_mult": 0.1, "of": "rest"}, "*": DINO},
        ):
            assert parse_rules(rules) == expected
            assert parse_rules(plain_rules(rules)) == expected
            assert parse_rules(shortest_rules(rules)) == expected
            assert parse_rules(yaml.safe_load(rules_as_yaml(rules))) == expected
        assert parse_rules(rules_by_group(shortest_rules(self.RULES))) == expected
        assert parse_rules(plain_rules(expected)) == expected

    def test_what_was_written_goes_out(self):
        assert LitHparams(decay_rules=self.RULES).hparams["decay_rules"] == self.RULES
        assert loggable_rules(self.RULES) == self.RULES
        assert rules_as_yaml(self.RULES).splitlines() == [
            "head: {decay_mult: 0.1, of: rest, params: head.*}",
            "'*': {schedule: cosine, start: 0.04, end: 0.4}",
        ]
        rule = DecayRule(decay_mult=0.1, of="rest")
        assert repr(rule) == "DecayRule(decay_mult=0.1, of='rest')"
        assert rule.strength_text == "0.1 x that of rest"

    def test_tables_show_what_it_stands_for(self):
        groups = LitHparams(decay_rules=self.RULES).decay_groups
        assert "  cosine 0.004 to 0.04  " in str(groups)
        half = {**self.RULES, "head": {**TENTH, "decay_mult": 0.5}}
        assert "cosine 0.02 to 0.2" in str(compare(LitHparams(decay_rules=self.RULES), self.RULES, half))


class TestMistakes:
    @pytest.mark.parametrize(
        ("rules", "error", "message"),
        [
            (
                {"head.*": {"decay_mult": 0.1, "of": "rset"}, "*": 0.1},
                ValueError,
                "decay rule 1 'head.*': of='rset' is no group of these rules; did you mean 'rest'?; without of,",
            ),
            (
                {"head.*": {"decay_mult": 0.1, "of": "*"}, "*": 0.1},
                ValueError,
                "is no group of these rules; did you mean 'rest'?",
            ),
            (
                {"head.*": {"decay_mult": 0.1, "of": "default"}},
                ValueError,
                "of='default' is no group of these rules; there is no other; without of, decay_mult is a factor on the",
            ),
            (
                {"head.*": {"decay_mult": 0.1, "of": "head"}, "*": 0.1},
                ValueError,
                "decay rule 1 'head.*': of='head' is the rule's own group",
            ),
            (
                {
                    "a": {"decay_mult": 1, "of": "b"},
                    "b": {"decay_mult": 1, "of": "c"},
                    "c": {"decay_mult": 1, "of": "b"},
                },
                ValueError,
                "decay rule 1 'a': decay_mult goes round in a circle, 'a' of 'b' of 'c' of 'b'",
            ),
            (
                {"a": {"weight_decay": 0.1, "of": "rest"}, "*": 0.1},
                ValueError,
                "decay rule 'a': of='rest' says what decay_mult is a factor on, and there is none",
            ),
            ({"a": {"of": "rest"}, "*": 0.1}, ValueError, "decay rule 'a': exactly one of weight_decay and decay_mult"),
            (
                {"a": {"decay_mult": 0.1, "of": 3}, "*": 0.1},
                TypeError,
                "decay rule 'a': of must be the name of a group",
            ),
            ({"a": {"decay_mult": 0.1, "of": ""}, "*": 0.1}, TypeError, "of must be the name of a group"),
            ({"a": {"decay_mult": 0.1, "of": ["rest"]}, "*": 0.1}, TypeError, "of must be the name of a group"),
            (
                {"a": {"decay_mult": 3, "of": "rest"}, "*": {"schedule": "timescale", "steps": 100}},
                ValueError,
                "decay rule 1 'a': a timescale of 100 steps at 3 of its λ is one of 33.3333, and steps are whole; give",
            ),
            (
                {"a": {"decay_mult": 0.1, "of": "rest", "lr_mult": 0}, "*": {"schedule": "per_step", "start": 0.1}},
                ValueError,
                "decay rule 1 'a': a per_step divides by the lr, which has no value at lr_mult=0",
            ),
        ],
    )
    def test_are_told(self, rules, error, message):
        with pytest.raises(error, match=re.escape(message)):
            parse_rules(rules)

    def test_rules_of_one_group_that_disagree(self):
        other = {"params": "b", "group": "a", "weight_decay": 0.06}
        with pytest.raises(ValueError, match=r"share the group 'a' but disagree on weight_decay: 0\.05 and 0\.06"):
            parse_rules({"a": {"decay_mult": 0.5, "of": "rest", "group": "a"}, "b": other, "*": 0.1})


class TestTraining:
    """Against a loop by hand, over two param groups."""

    STEPS = 8
    RULES = {"bias": {"params": "bias", "decay_mult": 0.1, "of": "rest"}, "*": DINO}

    def optimizer(self, kind, groups):
        return kind(groups, lr=0.05, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))

    def step(self, model, optimizer):
        pixels, classes = digits(64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels), classes).backward()
        optimizer.step()

    def by_hand(self, kind):
        torch.manual_seed(0)
        model = nn.Linear(64, 10)
        optimizer = self.optimizer(kind, [{"params": [model.bias]}, {"params": [model.weight]}])
        for step in range(self.STEPS):
            for factor, group in zip((0.1, 1.0), optimizer.param_groups):
                start, end = factor * 0.04, factor * 0.4
                group["weight_decay"] = end + (start - end) * (1 + math.cos(math.pi * step / self.STEPS)) / 2
            self.step(model, optimizer)
        return model

    def made(self, kind, own):
        torch.manual_seed(0)
        model = nn.Linear(64, 10)
        if own:
            optimizer = self.optimizer(kind, build_decay_groups(model, self.RULES).as_param_groups())
            schedule_weight_decay(optimizer, total_steps=self.STEPS)
        else:
            optimizer = self.optimizer(kind, model.parameters())
            apply_decay_rules(optimizer, model, self.RULES, total_steps=self.STEPS)
        return model, optimizer

    @pytest.mark.parametrize("own", [True, False], ids=["own", "theirs"])
    @pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
    @pytest.mark.parametrize("stop", [0, 3])
    def test_is_bit_for_bit_that_of_a_loop_by_hand(self, kind, own, stop):
        model, optimizer = self.made(kind, own)
        for _ in range(stop):
            self.step(model, optimizer)
        if stop:
            file = io.BytesIO()
            torch.save((model.state_dict(), optimizer.state_dict()), file)
            file.seek(0)
            model, optimizer = self.made(kind, own)
            for one, state in zip((model, optimizer), torch.load(file, weights_only=True)):
                one.load_state_dict(state)
        for _ in range(self.STEPS - stop):
            self.step(model, optimizer)
        assert all(map(torch.equal, model.parameters(), self.by_hand(kind).parameters()))

    def test_in_a_trainer_and_from_its_checkpoint(self, tmp_path):
        rules = {"head": TENTH, "*": DINO}
        model = LitHparams(lr=0.01, decay_rules=rules)
        fit = trainer(max_epochs=2)
        fit.fit(model)
        end = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * 7 / 8)) / 2
        decays = {group["name"]: group["weight_decay"] for group in fit.optimizers[0].param_groups}
        assert decays["head"] == pytest.approx(0.1 * end, rel=1e-12)
        assert decays["rest"] == pytest.approx(end, rel=1e-12)
        fit.save_checkpoint(tmp_path / "model.ckpt")
        assert torch.load(tmp_path / "model.ckpt", weights_only=True)["hyper_parameters"]["decay_rules"] == rules
        assert (
            LitHparams.load_from_checkpoint(tmp_path / "model.ckpt").decay_groups["head"].rule
            == model.decay_groups["head"].rule
        )
