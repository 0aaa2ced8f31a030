"""Schedules one after another: λ of each stage by its formula, in every optimizer, in every form of rules."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import warnings

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from helpers import LitBase, LitHparams, digits, trainer
from omegaconf import OmegaConf
from torch import nn

from lightning_regdecay import (
    DecayRule,
    DecaySchedule,
    WeightDecayMonitor,
    WeightDecayRules,
    apply_decay_rules,
    build_decay_groups,
    compare,
    groups_in_force,
    rules_as_yaml,
    schedule_weight_decay,
)
from lightning_regdecay.rules.forms import loggable_rules, parse_rules, plain_rules, rules_by_group, shortest_rules

LRS = [0.02, 0.05, 0.1, 0.1, 0.1, 0.05, 0.02, 0.01, 1e-5, 0.0]
RAMP = {"schedule": "linear", "start": 0.0, "end": 0.3, "steps": 3}
HOLD = {"schedule": "constant", "start": 0.3, "fraction": 0.4}
FALL = {"schedule": "cosine", "start": 0.3, "end": 0.1}
STAGES = [RAMP, HOLD, FALL]


def cosine(start, end, p):
    return end + (start - end) * (1 + math.cos(math.pi * p)) / 2


def by_hand(step, lr):
    """λ of STAGES over ten steps: 0 to 2, 3 to 6, 7 to 9."""
    if step < 3:
        return 0.3 * step / 3
    return 0.3 if step < 7 else cosine(0.3, 0.1, (step - 7) / 3)


def growing(step, lr):
    if step < 8:  # one and a half epochs of 5 steps, rounded
        return math.exp((1 - step / 8) * math.log(0.01) + step / 8 * math.log(0.1)) if step else 0.01
    return 0.2 + (0.3 - 0.2) * (step - 8) / 4


def with_the_lr(step, lr):
    return 0.4 * min(lr / 0.1, 1.0) if step < 4 else 0.2


def whatever_the_lr(step, lr):
    if step < 3:
        return 0.3 * (step / 3)
    return 2e-3 / max(lr, 1e-3 * 0.1) if step < 8 else 0.0


def averaging(step, lr):
    return 0.3 * (step / 3) if step < 3 else 1 / (0.1 * 5)


CASES = {
    "warm up, hold, fall": (STAGES, by_hand),
    "in epochs": (
        [
            {"schedule": "exponential", "start": 0.01, "end": 0.1, "epochs": 1.5},
            {"schedule": "linear", "start": 0.2, "end": 0.3, "epochs": 0.9},
        ],
        growing,
    ),
    "the lr, then a number": (
        [{"schedule": "follow_lr", "start": 0.4, "steps": 4}, {"schedule": "constant", "start": 0.2}],
        with_the_lr,
    ),
}
DECOUPLED = {
    "per_step in the middle": (
        [RAMP, {"schedule": "per_step", "start": 2e-3, "steps": 5}, {"schedule": "constant", "start": 0.0}],
        whatever_the_lr,
    ),
    "a timescale at the end": ([RAMP, {"schedule": "timescale", "fraction": 0.5}], averaging),
}
OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}


def step(model, optimizer, lr):
    pixels, classes = digits(64)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(pixels), classes).backward()
    optimizer.step()


def made(kind, stages, own):
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    lengths = {"total_steps": len(LRS), "steps_per_epoch": 5}
    if own:
        optimizer = OPTIMIZERS[kind](build_decay_groups(model, {"*": stages}).as_param_groups())
        schedule_weight_decay(optimizer, **lengths)
    else:
        optimizer = OPTIMIZERS[kind](model.parameters())
        apply_decay_rules(optimizer, model, {"*": stages}, **lengths)
    return model, optimizer


def loop_by_hand(kind, strength_of):
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for number, lr in enumerate(LRS):
        optimizer.param_groups[0]["weight_decay"] = strength_of(number, lr)
        step(model, optimizer, lr)
    return model


def same(model, other):
    return all(map(torch.equal, model.parameters(), other.parameters()))


every = [(kind, *case) for kind in OPTIMIZERS for case in CASES.values()] + [
    ("AdamW", *case) for case in DECOUPLED.values()
]
ids = [f"{kind}-{name}" for kind in OPTIMIZERS for name in CASES] + [f"AdamW-{name}" for name in DECOUPLED]
each_case = pytest.mark.parametrize(("kind", "stages", "strength_of"), every, ids=ids)
own_or_theirs = pytest.mark.parametrize("own", [True, False], ids=["own", "theirs"])


class LitTheirs(LitBase):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class StopAfterAnEpoch(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


class TestTraining:
    @own_or_theirs
    @each_case
    def test_is_bit_for_bit_that_of_a_loop_by_hand(self, kind, stages, strength_of, own):
        model, optimizer = made(kind, stages, own)
        for lr in LRS:
            step(model, optimizer, lr)
        assert same(model, loop_by_hand(kind, strength_of))

    @own_or_theirs
    @pytest.mark.parametrize("stop", [2, 3, 5, 8])
    @each_case
    def test_goes_on_from_a_checkpoint_inside_a_stage(self, kind, stages, strength_of, own, stop):
        model, optimizer = made(kind, stages, own)
        for lr in LRS[:stop]:
            step(model, optimizer, lr)
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        model, optimizer = made(kind, stages, own)
        for one, state in zip((model, optimizer), torch.load(file, weights_only=True)):
            one.load_state_dict(state)
        for lr in LRS[stop:]:
            step(model, optimizer, lr)
        assert same(model, loop_by_hand(kind, strength_of))

    @own_or_theirs
    def test_in_a_trainer_that_goes_on_inside_a_stage(self, own, tmp_path):
        stages = [RAMP, {**HOLD, "fraction": 0.375}, FALL]  # of 8 steps in 2 epochs
        expected = [0.0, 0.3 * (1 / 3), 0.3 * (2 / 3), 0.3, 0.3, 0.3, 0.3, cosine(0.3, 0.1, 1 / 2)]

        def fitted(*callbacks, ckpt_path=None):
            monitor = WeightDecayMonitor(every_n_steps=1, summary=False)
            rules = [] if own else [WeightDecayRules({"*": stages})]
            model = LitHparams(lr=0.01, decay_rules={"*": stages}) if own else LitTheirs()
            fit = trainer(max_epochs=2, callbacks=[*rules, monitor, *callbacks])
            fit.fit(model, ckpt_path=ckpt_path)
            key = next(key for key in monitor.history[0] if key.endswith("/weight_decay"))
            return model, fit, [record[key] for record in monitor.history]

        whole, _, decays = fitted()
        assert decays == expected
        _, stopped, decays = fitted(StopAfterAnEpoch())
        assert decays == expected[:4]
        stopped.save_checkpoint(tmp_path / "half.ckpt")
        (state,) = torch.load(tmp_path / "half.ckpt", weights_only=True)["optimizer_states"]
        assert [group.get("decay_schedule") for group in state["param_groups"]] == [
            {"schedule": "stages", "stages": stages} if own else None
        ]
        resumed, _, decays = fitted(ckpt_path=tmp_path / "half.ckpt")
        assert decays[-4:] == expected[4:]
        assert same(whole, resumed)


class TestLengths:
    def values(self, stages, total, per_epoch=10.0):
        schedule = DecaySchedule("stages", stages=stages)
        _, length = schedule.in_steps(lambda: total, lambda: per_epoch)
        return [schedule.value(t, length=length) for t in range(total)]

    @pytest.mark.parametrize("total", [10, 97, 100, 1000])
    def test_parts_of_a_run_add_up_to_all_of_it(self, total):
        third = {"schedule": "constant", "fraction": 1 / 3}
        values = self.values([{**third, "start": number} for number in (1, 2, 3)], total)
        begins = np.round(np.arange(3) / 3 * total)
        assert values == [float(np.sum(begins <= t)) for t in range(total)]

    def test_halves_of_an_epoch_add_up(self):
        half = {"schedule": "constant", "epochs": 0.5}
        values = self.values([{**half, "start": number} for number in (1, 2, 3, 4)], 10, per_epoch=5)
        assert values == [1, 1, 2, 2, 2, 3, 3, 3, 4, 4]

    def test_a_delay_of_nothing_is_none(self):
        assert self.values([{**RAMP, "delay_steps": 0}, FALL], 5)[:4] == pytest.approx([0, 0.1, 0.2, 0.3])

    def test_each_stage_has_a_step_at_least(self):
        stages = [{"schedule": "constant", "start": 1, "fraction": 1e-6}, {"schedule": "linear", "start": 2, "end": 3}]
        assert self.values(stages, 4) == pytest.approx([1, 2, 2 + 1 / 3, 2 + 2 / 3])

    def test_the_end_of_the_last_one_holds(self):
        stages = [{**HOLD, "fraction": 0.2}, {**RAMP, "steps": 2}]
        assert self.values(stages, 10) == [0.3, 0.3, 0.0, 0.15, *[0.3] * 6]

    def test_one_alone_may_be_a_part_of_the_run(self):
        assert DecaySchedule("linear", 0, 4, fraction=0.4).in_steps(lambda: 10, lambda: 1) == (0, 4)
        assert DecaySchedule("cosine", 0, 4, fraction=0.5, delay_steps=3).in_steps(lambda: 10, lambda: 1) == (3, 5)

    def test_a_run_that_does_not_come_to_a_stage(self):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        apply_decay_rules(optimizer, model, {"*": [RAMP, HOLD, FALL]}, total_steps=3)
        match = (
            r"the run of 3 optimizer steps ends before stage 2 of the schedule of group 'rest' \(linear 0 to 0.3 over"
        )
        with pytest.warns(UserWarning, match=match):
            optimizer.step()
        with warnings.catch_warnings():  # once
            warnings.simplefilter("error")
            optimizer.step()

    def test_in_steps_alone_no_run_has_to_be_known(self, recwarn):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        apply_decay_rules(optimizer, model, {"*": [RAMP, {**FALL, "steps": 4}]})
        seen = []
        for _ in range(9):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            seen.append(groups_in_force(optimizer)[0]["weight_decay"])
        assert seen == pytest.approx([0, 0.1, 0.2, *(cosine(0.3, 0.1, k / 4) for k in range(4)), 0.1, 0.1])
        assert [one for one in recwarn if "optimizer steps ends" in str(one.message)] == []

    def test_a_length_that_nobody_knows_is_told_before_the_first_step(self):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(build_decay_groups(model, {"*": [RAMP, HOLD, FALL]}).as_param_groups())
        with pytest.raises(ValueError, match="group 'rest' needs the length of the run, which is not known here"):
            schedule_weight_decay(optimizer)


class TestForms:
    TEXT = """
"*":
  - {schedule: linear, start: 0, end: 3e-1, steps: 3}
  - {schedule: constant, start: 0.3, fraction: 0.4}
  - {schedule: cosine, start: 0.3, end: 0.1}
"""
    WHOLE = DecaySchedule("stages", stages=STAGES)

    @pytest.mark.parametrize(
        "rules",
        [
            yaml.safe_load(TEXT),
            OmegaConf.create(TEXT),
            json.loads(json.dumps({"*": STAGES})),
            {"*": [DecaySchedule(**RAMP), HOLD, DecaySchedule(**FALL)]},
            {"*": tuple(STAGES)},
            {"*": WHOLE},
            {"*": WHOLE.as_dict()},
            {"*": {"weight_decay": STAGES}},
            {"rest": {"params": "*", "weight_decay": STAGES}},
            [DecayRule(STAGES, params="*")],
            [{"weight_decay": STAGES, "params": "*"}],
        ],
        ids=range(11),
    )
    def test_mean_the_same(self, rules):
        expected = (DecayRule(self.WHOLE, params="*", group="rest"),)
        assert parse_rules(rules) == expected
        assert parse_rules(plain_rules(rules)) == expected
        assert parse_rules(yaml.safe_load(rules_as_yaml(rules))) == expected
        assert parse_rules(json.loads(json.dumps(plain_rules(rules)))) == expected

    def test_go_out_as_the_list(self):
        rules = {"*.bias": 0, "*": [DecaySchedule(**RAMP), {**FALL, "end": "1e-1"}]}
        plain = [{**RAMP, "start": 0.0}, FALL]
        assert plain_rules({"*": self.WHOLE}) == {"*": STAGES}
        assert shortest_rules(rules) == loggable_rules(rules) == {"*.bias": 0.0, "*": plain}
        assert rules_by_group(shortest_rules(rules)) == {
            "bias": {"params": "*.bias", "weight_decay": 0.0},
            "rest": {"params": "*", "weight_decay": plain},
        }
        assert LitHparams(decay_rules=rules).hparams["decay_rules"] == {
            "*.bias": 0,
            "*": [RAMP, {**FALL, "end": "1e-1"}],
        }
        assert rules_as_yaml(rules).splitlines() == [
            "'*.bias': 0.0",
            "'*': [{schedule: linear, start: 0.0, end: 0.3, steps: 3}, {schedule: cosine, start: 0.3, end: 0.1}]",
        ]

    def test_a_preset_takes_them(self):
        rules = {"preset": "ndim", "weight_decay": [RAMP, {**FALL, "start": "0.3"}]}
        assert parse_rules(rules)[-1].weight_decay == DecaySchedule("stages", stages=[RAMP, FALL])
        assert shortest_rules(rules) == {"preset": "ndim", "weight_decay": [RAMP, FALL]}

    def test_their_object_goes_round(self):
        assert eval(repr(self.WHOLE)) == self.WHOLE
        assert DecaySchedule(**self.WHOLE.as_dict()) == self.WHOLE
        assert hash(copy.deepcopy(self.WHOLE)) == hash(self.WHOLE)

    def test_tables_show_them(self):
        text = "linear 0 to 0.3 over 3 steps, then constant 0.3 over 0.4 of the run, then cosine 0.3 to 0.1"
        assert self.WHOLE.text == text
        groups = build_decay_groups(nn.Linear(2, 2), {"*": STAGES})
        assert f"  {text}  " in str(groups)
        assert text in groups.explain("bias")
        assert "over 4 steps" in str(compare(nn.Linear(2, 2), {"*": STAGES}, {"*": [{**RAMP, "steps": 4}, FALL]}))

    def test_is_drawn(self, no_window):
        _, ax = self.WHOLE.plot(10)
        assert ax.get_lines()[0].get_ydata() == pytest.approx([by_hand(t, None) for t in range(10)])
        with pytest.raises(ValueError, match="a per_step schedule goes by the lr: pass lr"):
            DecaySchedule("stages", stages=[RAMP, {"schedule": "per_step", "start": 0.1}]).plot(10)
        with pytest.raises(ValueError, match=r"has a time in epochs: pass how many the run has, plot\(10, epochs=10\)"):
            DecaySchedule("stages", stages=[{**HOLD, "fraction": None, "epochs": 2}, FALL]).plot(10)

    def test_one_number_of_a_stage_is_searched_for(self):
        optuna = pytest.importorskip("optuna")
        optuna.logging.set_verbosity(optuna.logging.WARNING)

        def objective(trial):
            hold = trial.suggest_float("hold", 0.2, 0.8, step=0.2)
            stages = [{"schedule": "constant", "start": 0.3, "fraction": hold}, {**FALL, "end": 0.0}]
            model = LitHparams(lr=0.01, decay_rules={"*": stages})
            monitor = WeightDecayMonitor(every_n_steps=1, summary=False)
            trainer(max_epochs=2, callbacks=[monitor]).fit(model)
            assert model.hparams["decay_rules"]["*"][0]["fraction"] == hold
            return sum(record["decay/rest/weight_decay"] for record in monitor.history)

        study = optuna.create_study(sampler=optuna.samplers.GridSampler({"hold": [0.2, 0.8]}))
        study.optimize(objective, n_trials=2)
        assert study.best_params == {"hold": 0.2}  # the least λ in all


class TestFactorsOnTheLr:
    @pytest.mark.parametrize("own", [True, False], ids=["own", "theirs"])
    def test_are_in_what_a_stage_reckons_with(self, own):
        rule = DecayRule([{**RAMP, "steps": 2}, {"schedule": "per_step", "start": 1e-3}], lr_mult=0.25)
        model = nn.Linear(2, 2)
        if own:
            groups = build_decay_groups(model, {"*": rule})
            optimizer = torch.optim.AdamW([group.as_param_group(lr=0.1) for group in groups])
            schedule_weight_decay(optimizer)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            apply_decay_rules(optimizer, model, {"*": rule})
        seen = []
        for _ in range(4):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            seen.append(groups_in_force(optimizer)[0]["weight_decay"])
        assert seen == [0.0, 0.15, 1e-3 / 0.025, 1e-3 / 0.025]


class TestMistakes:
    @pytest.mark.parametrize(
        ("stages", "error", "message"),
        [
            ([], ValueError, "an empty list of schedules says nothing about λ"),
            ([RAMP, 0.3], TypeError, "stage 2: it must be a schedule, such as {schedule: constant, start: 0.1"),
            ([RAMP, "cosine"], TypeError, "stage 2: it must be a schedule"),
            ([RAMP, None], TypeError, "stage 2: it must be a schedule"),
            ([RAMP, [HOLD, FALL]], TypeError, "stage 2: it is a list itself; write its schedules into the one list"),
            ([{"schedule": "stages", "stages": [HOLD]}, FALL], TypeError, "stage 1: it is a list itself"),
            ([DecaySchedule("stages", stages=[RAMP]), FALL], TypeError, "stage 1: it is a list itself"),
            ([FALL, RAMP], ValueError, "stage 1: a cosine schedule needs steps, epochs or a fraction of the run here"),
            ([{**HOLD, "fraction": None}, FALL], ValueError, "stage 1: a constant schedule needs steps, epochs or"),
            ([{"schedule": "per_step", "start": 1}, FALL], ValueError, "stage 1: a per_step schedule needs steps"),
            ([{**RAMP, "epochs": 2}, FALL], ValueError, "stage 1: steps and epochs say the same thing twice"),
            ([{**RAMP, "fraction": 0.2}, FALL], ValueError, "stage 1: steps and fraction say the same thing twice"),
            ([RAMP, {**FALL, "delay_steps": 3}], ValueError, "stage 2: it has delay_steps, and stages begin where the"),
            (
                [{"schedule": "timescale", "steps": 3}, FALL],
                ValueError,
                "stage 1: a timescale can be the last stage only",
            ),
            ([{**HOLD, "fraction": 0.7}] * 2, ValueError, "the stages take 0.7 + 0.7 = 1.4 of the run"),
            ([{**HOLD, "fraction": 0.5}] * 2 + [FALL], ValueError, "stage 3: it never begins, as the stages before it"),
            (
                [{**HOLD, "fraction": 20}, FALL],
                ValueError,
                "stage 1: fraction is a part of the run, 1 for all of it, got 20",
            ),
            (
                [RAMP, {**FALL, "ende": 3}],
                TypeError,
                "stage 2: unknown field 'ende' of a schedule; did you mean 'end'?",
            ),
            ([RAMP, {"start": 3}], TypeError, "stage 2: a schedule says which one it is"),
            ([RAMP, {**FALL, "start": "much"}], ValueError, "stage 2: start must be a number, got the text 'much'"),
            ([RAMP, {"schedule": "cosin"}], ValueError, "stage 2: unknown schedule 'cosin'; did you mean 'cosine'?"),
            ({"schedule": "stages"}, ValueError, "a schedule of stages needs stages, a list of schedules"),
            ({"schedule": "stages", "stages": 3}, TypeError, "stages must be a list of schedules, such as [{schedule"),
            ({"schedule": "stages", "stages": [FALL], "start": 3}, TypeError, "a stages schedule has no start"),
            (
                {**HOLD, "fraction": 0.4},
                TypeError,
                "a constant schedule goes on to the end of the run, and fraction is",
            ),
            (DecaySchedule("follow_lr", 0.1, steps=4), TypeError, "a follow_lr schedule goes on to the end of the run"),
        ],
    )
    def test_are_told_by_the_stage(self, stages, error, message):
        with pytest.raises(error, match="^" + re.escape(f"decay rule '*': {message}")):
            parse_rules({"*": stages})

    def test_a_list_of_schedules_in_the_place_of_the_rules(self):
        with pytest.raises(
            TypeError, match=r"unknown field 'schedule'.*is the λ of a rule, as in \{'\*': \[\{schedule"
        ):
            parse_rules([RAMP, FALL])

    @pytest.mark.parametrize("last", [{"schedule": "per_step", "start": 0.1}, {"schedule": "timescale", "steps": 9}])
    def test_a_later_stage_that_the_optimizer_cannot_have(self, last):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with pytest.raises(ValueError, match=f"has a {last['schedule']} schedule|a timescale, which SGD cannot have"):
            apply_decay_rules(optimizer, model, {"*": [RAMP, last]})
        optimizer = torch.optim.SGD(build_decay_groups(model, {"*": [RAMP, last]}).as_param_groups(), lr=0.1)
        with pytest.raises(ValueError, match=f"has a {last['schedule']} schedule|a timescale, which SGD cannot have"):
            schedule_weight_decay(optimizer)
        with pytest.raises(
            ValueError, match=f"a {last['schedule']} divides by the lr, which has no value at lr_mult=0"
        ):
            DecayRule([RAMP, last], lr_mult=0)

    def test_a_later_stage_that_needs_a_peak(self):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        apply_decay_rules(optimizer, model, {"*": [RAMP, {"schedule": "per_step", "start": 0.1}]}, total_steps=9)
        with pytest.raises(ValueError, match="the schedule of group 'rest' needs the peak of the lr, which is 0"):
            optimizer.step()

    def test_lengths_that_do_not_fit_the_stages(self):
        with pytest.raises(ValueError, match="3 stages need length, a tuple with the T of each, got 4"):
            DecaySchedule("stages", stages=STAGES).value(3, length=4)
