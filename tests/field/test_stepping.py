"""What people met with models that swap, step and steer their optimizers themselves, and add to them."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from field.fits import (
    EPOCH,
    LINEAR,
    OWN,
    RULES,
    LitAdamW,
    LitKept,
    LitManual,
    LitOwn,
    MyAdamW,
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
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_regdecay import schedule_weight_decay


class TestSwapsThem:
    @pytest.mark.parametrize("way", ["mixin", "callback", "own"])
    @pytest.mark.parametrize("how", ["trainer.optimizers", "setup_optimizers"])
    def test_when_an_epoch_starts(self, way, how):
        """A new optimizer for each phase of the training: from then on there were no rules."""
        made = []

        class Swapping(LitOwn if way == "own" else LitAdamW):
            decay_rules = LINEAR

            def on_train_epoch_start(self):
                if self.current_epoch == 1 and how == "setup_optimizers":
                    self.trainer.strategy.setup_optimizers(self.trainer)
                elif self.current_epoch == 1:
                    self.trainer.optimizers = [self.configure_optimizers()]
                made.append(self.trainer.optimizers[0])

        model, _ = fitted(way, Swapping, LINEAR, max_epochs=2)
        first, second = made
        assert first is not second
        assert [*used_by_weights(model, first), *used_by_weights(model, second)] == falling(2 * EPOCH, 2 * EPOCH)
        assert {step["head.bias"] for step in used(model, second)} == {0.0}

    @both_ways
    def test_inside_a_batch(self, way):
        """Somebody resets the optimizer every few steps: each new one made its first step without rules."""
        made = []

        class Resetting(LitAdamW):
            def on_train_batch_start(self, batch, batch_idx):
                if batch_idx == 2:
                    self.trainer.optimizers = [MyAdamW(self.parameters())]
                made.append(self.trainer.optimizers[0])

        model = with_rules(way, Resetting, RULES)
        with pytest.raises(MisconfigurationException, match="put in place inside a batch, too late"):
            fit(model, way, RULES)
        assert used(model, made[0]) == [strengths(model, 0.5)] * 2
        assert not made[-1].log.steps


class TestStepsThem:
    @both_ways
    def test_every_second_batch(self, way):
        """With the ``optimizer_step`` of Lightning's documentation the fit stopped after a batch, as if passed by."""

        class EverySecond(LitAdamW):
            def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
                if batch_idx % 2:
                    optimizer.step(closure=optimizer_closure)
                else:
                    optimizer_closure()

        model, run = fitted(way, EverySecond, RULES, max_epochs=2)
        assert used(model, run.optimizers[0]) == [strengths(model, 0.5)] * EPOCH

    class Later(LitAdamW):
        """Changes to another optimizer in mid-run."""

        another = None

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            if batch_idx == 2:
                self.another = MyAdamW(self.parameters())
            (self.another or optimizer).step(optimizer_closure)

    class OneOfTwo(LitManual):
        """Has two optimizers, and steps another for the head."""

        def configure_optimizers(self):
            self.another = MyAdamW(self.head.parameters())
            return MyAdamW([*self.body.parameters(), *self.norm.parameters()]), MyAdamW(self.head.parameters())

        def training_step(self, batch, batch_idx):
            self.zero_grad()
            self.manual_backward(self.training_step_loss(batch))
            self.optimizers()[0].step()
            self.another.step()

    class ByHand(LitManual, LitAdamW):
        """Has an optimizer out of habit, and moves the weights itself."""

        def training_step(self, batch, batch_idx):
            self.zero_grad()
            self.manual_backward(self.training_step_loss(batch))
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.sub_(parameter.grad, alpha=0.01)

    class Alternating(LitAdamW):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            self.another = getattr(self, "another", None) or MyAdamW(self.parameters())
            (self.another if batch_idx % 2 else optimizer).step(optimizer_closure)

    @both_ways
    @pytest.mark.parametrize("theirs", [Later, OneOfTwo, ByHand, Alternating])
    def test_past_the_rules(self, way, theirs):
        """Steps of optimizers that the Trainer does not know, later than the first one, were made without rules."""
        model = with_rules(way, theirs, RULES)
        with pytest.raises(
            MisconfigurationException, match="are not in force: parameters of MyAdamW change, but not in"
        ):
            fit(model, way, RULES, max_epochs=2)

    @both_ways
    def test_past_the_rules_under_a_scaler(self, way):
        """A scaler skips steps, so a first one that was not seen proved nothing, and nobody looked again."""

        class Scaled(LitAdamW):
            another = None

            def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
                self.another = self.another or MyAdamW(self.parameters())
                precision = self.trainer.precision_plugin
                precision.optimizer_step(self.another, model=self, closure=optimizer_closure)

        model = with_rules(way, Scaled, RULES)
        scaling = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        with pytest.raises(
            MisconfigurationException, match="are not in force: parameters of MyAdamW change, but not in"
        ):
            fit(model, way, RULES, plugins=[scaling], max_epochs=2)

    @both_ways
    def test_past_the_rules_in_a_second_fit(self, way):
        """The optimizer had stepped in the fit before, which was taken for proof."""

        class Past(LitKept):
            goes_past = False

            def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
                (MyAdamW(self.parameters()) if self.goes_past else optimizer).step(optimizer_closure)

        model = with_rules(way, Past, RULES)
        fit(model, way, RULES)
        assert used(model, model.kept) == [strengths(model, 0.5)] * EPOCH
        model.goes_past = True
        with pytest.raises(
            MisconfigurationException, match="are not in force: parameters of MyAdamW change, but not in"
        ):
            fit(model, way, RULES)
        assert len(model.kept.log.steps) == EPOCH


class TestSteersThem:
    @both_ways
    @pytest.mark.parametrize("rules", [{}, {"*": 0.5}, RULES])
    def test_groups_by_their_name(self, way, rules):
        """A published model freezes the group called ``head`` by an lr of 0: what the rules cut off it went on."""

        class Freezes(LitBase):
            def training_step(self, batch, batch_idx):
                for group in self.trainer.optimizers[0].param_groups:
                    if group["name"] == "head":
                        group["lr"] = 0.0
                return super().training_step(batch, batch_idx)

            def configure_optimizers(self):
                body = [*self.body.parameters(), *self.norm.parameters()]
                return MyAdamW([{"name": "body", "params": body}, {"name": "head", "params": self.head.parameters()}])

        before = LitBase()
        model, _ = fitted(way, Freezes, rules)
        moved = [name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))]
        assert moved == ["body.weight", "body.bias", "norm.weight", "norm.bias"]

    def test_a_callback_with_an_attribute_of_any_name(self):
        """A callback of the user's with a ``scheduling``, as Lightning's for accumulation has, stopped the fit."""

        class Mine(L.Callback):
            scheduling = "cosine"

        model, run = fitted("mixin", LitAdamW, LINEAR, Mine())
        assert used_by_weights(model, run.optimizers[0]) == falling(EPOCH, EPOCH)


class TestAddsToThem:
    def test_a_new_head(self):
        """A model for one more task gets a head while it trains; the rules of today hold for it."""

        class Growing(LitOwn):
            decay_rules = {"*.bias": 0.0, "head*.weight": 0.3, "*": 0.5}

            def training_step(self, batch, batch_idx):
                features = self.norm(self.body(batch[0])).relu()
                heads = [self.head, self.head2] if self.current_epoch else [self.head]
                return sum(nn.functional.cross_entropy(head(features), batch[1]) for head in heads)

            def on_train_epoch_start(self):
                if self.current_epoch == 1:
                    self.head2 = nn.Linear(16, 10)
                    self.trainer.optimizers[0].add_param_group({"params": list(self.head2.parameters())})

        model = Growing()
        run = fit(model, "own", None, max_epochs=2)
        expected = {**strengths(model, 0.5), "head.weight": 0.3, "head2.weight": 0.3}
        steps = used(model, run.optimizers[0])
        assert steps[EPOCH:] == [expected] * EPOCH
        assert set(expected) - set(steps[0]) == {"head2.weight", "head2.bias"}

    @both_ways
    def test_what_is_thawed_by_the_public_api(self, way):
        """``self.optimizers().add_param_group``, as tutorials have it, failed under rules."""

        class Thawing(LitBase):
            def __init__(self):
                super().__init__()
                self.body.requires_grad_(False)

            def on_train_epoch_start(self):
                if self.current_epoch == 1:
                    self.body.requires_grad_(True)
                    self.optimizers().add_param_group({"params": list(self.body.parameters()), "lr": 1e-3})

            def configure_optimizers(self):
                return MyAdamW([p for p in self.parameters() if p.requires_grad])

        model, run = fitted(way, Thawing, RULES, max_epochs=2)
        assert used(model, run.optimizers[0])[EPOCH:] == [strengths(model, 0.5)] * EPOCH

    def test_with_lengths_that_the_user_gave(self):
        """In manual optimization, the total steps that the user gave were forgotten when a group was added."""

        class Manual(LitManual, LitOwn):
            decay_rules = LINEAR

            def __init__(self):
                super().__init__()
                self.body.requires_grad_(False)

            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                schedule_weight_decay(optimizer, total_steps=8)
                return optimizer

            def on_train_batch_start(self, batch, batch_idx):
                if batch_idx == 2:
                    self.body.requires_grad_(True)
                    self.optimizers().optimizer.add_param_group({"params": list(self.body.parameters())})

        model = Manual()
        run = fit(model, "own", None)
        steps = used(model, run.optimizers[0])
        assert [step["head.weight"] for step in steps] == [1.0, 0.875, 0.75, 0.625]
        assert [step.get("body.weight") for step in steps] == [None, None, 0.75, 0.625]

    @both_ways
    def test_to_one_that_had_no_parameters_yet(self, way):
        """A second optimizer starts empty and gets its first parameters while training."""

        class Empty(LitManual):
            def configure_optimizers(self):
                return MyAdamW(self.parameters()), MyAdamW([{"params": []}])

            def on_train_epoch_start(self):
                if self.current_epoch == 1:
                    self.extra = nn.Linear(16, 10)
                    self.optimizers()[1].add_param_group({"params": list(self.extra.parameters())})

        model, run = fitted(way, Empty, RULES, max_epochs=2)
        assert used(model, run.optimizers[1])[-1] == {"extra.weight": 0.5, "extra.bias": 0.0}

    @both_ways
    @pytest.mark.filterwarnings("ignore:.*in an optimizer but not of the model.*")
    def test_before_the_model_has_them(self, way):
        """The optimizer holds a layer from the start, which becomes the model's in a later epoch."""

        class Late(LitBase):
            def configure_optimizers(self):
                self.hidden = [nn.Linear(16, 10)]
                return MyAdamW([*self.parameters(), *self.hidden[0].parameters()])

            def on_train_epoch_start(self):
                if self.current_epoch == 1:
                    self.extra = self.hidden[0]

        model, run = fitted(way, Late, RULES, max_epochs=2)
        steps = used(model, run.optimizers[0])
        assert (steps[0]["extra.weight"], steps[0]["extra.bias"]) == (OWN, OWN)
        assert steps[-1] == strengths(model, 0.5)

    @both_ways
    def test_under_a_name_that_changes(self, way):
        """A layer moves from ``fresh`` to ``done`` when it has been trained enough: the rules of its new name hold."""

        class Moves(LitAdamW):
            def __init__(self):
                super().__init__()
                self.fresh = nn.Linear(16, 10)

            def on_train_epoch_start(self):
                if self.current_epoch == 1:
                    self.done = self.fresh
                    del self.fresh

        model, run = fitted(way, Moves, {"fresh.*": 0.0, "*": 0.5}, max_epochs=2)
        assert [step["done.weight"] for step in used(model, run.optimizers[0])] == [0.0] * EPOCH + [0.5] * EPOCH
