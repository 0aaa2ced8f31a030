"""A factor on the lr: on that of each step, whoever sets it, and nowhere else."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from helpers import LitBase, LitHparams, Net, digits, trainer
from optim.by_hand import AsItWas
from torch import nn

from lightning_regdecay import (
    DecaySchedule,
    WeightDecayMixin,
    WeightDecayRules,
    apply_decay_rules,
    build_decay_groups,
    groups_in_force,
    schedule_weight_decay,
)

RULES = {"*.bias": 0.0, "*": 0.3}
LR_RULES = {"head.*": {"lr_mult": 0.5}, "norm.*": {"lr_mult": 4.0}}
FACTORS = {"head": 0.5, "norm": 4.0, "body": 1.0}
schedulers = torch.optim.lr_scheduler


def adamw(groups, **options):
    return torch.optim.AdamW(groups, **{"lr": 0.02, "weight_decay": 0.1, **options})


def by_hand(model, **scaled):
    """A param group per parameter; options that are to be scaled like the lr."""
    return [
        {
            "params": [parameter],
            "weight_decay": 0.0 if name.endswith("bias") else 0.3,
            **{key: FACTORS[name.split(".")[0]] * value for key, value in {"lr": 0.02, **scaled}.items()},
        }
        for name, parameter in model.named_parameters()
    ]


def train(model, optimizer, scheduler=None, steps=6):
    pixels, classes = digits(64)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(pixels), classes)
        loss.backward()
        optimizer.step()
        if isinstance(scheduler, schedulers.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()


def nets():
    torch.manual_seed(0)
    model = Net()
    return model, copy.deepcopy(model)


class LitOver(WeightDecayMixin, L.LightningModule):
    """A model's parts, by their own names, with decay rules and the lr rules."""

    lr_rules = LR_RULES

    def __init__(self, model, rules):
        super().__init__()
        self.decay_rules = rules
        self.body, self.norm, self.head = model.body, model.norm, model.head

    def build_optimizer(self, param_groups):
        return adamw(param_groups)


def one_cycle(optimizer, scale):
    return schedulers.OneCycleLR(optimizer, [0.05 * s for s in scale], total_steps=20, cycle_momentum=False)


SCHEDULERS = {
    "step": lambda optimizer, scale: schedulers.StepLR(optimizer, 1, 0.5),
    "lambda": lambda optimizer, scale: schedulers.LambdaLR(optimizer, lambda step: 2.0**-step),
    "plateau": lambda optimizer, scale: schedulers.ReduceLROnPlateau(optimizer, patience=1, factor=0.5),
    "one cycle": one_cycle,
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("own", [True, False], ids=["own", "theirs"])
def test_schedulers_steer_what_is_multiplied(scheduler, own):
    model, twin = nets()
    if own:
        lit = LitOver(model, RULES)
        optimizer = lit.configure_optimizers()
    else:
        optimizer = adamw(model.parameters())
        apply_decay_rules(optimizer, model, RULES, lr_rules=LR_RULES)
    hand = adamw(by_hand(twin))
    ours = SCHEDULERS[scheduler](optimizer, [1.0] * len(optimizer.param_groups))
    theirs = SCHEDULERS[scheduler](hand, [group["lr"] / 0.02 for group in hand.param_groups])
    before = AsItWas(optimizer)
    train(model, optimizer, ours)
    before.check()
    train(twin, hand, theirs)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert len({group["lr"] for group in optimizer.param_groups}) == 1
    lrs = {name: group["lr"] for group in groups_in_force(optimizer) for name in group["param_names"]}
    names = [name for name, _ in twin.named_parameters()]
    assert lrs == {name: group["lr"] for name, group in zip(names, hand.param_groups)}


def test_a_tensor_lr_stays_one():
    model, twin = nets()
    optimizer = adamw(model.parameters(), lr=torch.tensor(0.02), foreach=False)
    apply_decay_rules(optimizer, model, RULES, lr_rules=LR_RULES)
    hand = adamw(by_hand(twin), foreach=False)
    for group in hand.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    train(model, optimizer, schedulers.StepLR(optimizer, 1, 0.5))
    train(twin, hand, schedulers.StepLR(hand, 1, 0.5))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert optimizer.param_groups[0]["lr"] == torch.tensor(0.02 / 2**6)


def test_zero_trains_nothing():
    model, before = nets()
    optimizer = adamw(model.parameters())
    apply_decay_rules(optimizer, model, {"*": 0.5}, lr_rules={"head.*": {"lr_mult": 0}})
    train(model, optimizer)
    assert torch.equal(model.head.weight, before.head.weight)
    assert not torch.equal(model.body.weight, before.body.weight)


def test_other_factors_take_the_place_of_the_first_ones():
    model, twin = nets()
    optimizer = adamw(model.parameters())
    apply_decay_rules(optimizer, model, RULES, lr_rules={"*": {"lr_mult": 0.125}})
    train(model, optimizer, steps=2)
    apply_decay_rules(optimizer, model, RULES, lr_rules=LR_RULES)
    train(model, optimizer, steps=2)
    apply_decay_rules(optimizer, model, RULES)
    train(model, optimizer, steps=2)

    hand = adamw(by_hand(twin))
    for factors in (dict.fromkeys(FACTORS, 0.125), FACTORS, dict.fromkeys(FACTORS, 1.0)):
        for (name, _), group in zip(twin.named_parameters(), hand.param_groups):
            group["lr"] = factors[name.split(".")[0]] * 0.02
        train(twin, hand, steps=2)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_an_optimizer_without_lr_is_told():
    class NoLr(torch.optim.SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.1, weight_decay=0.1)
            for group in self.param_groups:
                group["lr"] = None

    model = Net()
    optimizer = NoLr(model.parameters())
    before = dict(vars(optimizer))
    with pytest.raises(ValueError, match=r"has lr_mult=4, a factor on the lr of its param group, and NoLr has no lr"):
        apply_decay_rules(optimizer, model, RULES, lr_rules=LR_RULES)
    assert vars(optimizer) == before


def test_an_lr_in_an_optimizer_of_others_is_told():
    model = Net()
    with pytest.raises(ValueError, match=r"'head.rest' has the options 'lr'.* a factor on the lr \(lr_mult\) alone"):
        apply_decay_rules(adamw(model.parameters()), model, {"*": 0.1}, lr_rules={"head.*": 1e-3})


class TestSchedulesOfLambda:
    @pytest.mark.parametrize("own", [True, False], ids=["own", "theirs"])
    def test_a_timescale_goes_by_the_lr_that_is_stepped_with(self, own):
        model, _ = nets()
        rules = {"*": DecaySchedule("timescale", steps=10)}
        if own:
            optimizer = self.own(model, rules)
        else:
            optimizer = adamw(model.parameters())
            apply_decay_rules(optimizer, model, rules, lr_rules=LR_RULES)
        train(model, optimizer, steps=1)
        found = {group["lr"]: group["weight_decay"] for group in groups_in_force(optimizer)}
        assert found == {lr: pytest.approx(1 / (lr * 10)) for lr in (0.02, 0.01, 0.08)}

    @pytest.mark.parametrize("own", [True, False], ids=["own", "theirs"])
    def test_follow_lr_goes_by_the_lr_of_the_schedule(self, own):
        model, _ = nets()
        rules = {"*": DecaySchedule("follow_lr", 0.4)}
        if own:
            optimizer = self.own(model, rules)
        else:
            optimizer = adamw(model.parameters())
            apply_decay_rules(optimizer, model, rules, lr_rules=LR_RULES)
        train(model, optimizer, schedulers.StepLR(optimizer, 1, 0.5), steps=3)
        train(model, optimizer, steps=1)
        assert {group["weight_decay"] for group in groups_in_force(optimizer)} == {0.05}

    def own(self, model, rules):
        """An own optimizer, whose groups hold λ themselves."""
        self.lit = LitOver(model, rules)
        optimizer = self.lit.configure_optimizers()
        schedule_weight_decay(optimizer, total_steps=20)
        return optimizer


class LitWithFactor(LitHparams):
    decay_rules = {"*.bias": 0.0, "*": 0.3}

    def __init__(self, lr=1e-2, lr_rules=None):
        super().__init__()
        self.save_hyperparameters()

    def build_lr_scheduler(self, optimizer):
        return {"scheduler": schedulers.StepLR(optimizer, 1, 0.5), "interval": "step"}


class TestInAFit:
    def test_the_factor_is_on_what_the_run_has(self):
        run = trainer(max_epochs=1)
        model = LitWithFactor(lr_rules={"head.*": {"lr_mult": 0.25}})
        run.fit(model)
        [optimizer] = run.optimizers
        lr = optimizer.param_groups[0]["lr"]
        assert lr == 1e-2 / 2**run.global_step
        assert {group["name"]: group["lr"] for group in groups_in_force(optimizer)} == {
            "head.bias": 0.25 * lr,
            "bias": lr,
            "head.rest": 0.25 * lr,
            "rest": lr,
        }

    def test_a_callback_brings_them(self):
        class Lit(LitBase):
            def configure_optimizers(self):
                return adamw(self.parameters())

        found = []
        for callbacks in ([WeightDecayRules(RULES, lr_rules=LR_RULES)], []):
            model = Lit()
            if not callbacks:
                model.configure_optimizers = lambda model=model: adamw(by_hand(model))
            trainer(max_epochs=2, callbacks=callbacks).fit(model)
            found.append([parameter.detach() for parameter in model.parameters()])
        assert all(map(torch.equal, *found))

    @pytest.mark.parametrize("given", [{}, {"lr_rules": {"head.*": {"lr_mult": 0.25}}}], ids=["class", "argument"])
    def test_lr_rules_alone(self, given):
        class Lit(LitHparams):
            decay_rules = None
            lr_rules = {"head.*": {"lr_mult": 0.5}}

            def __init__(self, lr=1e-2, lr_rules=None):
                super().__init__()
                self.save_hyperparameters()

        run = trainer(max_epochs=1)
        run.fit(Lit(**given))
        factor = 0.25 if given else 0.5
        assert {group["name"]: group["lr"] for group in groups_in_force(run.optimizers[0])} == {
            "head.default": factor * 1e-2,
            "default": 1e-2,
        }
        assert all(group["weight_decay"] == 0.01 for group in run.optimizers[0].param_groups)

    def test_a_resumed_run_goes_by_the_factor_of_today(self, tmp_path):
        """And by name, as the groups are others."""
        run = trainer(max_epochs=1)
        run.fit(LitWithFactor())
        run.save_checkpoint(tmp_path / "run.ckpt")
        torch.load(tmp_path / "run.ckpt", weights_only=True)
        model = LitWithFactor(lr_rules={"head.*": {"lr_mult": 0.25}})
        again = trainer(max_epochs=2)
        again.fit(model, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
        [optimizer] = again.optimizers
        lr = 1e-2 / 2**again.global_step
        assert {group["lr"] for group in optimizer.param_groups} == {lr}
        assert {g["name"]: g["lr"] for g in groups_in_force(optimizer)}["head.rest"] == 0.25 * lr
        again.save_checkpoint(tmp_path / "again.ckpt")
        saved = torch.load(tmp_path / "again.ckpt", weights_only=True)
        assert saved["lr_rules"] == [{"lr_mult": 0.25, "params": "head.*", "group": "head"}]
        assert saved["hyper_parameters"]["lr_rules"] == {"head.*": {"lr_mult": 0.25}}
        assert {group["lr"] for group in saved["optimizer_states"][0]["param_groups"]} == {lr}

    def test_a_run_that_goes_on_is_that_of_one(self, tmp_path):
        found = []
        for stops in ([2], [1, 2]):
            torch.manual_seed(0)
            model, path = LitWithFactor(lr_rules={"head.*": {"lr_mult": 0.25}}), None
            for epochs in stops:
                run = trainer(max_epochs=epochs)
                run.fit(model, ckpt_path=path)
                path = tmp_path / f"{epochs}.ckpt"
                run.save_checkpoint(path)
            found.append([parameter.detach() for parameter in model.parameters()])
        assert all(map(torch.equal, *found))

    def test_loggers_have_a_value_for_each(self, tmp_path):
        logger = L.pytorch.loggers.CSVLogger(tmp_path)
        trainer(max_epochs=1, logger=logger).fit(LitWithFactor(lr_rules={"head.*": {"lr_mult": 0.25}, "*": 1e-3}))
        assert logger.experiment.hparams["lr_rules"] == {"head.*": {"lr_mult": 0.25}, "*": 0.001}
        assert logger.experiment.hparams["decay_rules"] == {"*.bias": 0.0, "*": 0.3}

    def test_a_mistake_stops_the_fit(self):
        with pytest.raises(ValueError, match=r"lr rule 1 'haed\.\*' takes nothing"):
            trainer(max_epochs=1).fit(LitWithFactor(lr_rules={"haed.*": {"lr_mult": 0.25}}))

    def test_the_table_shows_what_is_stepped_with(self, capsys):
        groups = build_decay_groups(Net(), {"*": 0.1}, lr_rules={"head.*": {"lr_mult": 0.25}})
        assert "head.rest  * x head.*" in str(groups)
        assert "0.25 x optimizer's" in str(groups)


class TestOptionsThatAnOptimizerWasBuiltWith:
    """In force, or an error."""

    def own(self, lr_rules, rules=RULES):
        model = Net()
        groups = build_decay_groups(model, rules, lr_rules=lr_rules)
        optimizer = torch.optim.AdamW(groups.as_param_groups(0.1, lr=0.02), lr=0.02)
        apply_decay_rules(optimizer, model, rules, lr_rules=lr_rules)
        return model, optimizer

    @pytest.mark.parametrize("rules", [{}, {"body.*": 0.5}])
    @pytest.mark.parametrize("lr_rule", [1e-5, {"options": {"betas": (0.5, 0.9)}}])
    def test_not_in_one_of_others_whatever_the_decay_rules_take(self, rules, lr_rule):
        model = Net()
        groups = [{"params": [*model.body.parameters(), *model.norm.parameters()]}, {"params": model.head.parameters()}]
        optimizer = adamw(groups)
        with pytest.raises(
            ValueError, match=r"group 'head.default' has the options .* not built over the decay groups"
        ):
            apply_decay_rules(optimizer, model, rules, lr_rules={"head.*": lr_rule})

    @pytest.mark.parametrize("lr_rules", [{"head.*": 1e-4}, {"head.*": {"lr_mult": 0.1}}, {}, {"body.*": 1e-2}])
    def test_others_later_are_told(self, lr_rules):
        model, optimizer = self.own({"head.*": 1e-2})
        before = [group["lr"] for group in groups_in_force(optimizer)]
        with pytest.raises(ValueError, match=r"has the options|when its optimizer was built"):
            apply_decay_rules(optimizer, model, RULES, lr_rules=lr_rules)
        assert [group["lr"] for group in groups_in_force(optimizer)] == before
        apply_decay_rules(optimizer, model, {"*": 0.7}, lr_rules={"head.*": 1e-2, "body.*": {"lr_mult": 0.5}})
        found = {name: group["lr"] for group in groups_in_force(optimizer) for name in group["param_names"]}
        assert (found["head.weight"], found["body.weight"], found["norm.weight"]) == (1e-2, 0.01, 0.02)

    def test_a_model_that_changes_them_where_an_epoch_starts_stops(self):
        class Lit(LitWithFactor):
            def on_train_epoch_start(self):
                if self.current_epoch == 1:
                    self.lr_rules = {"head.*": 1e-4}

        with pytest.raises(ValueError, match="when its optimizer was built"):
            trainer(max_epochs=2).fit(Lit(lr_rules={"head.*": 1e-2}))

    def test_a_factor_that_a_model_changes_where_an_epoch_starts_is_in_force_in_it(self):
        class Lit(LitWithFactor):
            lrs = []

            def on_train_epoch_start(self):
                self.lr_rules = {"head.*": {"lr_mult": 0.5**self.current_epoch}}

            def on_train_batch_end(self, *args):
                groups = groups_in_force(self.trainer.optimizers[0])
                self.lrs.append({group["name"]: group["lr"] for group in groups}["head.rest"])

            def build_lr_scheduler(self, optimizer):
                return None

        model = Lit(lr_rules={"head.*": {"lr_mult": 1.0}})
        trainer(max_epochs=2).fit(model)
        assert model.lrs == [1e-2] * 4 + [5e-3] * 4

    def test_parameters_that_come_later_are_told(self):
        class Lit(LitWithFactor):
            def on_train_epoch_start(self):
                if self.current_epoch == 1:
                    self.body.requires_grad_(True)
                    self.trainer.optimizers[0].add_param_group({"params": list(self.body.parameters()), "lr": 1e-3})

        model = Lit(lr_rules={"body.*": 1e-5})
        model.body.requires_grad_(False)
        with (
            pytest.warns(UserWarning, match="takes frozen parameters only"),
            pytest.raises(ValueError, match="for parameters that come to it later"),
        ):
            trainer(max_epochs=2).fit(model)

    def test_rules_that_set_the_same_for_frozen_parameters_are_told(self):
        model = Net()
        model.body.requires_grad_(False)
        rules = {"body.*": {"weight_decay": 0.1, "lr_mult": 0.5}, "*": 0.2}
        with pytest.raises(ValueError, match="both set lr"):
            build_decay_groups(model, rules, lr_rules={"body.*": 1e-3})

    def test_lost_in_build_optimizer_they_are_told(self):
        class Lit(LitWithFactor):
            def build_optimizer(self, param_groups):
                return adamw([{key: group[key] for key in ("params", "weight_decay")} for group in param_groups])

        with pytest.raises(
            ValueError, match=r"group 'head.bias' has lr=0.02 in the AdamW that build_optimizer has made"
        ):
            Lit(lr_rules={"head.*": 1e-5}).configure_optimizers()

    def test_an_lr_that_a_scheduler_overrides_is_named(self):
        class Lit(LitWithFactor):
            def build_lr_scheduler(self, optimizer):
                return one_cycle(optimizer, [1.0] * len(optimizer.param_groups))

        with pytest.warns(UserWarning, match=r"group 'head.bias' begins with the lr 0\.002, and its rule gives 1e-05"):
            trainer(max_epochs=1).fit(Lit(lr_rules={"head.*": 1e-5}))

    def test_an_lr_that_a_checkpoint_overrides_is_named(self, tmp_path):
        run = trainer(max_epochs=1)
        run.fit(LitWithFactor(lr_rules={"head.*": 1e-5}))
        run.save_checkpoint(tmp_path / "run.ckpt")
        with pytest.warns(UserWarning, match=r"begins with the lr 1e-05, and its rule gives 0\.001: .* a checkpoint"):
            trainer(max_epochs=2).fit(
                LitWithFactor(lr_rules={"head.*": 1e-3}), ckpt_path=tmp_path / "run.ckpt", weights_only=True
            )


class TestFactorsThatAreInTheLrAlready:
    def test_are_not_applied_twice(self):
        model = Net()
        groups = build_decay_groups(model, RULES, lr_rules=LR_RULES)
        optimizer = adamw(groups.as_param_groups(0.1, lr=0.02))
        lrs = [group["lr"] for group in groups_in_force(optimizer)]
        for _ in range(2):
            apply_decay_rules(optimizer, model, RULES, lr_rules=LR_RULES)
            train(model, optimizer, steps=1)
            assert [group["lr"] for group in groups_in_force(optimizer)] == lrs

    def test_others_take_their_place(self):
        model = Net()
        groups = build_decay_groups(model, RULES, lr_rules=LR_RULES)
        optimizer = adamw(groups.as_param_groups(0.1, lr=0.02))
        apply_decay_rules(optimizer, model, RULES, lr_rules={"head.*": {"lr_mult": 2.0}})
        found = {name: group["lr"] for group in groups_in_force(optimizer) for name in group["param_names"]}
        assert (found["head.weight"], found["norm.weight"], found["body.weight"]) == (0.04, 0.08, 0.02)

    def test_of_a_model_that_returns_such_an_optimizer(self):
        class Lit(LitWithFactor):
            def configure_optimizers(self):
                return adamw(self.decay_groups.as_param_groups(0.1, lr=0.02))

        run = trainer(max_epochs=1)
        run.fit(Lit(lr_rules={"head.*": {"lr_mult": 0.5}}))
        assert {g["name"]: g["lr"] for g in groups_in_force(run.optimizers[0])}["head.rest"] == 0.01


def test_an_optimizer_that_writes_its_lr():
    class Falling(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                group["lr"] *= 0.5

    model = Net()
    optimizer = Falling(model.parameters(), lr=0.25, weight_decay=0.1)
    apply_decay_rules(optimizer, model, RULES, lr_rules=LR_RULES)
    train(model, optimizer, steps=2)
    assert optimizer.param_groups[0]["lr"] == 0.0625
    assert {group["lr"] for group in groups_in_force(optimizer)} == {0.03125, 0.0625, 0.25}


def test_an_optimizer_that_notes_numbers_by_the_lr_is_named():
    class Noting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["highest"] = max(group["lr"], group.get("highest", 0.0))
            return super().step(closure)

    model = Net()
    optimizer = Noting(model.parameters(), lr=0.25, weight_decay=0.1)
    apply_decay_rules(optimizer, model, RULES)
    train(model, optimizer, steps=1)
    apply_decay_rules(optimizer, model, RULES, lr_rules=LR_RULES)
    with pytest.warns(UserWarning, match="differ inside of one: a checkpoint has one of each"):
        train(model, optimizer, steps=2)


def test_an_optimizer_that_notes_the_first_lrs_is_refused():
    class Noting(torch.optim.SGD):
        def __init__(self, groups, lr):
            super().__init__(groups, lr=lr, weight_decay=0.1)
            self.base_lrs = [group["lr"] for group in self.param_groups]

    model = Net()
    with pytest.raises(ValueError, match="has something for each of its param groups in base_lrs"):
        apply_decay_rules(Noting(model.parameters(), 0.1), model, {}, lr_rules={"*": {"lr_mult": 0.5}})


def test_lbfgs_with_several_factors_is_refused():
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match="LBFGS takes one param group"):
        apply_decay_rules(optimizer, model, {}, lr_rules=LR_RULES)


def test_an_lr_with_a_gradient_keeps_it():
    model = nn.Linear(2, 1)
    lr = torch.tensor(0.1, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=0.1, differentiable=True)
    apply_decay_rules(optimizer, model, {}, lr_rules={"*": {"lr_mult": 0.5}})
    weight = model.weight.detach().clone().requires_grad_(True)
    optimizer.param_groups[0]["params"] = [weight.clone()]
    assert all(group["lr"].requires_grad for group in groups_in_force(optimizer))
