"""What people met with the classes and methods that configure optimizers, and with rules in two places."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from field.fits import (
    EPOCH,
    LINEAR,
    OTHER,
    OWN,
    RULES,
    LitKept,
    LitManual,
    LitOwn,
    MyAdamW,
    MySGD,
    both_ways,
    falling,
    fit,
    fitted,
    strengths,
    used,
    used_by_weights,
    with_rules,
)
from helpers import LitBase
from torch import nn

from lightning_regdecay import WeightDecayMixin, apply_decay_rules, groups_in_force


class TestBuildsThem:
    def test_two_optimizers_beside_the_rules(self):
        """A GAN with the mixin and a ``configure_optimizers`` of its own, as guides have it, trained without rules."""

        class Gan(WeightDecayMixin, LitManual):
            decay_rules = RULES

            def configure_optimizers(self):
                return [
                    MyAdamW(self.body.parameters()),
                    MySGD([*self.norm.parameters(), *self.head.parameters()]),
                ]

        model = Gan()
        run = fit(model, "own", None)
        for step, other in zip(*(used(model, optimizer) for optimizer in run.optimizers), strict=True):
            assert {**step, **other} == strengths(model, 0.5)

    @both_ways
    @pytest.mark.parametrize("takes", ["params", "nothing"])
    def test_a_base_class_with_a_build_optimizer(self, way, takes):
        """Published classes have methods of these names, which the mixin hid: its AdamW took the place of their SGD."""

        class Theirs(LitBase):
            def build_lr_scheduler(self, optimizer):
                return torch.optim.lr_scheduler.StepLR(optimizer, 1)

            def configure_optimizers(self):
                optimizer = self.build_optimizer(self.parameters()) if takes == "params" else self.build_optimizer()
                return [optimizer], [self.build_lr_scheduler(optimizer)]

        class TakesParams(Theirs):
            def build_optimizer(self, params):
                return MySGD(params, momentum=0.9)

        class TakesNothing(Theirs):
            def build_optimizer(self):
                return MySGD(self.parameters(), momentum=0.9)

        model, run = fitted(way, TakesParams if takes == "params" else TakesNothing, RULES)
        assert used(model, run.optimizers[0]) == [strengths(model, 0.5)] * EPOCH
        assert [group["momentum"] for group in run.optimizers[0].param_groups] == [0.9]

    @pytest.mark.parametrize("method", ["build_optimizer", "build_lr_scheduler"])
    def test_methods_that_take_something_else(self, method):
        """Such a method with other arguments and no ``configure_optimizers``: an error that said nothing of it."""

        class Theirs(LitBase):
            if method == "build_optimizer":

                def build_optimizer(self):
                    return MyAdamW(self.parameters())

            else:

                def build_lr_scheduler(self, optimizer, steps):
                    return torch.optim.lr_scheduler.StepLR(optimizer, steps)

        model = with_rules("mixin", Theirs, RULES)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        argument = {"build_optimizer": "param_groups", "build_lr_scheduler": "optimizer"}[method]
        match = f"{method} of Ours cannot be called with {argument} alone .*; define {method}\\(self, {argument}\\)"
        with pytest.raises(TypeError, match=match):
            fit(model, "mixin", RULES)
        assert all(map(torch.equal, model.parameters(), before))

    def test_a_build_optimizer_that_loses_the_strengths(self):
        """Passing on ``params`` and ``name`` alone, for an optimizer that is strict about keys, lost λ in silence."""

        class Lit(LitOwn):
            def build_optimizer(self, param_groups):
                return MyAdamW([{"params": group["params"], "name": group["name"]} for group in param_groups])

        with pytest.raises(
            ValueError, match=r"group 'bias' has weight_decay=0.1 in the MyAdamW .* and 0.0 by its rule"
        ):
            fit(Lit(), "own", None)

    @pytest.mark.filterwarnings("ignore:.*in an optimizer but not of the model.*")
    def test_a_module_with_rules_inside_one_without(self):
        """An outer module trains an inner one, whose rules were in force nowhere."""
        inner = LitOwn()

        class Outer(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.inner = inner
                self.scale = nn.Parameter(torch.ones(1))

            def training_step(self, batch, batch_idx):
                return inner.training_step_loss(batch) * self.scale

            def train_dataloader(self):
                return inner.train_dataloader()

            def configure_optimizers(self):
                return MyAdamW(self.parameters())

        model = Outer()
        run = fit(model, "without", None)
        expected = {f"inner.{name}": value for name, value in strengths(inner, 0.5).items()}
        assert used(model, run.optimizers[0]) == [{**expected, "scale": OWN}] * EPOCH

    @pytest.mark.parametrize("kept", [False, True])
    def test_a_module_that_takes_the_optimizer_of_one_inside(self, kept):
        """Here the inner module configures; a schedule knew no length, and rules lived on in the next fit."""
        inner = with_rules("mixin", LitKept, LINEAR) if kept else LitOwn()
        inner.decay_rules = LINEAR

        class Outer(LitBase):
            def __init__(self):
                super().__init__()
                self.inner = inner
                del self.body, self.norm, self.head

            def training_step(self, batch, batch_idx):
                return inner.training_step_loss(batch)

            def configure_optimizers(self):
                return inner.configure_optimizers()

        run = fit(Outer(), "without", None)
        assert used_by_weights(inner, run.optimizers[0]) == falling(EPOCH, EPOCH)
        inner.decay_rules = OTHER
        run = fit(Outer(), "without", None)
        assert used_by_weights(inner, run.optimizers[0])[-EPOCH:] == [0.25] * EPOCH

    def test_a_trainer_property_of_ones_own(self):
        """A subclass overrides Lightning's property ``trainer``, by which the rules come into a fit."""

        class Lit(LitOwn):
            @property
            def trainer(self):
                return self._trainer

            @trainer.setter
            def trainer(self, value):
                self._trainer = value

        model = Lit()
        chosen = MyAdamW(model.parameters())
        model.configure_optimizers = lambda: chosen  # as LightningCLI replaces it
        fit(model, "own", None)
        assert used(model, chosen) == [strengths(model, 0.5)] * EPOCH

    def test_the_callback_for_a_class_whose_rules_are_optional(self):
        """A class with the mixin and no rules trains; with the callback it was refused as one that has some."""

        class Optional(WeightDecayMixin, LitBase):
            def configure_optimizers(self):
                return MyAdamW(self.parameters())

        for way, rest in (("without", OWN), ("callback", 0.5)):
            model = Optional()
            run = fit(model, way, RULES)
            assert used_by_weights(model, run.optimizers[0]) == [rest] * EPOCH


class TestRulesInTwoPlaces:
    def test_those_that_were_looked_at_before(self):
        """A look at what the rules give, in a notebook, and then other rules: the first ones held."""
        model = with_rules("mixin", LitKept, RULES)
        assert {group["weight_decay"] for group in groups_in_force(model.configure_optimizers())} == {0.0, 0.5}
        model.decay_rules = OTHER
        fit(model, "mixin", OTHER)
        assert used(model, model.kept) == [strengths(model, 0.25)] * EPOCH

    @pytest.mark.parametrize("where", ["before", "in configure_optimizers"])
    def test_applied_by_hand_and_others_by_the_callback(self, where):
        """One of the two won in silence."""

        class Applies(LitKept):
            def configure_optimizers(self):
                if where != "before":
                    apply_decay_rules(self.kept, self, RULES)
                return self.kept

        model = Applies()
        if where == "before":
            apply_decay_rules(model.kept, model, RULES)
        with pytest.raises(
            ValueError, match=r"apply_decay_rules has put rules in force .*; put all rules into one place"
        ):
            fit(model, "callback", OTHER)
        assert not model.kept.log.steps
        assert {group["weight_decay"] for group in groups_in_force(model.kept)} == {0.0, 0.5}
