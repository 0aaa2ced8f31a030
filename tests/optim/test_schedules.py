"""Schedules: λ over time, by its formula, at every optimizer step."""

from __future__ import annotations

import copy
import io
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
    WeightDecayMixin,
    WeightDecayMonitor,
    apply_decay_rules,
    build_decay_groups,
    schedule_weight_decay,
)
from lightning_regdecay.optim.in_force import refresh as refresh_schedules
from lightning_regdecay.rules.forms import parse_rules, plain_rules, rules_by_group
from lightning_regdecay.rules.schedules import DecaySchedule

DINO = {"schedule": "cosine", "start": 0.04, "end": 0.4}


def strengths(rules, build=None, model=LitHparams, **options):
    """λ of the first group after each optimizer step of a run: 4 batches an epoch, by default 2 epochs."""
    model = model(lr=0.01, decay_rules=rules)
    if build is not None:
        model.build_optimizer = build
    monitor = WeightDecayMonitor(every_n_steps=1, summary=False)
    trainer(**{"max_epochs": 2, "callbacks": [monitor], **options}).fit(model)
    key = next(key for key in monitor.history[0] if key.endswith("/weight_decay"))
    return [record[key] for record in monitor.history]


def plain_optimizer(schedule, kind=torch.optim.AdamW, **options):
    groups = build_decay_groups(nn.Linear(2, 2), {"*": schedule})
    return kind([group.as_param_group() for group in groups], **{"lr": 0.1, **options})


class TestFormulas:
    """Against numpy, and the schedules of others."""

    def test_cosine_is_dinos(self):
        # Caron et al. 2021, arXiv 2104.14294: the value of iteration t of T.
        t = np.arange(10)
        expected = 0.4 + 0.5 * (0.04 - 0.4) * (1 + np.cos(np.pi * t / 10))
        assert [DecaySchedule(**DINO).value(int(i), length=10) for i in t] == pytest.approx(list(expected), rel=1e-12)

    def test_linear(self):
        expected = [*np.linspace(0.1, 0.2, 5), 0.2, 0.2]
        values = [DecaySchedule("linear", 0.1, 0.2).value(t, length=4) for t in range(7)]
        assert values == pytest.approx(expected, rel=1e-12)

    def test_exponential(self):
        values = [DecaySchedule("exponential", 1e-4, 1e-1).value(t, length=6) for t in range(7)]
        assert values == pytest.approx(list(np.geomspace(1e-4, 1e-1, 7)), rel=1e-12)

    @pytest.mark.parametrize("kind", ["linear", "cosine", "exponential"])
    def test_a_delay_holds_the_start(self, kind):
        values = [DecaySchedule(kind, 0.1, 0.4).value(t, length=4, delay=3) for t in range(8)]
        p = np.arange(1, 5) / 4
        expected = {
            "linear": 0.1 + 0.3 * p,
            "cosine": 0.25 - 0.15 * np.cos(np.pi * p),
            "exponential": 0.1 * 4**p,
        }
        assert values[:4] == [0.1] * 4
        assert values[4:] == pytest.approx(list(expected[kind]), rel=1e-12)

    def test_constant_begins_after_its_delay(self):
        assert [DecaySchedule("constant", 0.1).value(t, delay=2) for t in range(4)] == [0.0, 0.0, 0.1, 0.1]

    def test_follow_lr(self):
        assert DecaySchedule("follow_lr", 0.1).value(5, lr=0.01, peak_lr=0.04) == pytest.approx(0.025)

    def test_a_length_that_is_missing(self):
        with pytest.raises(ValueError, match="a cosine schedule needs length, the optimizer steps that it goes over"):
            DecaySchedule(**DINO).value(3)

    def test_timescale(self):
        # Wang & Aitchison 2024, arXiv 2405.13698: τ = 1 / (lr · λ).
        decay = DecaySchedule("timescale", steps=500).value(0, length=500, peak_lr=0.01)
        assert 1 / (0.01 * decay) == pytest.approx(500)


class TestForms:
    @pytest.mark.parametrize(
        "text",
        [
            '"*": {schedule: cosine, start: 0.04, end: 0.4}',
            '"*": {schedule: cosine, start: 4e-2, end: 4e-1}',
            '"*": {weight_decay: {schedule: cosine, start: 0.04, end: 0.4}}',
            'rest: {params: "*", weight_decay: {schedule: cosine, start: 0.04, end: 0.4}}',
        ],
    )
    def test_yaml(self, text):
        expected = (DecayRule(DecaySchedule("cosine", 0.04, 0.4), params="*", group="rest"),)
        assert parse_rules(yaml.safe_load(text)) == expected
        assert parse_rules(OmegaConf.create(text)) == expected

    def test_code(self):
        schedule = DecaySchedule("cosine", 0.04, 0.4)
        expected = (DecayRule(schedule, params="*", group="rest"),)
        assert parse_rules({"*": schedule}) == expected
        assert parse_rules([DecayRule(schedule, params="*")]) == expected
        assert parse_rules([DecayRule(DINO, params="*")]) == expected

    def test_plain_data_means_the_same(self):
        rules = {
            "*.bias": DecaySchedule("linear", 0.1, 0, epochs=1.5),
            "b": DecayRule(DecaySchedule(**DINO), params="*"),
        }
        plain = plain_rules(rules)
        assert plain == {
            "*.bias": {"schedule": "linear", "start": 0.1, "end": 0.0, "epochs": 1.5},
            "b": {"weight_decay": DINO, "params": "*"},
        }
        assert parse_rules(plain) == parse_rules(rules)
        assert parse_rules(rules_by_group(plain)) == parse_rules(rules)

    @pytest.mark.parametrize(
        ("schedule", "text"),
        [
            (DecaySchedule("constant", 0.1, delay_steps=20), "constant 0.1 after 20 steps"),
            (DecaySchedule(**DINO), "cosine 0.04 to 0.4"),
            (DecaySchedule("linear", 1, 0, steps=9, delay_epochs=0.5), "linear 1 to 0 over 9 steps after 0.5 epochs"),
            (DecaySchedule("follow_lr", 0.1), "follow_lr 0.1"),
            (DecaySchedule("timescale", epochs=10), "timescale 10 epochs"),
        ],
    )
    def test_tables_show_it(self, schedule, text):
        assert f"  {text}  " in str(build_decay_groups(nn.Linear(2, 2), {"*": schedule}))
        assert eval(repr(schedule)) == schedule

    def test_it_is_stored_with_the_hyperparameters(self):
        assert LitHparams(decay_rules={"*": DecaySchedule(**DINO)}).hparams["decay_rules"] == {"*": DINO}


class TestMistakes:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'?"),
            ({"schedule": ["cosine", "linear"]}, "several, one after another, are a list of schedules"),
            ({"schedule": "cosine", "start": 0.1}, "a cosine schedule needs end, the λ that it has there"),
            ({"schedule": "follow_lr"}, "a follow_lr schedule needs start"),
            ({**DINO, "start": -1}, "start must be a finite number of at least 0, got -1"),
            ({**DINO, "end": "much"}, "end must be a number, got the text 'much'"),
            ({**DINO, "steps": 10, "epochs": 1}, "steps and epochs say the same thing twice"),
            ({**DINO, "delay_steps": 10, "delay_epochs": 1}, "delay_steps and delay_epochs say the same thing twice"),
            ({**DINO, "steps": 0}, "steps must be a whole number of at least 1, got 0"),
            ({**DINO, "steps": 1.5}, "steps must be a whole number of at least 1, got 1.5"),
            ({**DINO, "epochs": 0}, "epochs must be above 0, got 0"),
            ({**DINO, "peak_lr": 0.1}, "a cosine schedule has no peak_lr; it has start, end, steps, epochs"),
            ({"schedule": "constant", "start": 0.1, "end": 0.2}, "a constant schedule has no end"),
            ({"schedule": "timescale"}, "a timescale needs steps, epochs or a fraction"),
            ({"schedule": "exponential", "start": 0.1, "end": 0}, "goes between values above 0, got 0.1 and 0;"),
            ({**DINO, "stop": 0.4}, "unknown field 'stop' of a schedule; did you mean"),
            ({**DINO, "params": "a.*"}, "it goes beside weight_decay, not into it"),
            ({**DINO, "weight_decay": 0.1}, "it goes beside weight_decay, not into it"),
        ],
    )
    def test_messages(self, fields, message):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)) as error:
            parse_rules({"*": fields})
        assert str(error.value).startswith("decay rule '*': ")

    def test_a_mapping_that_is_no_schedule(self):
        with pytest.raises(TypeError, match=r"weight_decay must be a number or a schedule, such as {schedule: cosine"):
            DecayRule({"start": 0.1})

    def test_a_schedule_that_does_not_say_which(self):
        with pytest.raises(TypeError, match=r"unknown field 'start'.*a schedule says which one it is, as in"):
            parse_rules({"*": {"start": 0.04, "end": 0.4}})

    def test_two_schedules_for_one_group(self):
        with pytest.raises(ValueError, match="share the group 'a' but disagree on weight_decay"):
            parse_rules([DecayRule(DINO, params="a.*", group="a"), DecayRule(0.1, params="b.*", group="a")])

    @pytest.mark.parametrize("other", [0.0, 0.3])
    def test_two_schedules_at_work_on_one_group(self, other):
        optimizer = plain_optimizer(DINO)
        schedule_weight_decay(optimizer, total_steps=10)
        optimizer.step()
        optimizer.param_groups[0]["weight_decay"] = other
        with pytest.raises(RuntimeError, match=f"two schedules set the weight decay of group 'rest'.*{other:g}"):
            optimizer.step()

    def test_a_run_without_an_end(self):
        with pytest.raises(ValueError, match=re.escape("group 'rest' needs the length of the run, which is not known")):
            strengths({"*": DINO}, max_epochs=-1)
        assert len(strengths({"*": {**DINO, "steps": 3}}, max_epochs=-1, max_steps=5)) == 5

    def test_no_trainer_to_ask_for_the_length(self):
        model = LitHparams(decay_rules={"*": DINO})
        optimizer = model.configure_optimizers()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=re.escape("its times in steps, or call lightning_regdecay.")):
            optimizer.step()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        schedule_weight_decay(optimizer, total_steps=100)
        optimizer.step()
        with pytest.raises(
            ValueError, match="length of the epoch, which is not known here; give the schedule its times"
        ):
            schedule_weight_decay(plain_optimizer({**DINO, "epochs": 2}), total_steps=100)

    @pytest.mark.parametrize("lengths", [{"total_steps": 0}, {"total_steps": -5}, {"steps_per_epoch": float("nan")}])
    def test_lengths_that_are_none(self, lengths):
        with pytest.raises(ValueError, match=next(iter(lengths))):
            schedule_weight_decay(plain_optimizer(DINO), **lengths)

    def test_a_schedule_that_nobody_follows(self):
        class Forgetful(LitBase):
            def configure_optimizers(self):
                return plain_optimizer(DINO)

        match = r"SGD has .* which nobody follows; call lightning_regdecay\.schedule_weight_decay"
        with pytest.raises(RuntimeError, match=match.replace("SGD", "AdamW")):
            trainer(callbacks=[WeightDecayMonitor(summary=False)]).fit(Forgetful())

    def test_rules_of_a_class_are_followed_in_whatever_it_builds(self):
        class Own(LitHparams):
            def configure_optimizers(self):
                return torch.optim.SGD(self.decay_groups.as_param_groups(), lr=0.1)

        expected = 0.4 + (0.04 - 0.4) * (1 + np.cos(np.pi * np.arange(8) / 8)) / 2
        assert strengths({"*": DINO}, model=Own) == pytest.approx(list(expected), rel=1e-12)


class TestTraining:
    @pytest.mark.parametrize(
        ("kind", "options"), [("AdamW", {}), ("AdamW", {"amsgrad": True}), ("SGD", {"momentum": 0.9}), ("Adam", {})]
    )
    def test_is_bit_for_bit_that_of_a_loop_by_hand(self, kind, options):
        build = getattr(torch.optim, kind)
        model = LitHparams(decay_rules={"*.bias": 0.0, "*": DINO})
        model.build_optimizer = lambda groups: build(groups, lr=0.01, **options)
        trainer(max_epochs=2).fit(model)

        by_hand = LitBase()
        names = dict(by_hand.named_parameters())
        biases = [p for name, p in names.items() if name.endswith("bias")]
        others = [p for name, p in names.items() if not name.endswith("bias")]
        groups = [{"params": biases, "weight_decay": 0.0}, {"params": others}]
        optimizer = build(groups, lr=0.01, **options)
        batches = [batch for _ in range(2) for batch in by_hand.train_dataloader()]
        for step, batch in enumerate(batches):
            decay = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * step / len(batches))) / 2
            optimizer.param_groups[1]["weight_decay"] = decay
            optimizer.zero_grad()
            by_hand.training_step_loss(batch).backward()
            optimizer.step()
        assert all(torch.equal(p, names[name]) for name, p in model.named_parameters())

    def test_over_the_run(self):
        expected = 0.4 + (0.04 - 0.4) * (1 + np.cos(np.pi * np.arange(8) / 8)) / 2
        assert strengths({"*": DINO}) == pytest.approx(list(expected), rel=1e-12)

    def test_over_epochs_after_a_delay(self):
        schedule = {"schedule": "linear", "start": 0, "end": 4, "epochs": 0.5, "delay_epochs": 1.25}
        assert strengths({"*": schedule}) == [0, 0, 0, 0, 0, 0, 2, 4]

    def test_counts_optimizer_steps_where_gradients_accumulate(self):
        schedule = {"schedule": "linear", "start": 0, "end": 2, "epochs": 1}
        assert strengths({"*": schedule}, accumulate_grad_batches=2) == [0, 1, 2, 2]
        assert strengths({"*": {**schedule, "end": 4, "steps": 4, "epochs": None}}, accumulate_grad_batches=2) == [
            0,
            1,
            2,
            3,
        ]

    def test_over_max_steps(self):
        assert strengths({"*": {"schedule": "linear", "start": 0, "end": 5}}, max_steps=5) == [0, 1, 2, 3, 4]

    def test_several_optimizers_in_manual_optimization(self):
        class Manual(LitHparams):
            automatic_optimization = False

            def configure_optimizers(self):
                body = build_decay_groups(self.body, {"*": {"schedule": "linear", "start": 0, "end": 8}})
                head = build_decay_groups(self.head, {"*": {"schedule": "linear", "start": 8, "end": 0, "steps": 4}})
                every = torch.optim.SGD([group.as_param_group() for group in body], lr=0.01)
                other = torch.optim.AdamW([group.as_param_group() for group in head], lr=0.01)
                for optimizer in (every, other):
                    schedule_weight_decay(optimizer, total_steps=8)
                return every, other

            def training_step(self, batch, batch_idx):
                every, other = self.optimizers()
                self.manual_backward(self.training_step_loss(batch))
                every.step()
                if batch_idx % 2:
                    other.step()

        monitor = WeightDecayMonitor(every_n_steps=1, summary=False)
        trainer(max_epochs=2, callbacks=[monitor]).fit(Manual())
        last = {key: [record[key] for record in monitor.history] for key in monitor.history[0]}
        assert last["decay/SGD/rest/weight_decay"] == [0, 1, 2, 3, 4, 5, 6, 7]
        assert last["decay/AdamW/rest/weight_decay"] == [8, 8, 8, 6, 6, 4, 4, 2]

    def test_manual_optimization_has_no_length_of_its_own(self):
        class Manual(LitHparams):
            automatic_optimization = False

            def training_step(self, batch, batch_idx):
                self.manual_backward(self.training_step_loss(batch))
                self.optimizers().step()

        with pytest.raises(
            ValueError, match="group 'rest' needs the length of the run, which is not known here; give the"
        ):
            strengths({"*": DINO}, model=Manual)
        assert strengths({"*": {"schedule": "linear", "start": 0, "end": 8, "steps": 8}}, model=Manual) == [*range(8)]

    def test_a_first_step_with_lr_zero_counts(self):
        layer = nn.Linear(2, 2)
        (group,) = build_decay_groups(layer, {"*": {"schedule": "linear", "start": 0, "end": 1, "steps": 10}})
        optimizer = torch.optim.SGD([group.as_param_group()], lr=0.0)
        schedule_weight_decay(optimizer)
        for _ in range(3):
            layer(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        assert optimizer.param_groups[0]["weight_decay"] == 0.2

    def test_accumulation_that_changes_has_no_length_of_its_own(self):
        changing = L.pytorch.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
        model = LitHparams(decay_rules={"*": DINO})
        with pytest.raises(ValueError, match="group 'rest' needs the length of the run, which is not known here"):
            trainer(max_epochs=2, callbacks=[changing]).fit(model)

    def test_the_table_shows_it(self, capsys):
        monitor = WeightDecayMonitor()
        trainer(callbacks=[monitor]).fit(LitHparams(decay_rules={"*": DINO}))
        assert "0.04 (cosine 0.04 to 0.4)" in " ".join(capsys.readouterr().out.split())

    def test_other_groups_stay_as_they_are(self):
        model = LitHparams(decay_rules={"*": 0.1})
        assert set(model.configure_optimizers().param_groups[0]) == {
            *torch.optim.AdamW(model.parameters()).param_groups[0],
            "name",
            "decay_params",
        }


class TestFollowLr:
    def scheduled(self, model, scheduler, **fields):
        model = model(decay_rules={"*": {"schedule": "follow_lr", "start": 0.1, **fields}})
        model.build_lr_scheduler = lambda optimizer: {"scheduler": scheduler(optimizer), "interval": "step"}
        seen = []
        original = model.optimizer_step

        def step(epoch, batch_idx, optimizer, *args):
            lr = optimizer.param_groups[0]["lr"]
            original(epoch, batch_idx, optimizer, *args)
            seen.append((lr, optimizer.param_groups[0]["weight_decay"]))

        model.optimizer_step = step
        trainer(max_epochs=2).fit(model)
        return seen

    def test_a_scheduler_that_goes_down(self):
        seen = self.scheduled(LitHparams, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=8))
        assert [decay for _, decay in seen] == pytest.approx([0.1 * lr / 1e-3 for lr, _ in seen], rel=1e-12)
        assert seen[0][1] == pytest.approx(0.1)
        assert len({decay for _, decay in seen}) == 8

    def test_one_that_warms_up_and_says_its_peak(self):
        one_cycle = torch.optim.lr_scheduler.OneCycleLR
        seen = self.scheduled(LitHparams, lambda o: one_cycle(o, max_lr=0.05, total_steps=9))
        assert [decay for _, decay in seen] == pytest.approx([0.1 * lr / 0.05 for lr, _ in seen], rel=1e-12)

    def test_one_that_does_not_say_its_peak(self):
        schedulers = torch.optim.lr_scheduler
        with pytest.warns(
            UserWarning, match=r"the lr of group 'rest' is 0.002, above the peak 0.001.*give the schedule peak_lr"
        ):
            seen = self.scheduled(LitHparams, lambda o: schedulers.LambdaLR(o, lambda step: 1.0 + step))
        assert {decay for _, decay in seen} == {0.1}
        seen = self.scheduled(LitHparams, lambda o: schedulers.LambdaLR(o, lambda step: 1.0 + step), peak_lr=0.01)
        assert [decay for _, decay in seen] == pytest.approx([0.1 * lr / 0.01 for lr, _ in seen], rel=1e-12)

    def test_an_lr_that_was_changed_without_a_scheduler_of_torchs(self):
        layer = nn.Linear(2, 2)
        (group,) = build_decay_groups(layer, {"*": {"schedule": "follow_lr", "start": 0.1}})
        optimizer = torch.optim.SGD([group.as_param_group()], lr=0.1)
        schedule_weight_decay(optimizer)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        for _ in range(3):
            optimizer.step()
            scheduler.step(1.0)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(1e-3)

    @pytest.mark.parametrize(
        "schedule", [{"schedule": "follow_lr", "start": 0.1}, {"schedule": "timescale", "steps": 10}]
    )
    def test_the_peak_stays_when_others_rewrite_the_first_lr(self, schedule):
        optimizer = plain_optimizer(schedule)
        schedule_weight_decay(optimizer)
        peak = optimizer.param_groups[0]["weight_decay"]
        for lr in (1e-8, 0.05, 0.1):  # as stochastic weight averaging and the learning rate finder do
            optimizer.param_groups[0]["initial_lr"] = optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            part = 1.0 if schedule["schedule"] == "timescale" else lr / 0.1
            assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(part * peak)

    def test_a_warning_comes_once_for_a_run(self):
        for _ in range(2):
            optimizer = plain_optimizer({"schedule": "follow_lr", "start": 0.1})
            schedule_weight_decay(optimizer)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for lr in (0.2, 0.3, 0.4):
                    optimizer.param_groups[0]["lr"] = lr
                    optimizer.step()
            assert ["above the peak 0.1" in str(warning.message) for warning in caught] == [True]
            assert optimizer.param_groups[0]["weight_decay"] == 0.1

    def test_an_lr_of_zero(self):
        with pytest.raises(ValueError, match="needs the peak of the lr, which is 0"):
            schedule_weight_decay(plain_optimizer({"schedule": "follow_lr", "start": 0.1}, lr=0.0))


class TestTimescale:
    def test_of_epochs_and_of_steps(self, capsys):
        assert strengths({"*": {"schedule": "timescale", "epochs": 10}}) == [pytest.approx(1 / (0.01 * 40))] * 8
        assert strengths({"*": {"schedule": "timescale", "steps": 200}}) == [pytest.approx(1 / (0.01 * 200))] * 8

    def test_it_stays_when_the_lr_goes_down(self):
        optimizer = plain_optimizer({"schedule": "timescale", "steps": 10})
        schedule_weight_decay(optimizer)
        for lr in (0.1, 0.05, 0.01):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(1.0)

    def test_it_takes_the_peak_of_the_lr(self):
        def build(groups):
            optimizer = torch.optim.AdamW(groups, lr=0.02)
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1)
            return optimizer

        assert strengths({"*": {"schedule": "timescale", "steps": 100}}, build) == [pytest.approx(0.5)] * 8

    @pytest.mark.parametrize(
        ("kind", "options"),
        [("SGD", {}), ("Adam", {}), ("RMSprop", {}), ("NAdam", {}), ("RAdam", {"decoupled_weight_decay": False})],
    )
    def test_coupled_optimizers_are_refused(self, kind, options):
        with pytest.raises(ValueError, match=f"a timescale, which {kind} cannot have: it is coupled.*such as AdamW"):
            strengths(
                {"*": {"schedule": "timescale", "epochs": 10}},
                lambda groups: getattr(torch.optim, kind)(groups, lr=0.01, **options),
            )

    @pytest.mark.parametrize("kind", ["AdamW", "NAdam", "RAdam", "Lion"])
    def test_decoupled_ones_are_taken(self, kind):
        class Lion(torch.optim.Optimizer):
            """Chen et al. 2023, arXiv 2302.06675, less the interpolation."""

            def __init__(self, params, lr=1e-4, weight_decay=0.0):
                super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

            @torch.no_grad()
            def step(self, closure=None):
                for group in self.param_groups:
                    for p in group["params"]:
                        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * p.grad.sign())

        options = {"decoupled_weight_decay": True} if kind in ("NAdam", "RAdam") else {}
        build = {"Lion": Lion}.get(kind) or getattr(torch.optim, kind)
        optimizer = plain_optimizer({"schedule": "timescale", "steps": 50}, build, **options)
        schedule_weight_decay(optimizer)
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.2)

    def test_a_coupled_one_that_torch_does_not_have(self):
        class Momentum(torch.optim.SGD):
            pass

        with pytest.raises(ValueError, match="which Momentum cannot have"):
            schedule_weight_decay(plain_optimizer({"schedule": "timescale", "steps": 50}, Momentum, momentum=0.9))

    def test_one_of_which_nothing_is_known(self):
        class Odd(torch.optim.AdamW):
            def __init__(self, params, lr, *, secret):
                super().__init__(params, lr=lr)

            def step(self, closure=None):
                raise NotImplementedError

        optimizer = plain_optimizer({"schedule": "timescale", "steps": 50}, Odd, secret=1)
        optimizer.param_groups[0].pop("decoupled_weight_decay", None)
        with pytest.raises(
            ValueError, match="whether Odd decouples weight decay from the gradient could not be found out"
        ):
            schedule_weight_decay(optimizer)


class TestPlainPytorch:
    def test_goes_on_from_a_checkpoint_of_the_optimizer(self):
        def steps(optimizer, count):
            decays = []
            for _ in range(count):
                optimizer.step()
                decays.append(optimizer.param_groups[0]["weight_decay"])
            return decays

        whole = plain_optimizer(DINO)
        schedule_weight_decay(whole, total_steps=8)
        expected = steps(whole, 8)

        first, second = plain_optimizer(DINO), plain_optimizer(DINO)
        for optimizer in (first, second):
            schedule_weight_decay(optimizer, total_steps=8)
        begin = steps(first, 3)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        assert second.param_groups[0]["weight_decay"] == expected[3]
        assert begin + steps(second, 5) == expected

    @pytest.mark.parametrize("steps_itself", [False, True])
    def test_an_optimizer_around_another(self, steps_itself):
        """As sharpness-aware minimization and lookahead are written: the param groups are shared."""

        class Outer(torch.optim.Optimizer):
            def __init__(self, params, **options):
                self.inner = torch.optim.AdamW(params, **options)
                super().__init__(self.inner.param_groups, self.inner.defaults)
                self.param_groups = self.inner.param_groups

            def step(self, closure=None):
                self.inner.step()

        optimizer = plain_optimizer({"schedule": "linear", "start": 0, "end": 1, "steps": 10}, Outer)
        schedule_weight_decay(optimizer)
        for _ in range(4):
            optimizer.step() if steps_itself else optimizer.inner.step()
        assert optimizer.inner.param_groups[0]["weight_decay"] == 0.3

    def test_a_copy_of_an_optimizer_has_to_be_followed_too(self):
        optimizer = plain_optimizer(DINO)
        schedule_weight_decay(optimizer, total_steps=10)
        with pytest.raises(RuntimeError, match="a copy of an optimizer with decay rules in force, and a copy"):
            copy.deepcopy(optimizer).step()
        copied = copy.deepcopy(optimizer)
        schedule_weight_decay(copied, total_steps=10)
        copied.step()

    def test_a_second_call_changes_the_length(self):
        optimizer = plain_optimizer({"schedule": "linear", "start": 0, "end": 1})
        schedule_weight_decay(optimizer, total_steps=10)
        optimizer.step()
        schedule_weight_decay(optimizer, total_steps=2)
        optimizer.step()
        assert optimizer.param_groups[0]["weight_decay"] == 0.5

    def test_an_optimizer_without_schedules(self):
        optimizer = plain_optimizer(0.1)
        schedule_weight_decay(optimizer)
        refresh_schedules(optimizer)
        optimizer.step()
        assert optimizer.param_groups[0]["weight_decay"] == 0.1

    def test_a_step_of_torchs_checkpointing_is_none(self):
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        layer = nn.Linear(2, 2)
        groups = build_decay_groups(layer, {"*": {"schedule": "linear", "start": 0, "end": 1, "steps": 10}})
        optimizer = torch.optim.AdamW([group.as_param_group() for group in groups], lr=0.1)
        schedule_weight_decay(optimizer)
        get_optimizer_state_dict(layer, optimizer)  # takes a step with zero gradients and lr 0
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert optimizer.param_groups[0]["weight_decay"] == 0.0
        optimizer.step()
        assert optimizer.param_groups[0]["weight_decay"] == 0.1


class TestKindsOfOptimizers:
    """A float stays a float, a tensor the same tensor."""

    def run(self, **options):
        torch.manual_seed(0)
        layer = nn.Linear(64, 10)
        groups = build_decay_groups(layer, {"*": {"schedule": "linear", "start": 0.0, "end": 3.0, "steps": 3}})
        optimizer = torch.optim.AdamW([group.as_param_group() for group in groups], **{"lr": 0.1, **options})
        schedule_weight_decay(optimizer)
        return layer, optimizer

    def steps(self, layer, optimizer, step, count=12):
        pixels, classes = digits(64)
        decays = []
        for _ in range(count):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(pixels), classes).backward()
            step()
            decays.append(float(optimizer.param_groups[0]["weight_decay"]))
        assert decays == [0.0, 1.0, 2.0, *[3.0] * (count - 3)]
        return layer.weight.detach()

    @pytest.mark.parametrize(
        "options", [{"fused": True}, {"foreach": True}, {"lr": torch.tensor(0.1), "foreach": False}]
    )
    def test_train_like_the_plain_one(self, options):
        layer, optimizer = self.run(foreach=False)
        expected = self.steps(layer, optimizer, optimizer.step)
        layer, optimizer = self.run(**options)
        assert torch.allclose(self.steps(layer, optimizer, optimizer.step), expected, atol=1e-4)
        assert type(optimizer.param_groups[0]["weight_decay"]) is float
        assert type(optimizer.param_groups[0]["lr"]) is type(options.get("lr", 0.1))

    def test_a_compiled_step(self):
        layer, optimizer = self.run()
        expected = self.steps(layer, optimizer, optimizer.step)
        layer, optimizer = self.run()
        compiled = torch.compile(optimizer.step, backend="eager")
        assert torch.allclose(self.steps(layer, optimizer, compiled), expected, atol=1e-4)

    def test_a_weight_decay_that_is_a_tensor(self):
        layer, optimizer = self.run(foreach=False)
        held = optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.0)
        refresh_schedules(optimizer)
        self.steps(layer, optimizer, optimizer.step)
        assert optimizer.param_groups[0]["weight_decay"] is held


def test_the_mixin_follows_a_schedule_in_every_group():
    class Parts(WeightDecayMixin, LitBase):
        decay_rules = {"head.*": {"schedule": "linear", "start": 4, "end": 0}, "*": DINO}

    monitor = WeightDecayMonitor(every_n_steps=1, summary=False)
    trainer(callbacks=[monitor]).fit(Parts())
    assert [record["decay/head/weight_decay"] for record in monitor.history] == [4, 3, 2, 1]
    assert monitor.history[0]["decay/rest/weight_decay"] == 0.04


class TestFreeOfTheLr:
    """λ that goes by the lr of each step: against a loop by hand, in own optimizers and in those of others."""

    LRS = [0.0, 0.05, 0.1, 0.1, 0.05, 0.01, 1e-5, 0.0]

    def by_hand(self, strength_of):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 10)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        pixels, classes = digits(64)
        for lr in self.LRS:
            optimizer.param_groups[0].update(lr=lr, weight_decay=strength_of(lr))
            self.step(model, optimizer, pixels, classes)
        return model

    def step(self, model, optimizer, pixels, classes):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixels), classes).backward()
        optimizer.step()

    def trained(self, schedule, own, state=None, stop=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 10)
        if own:
            groups = build_decay_groups(model, {"*": schedule})
            optimizer = torch.optim.AdamW(groups.as_param_groups(), lr=0.1)
            schedule_weight_decay(optimizer, total_steps=len(self.LRS))
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            apply_decay_rules(optimizer, model, {"*": schedule}, total_steps=len(self.LRS))
        pixels, classes = digits(64)
        lrs = self.LRS
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            lrs = lrs[state[2] :]
        for lr in lrs[:stop]:
            optimizer.param_groups[0]["lr"] = lr
            self.step(model, optimizer, pixels, classes)
        return model, optimizer

    SCHEDULES = {
        "per_step": ({"start": 2e-3}, lambda lr: 2e-3 / max(lr, 1e-3 * 0.1)),
        "follow_lr": ({"start": 0.4}, lambda lr: 0.4 * min(lr / 0.1, 1.0)),
        "follow_lr squared": ({"start": 0.4, "power": 2}, lambda lr: 0.4 * min(lr / 0.1, 1.0) ** 2),
        "follow_lr inverse": ({"start": 0.4, "power": "-1"}, lambda lr: 0.4 * max(min(lr / 0.1, 1.0), 1e-3) ** -1),
        "follow_lr to the power 0": ({"start": 0.4, "power": 0}, lambda lr: 0.4),
        "timescale": ({"fraction": 0.5}, lambda lr: 1 / (0.1 * 4)),
    }

    @pytest.mark.parametrize("own", [True, False], ids=["own", "theirs"])
    @pytest.mark.parametrize("name", SCHEDULES)
    def test_is_bit_for_bit_that_of_a_loop_by_hand(self, name, own):
        fields, strength_of = self.SCHEDULES[name]
        schedule = DecaySchedule(name.split()[0], **fields)
        model, _ = self.trained(schedule, own)
        assert all(map(torch.equal, model.parameters(), self.by_hand(strength_of).parameters()))

    @pytest.mark.parametrize("own", [True, False], ids=["own", "theirs"])
    @pytest.mark.parametrize("name", SCHEDULES)
    def test_goes_on_from_a_checkpoint(self, name, own):
        schedule = DecaySchedule(name.split()[0], **self.SCHEDULES[name][0])
        whole, _ = self.trained(schedule, own)
        half, optimizer = self.trained(schedule, own, stop=5)
        state = copy.deepcopy((half.state_dict(), optimizer.state_dict(), 5))
        resumed, _ = self.trained(schedule, own, state)
        assert all(map(torch.equal, whole.parameters(), resumed.parameters()))

    def test_a_step_takes_what_was_asked_for_whatever_the_lr(self):
        model = torch.nn.Linear(4, 4, bias=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        apply_decay_rules(optimizer, model, {"*": DecaySchedule("per_step", 0.01)})
        for lr in (0.1, 0.01, 2e-3):
            optimizer.param_groups[0]["lr"] = lr
            before = model.weight.detach().clone()
            model.weight.grad = torch.zeros(4, 4)
            optimizer.step()
            assert torch.allclose(model.weight, 0.99 * before, rtol=1e-6)

    def test_a_factor_on_the_lr_leaves_it_as_it_is(self):
        model = torch.nn.Linear(4, 4, bias=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        rule = DecayRule(DecaySchedule("per_step", 0.01), lr_mult=0.25)
        apply_decay_rules(optimizer, model, {"*": rule})
        before = model.weight.detach().clone()
        model.weight.grad = torch.zeros(4, 4)
        optimizer.step()
        assert torch.allclose(model.weight, 0.99 * before, rtol=1e-6)

    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
    def test_coupled_optimizers_are_refused(self, kind):
        model = torch.nn.Linear(4, 4)
        with pytest.raises(ValueError, match=r"has a per_step schedule, which .* coupled.*lr·λ is not the part"):
            apply_decay_rules(kind(model.parameters(), lr=0.1), model, {"*": DecaySchedule("per_step", 0.01)})

    @pytest.mark.parametrize(
        ("fields", "error", "message"),
        [
            ({"schedule": "per_step"}, ValueError, "a per_step schedule needs start"),
            ({"schedule": "per_step", "start": -1}, ValueError, "start must be a finite number of at least 0"),
            ({"schedule": "per_step", "start": 0.1, "power": 2}, TypeError, "a per_step schedule has no power"),
            ({"schedule": "follow_lr", "start": 0.1, "power": "x"}, ValueError, "power must be a number"),
            ({"schedule": "follow_lr", "start": 0.1, "power": float("inf")}, ValueError, "power must be a finite"),
            ({"schedule": "timescale", "fraction": 0}, ValueError, "fraction must be above 0"),
            (
                {"schedule": "timescale", "fraction": 0.5, "steps": 3},
                ValueError,
                "steps and fraction say the same thing twice",
            ),
            ({"schedule": "timescale"}, ValueError, "needs steps, epochs or a fraction of the run"),
            (
                {"schedule": "linear", "start": 1, "end": 0, "fraction": 5},
                ValueError,
                "fraction is a part of the run, 1 for all of it, got 5",
            ),
        ],
    )
    def test_mistakes_are_told(self, fields, error, message):
        with pytest.raises(error, match=message):
            DecaySchedule(**fields)

    def test_texts(self):
        assert DecaySchedule("per_step", 1e-4).text == "per_step 0.0001"
        assert DecaySchedule("follow_lr", 0.1, power=-1).text == "follow_lr 0.1 to the power -1 of the lr"
        assert DecaySchedule("timescale", fraction=0.5).text == "timescale 0.5 of the run"
