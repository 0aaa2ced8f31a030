"""Any existing model: its own optimizers and schedulers as they are, with the rules in force in their steps."""

from __future__ import annotations

import copy
import pickle
import sys
import types
import warnings

import lightning as L
import pytest
import torch
import yaml
from helpers import RULES, LitBase, LitRules, LitWithBackbone, digits_loader, float64_norm, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_regdecay import (
    DecayRule,
    WeightDecayMixin,
    WeightDecayMonitor,
    WeightDecayRules,
    apply_decay_rules,
    groups_in_force,
    schedule_weight_decay,
)
from lightning_regdecay.retrofit import _callback_of_both_roots

schedulers = torch.optim.lr_scheduler
SAME = {"*.bias": 0.1, "*norm*": 0.1, "*": 0.1}  # what SGD has below, in three groups
LINEAR = {"schedule": "linear", "start": 1.0, "end": 0.0}


def sgd(params, **options):
    return torch.optim.SGD(params, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, **options})


def two_parts(model):
    """Param groups as users write them."""
    return [
        {"params": model.body.parameters()},
        {"params": [*model.norm.parameters(), *model.head.parameters()], "lr": 0.02},
    ]


def with_mixin(theirs, rules):
    return type("Ours", (WeightDecayMixin, theirs), {"decay_rules": rules})


def fit_with(way, theirs, rules, *callbacks, **options):
    """A fit of their model, with the rules by the mixin, by the callback, or without."""
    model = with_mixin(theirs, rules)() if way == "mixin" else theirs()
    ours = [WeightDecayRules(rules)] if way == "callback" else []
    run = trainer(**{"callbacks": [*callbacks, *ours], **options})
    run.fit(model)
    return model, run


WAYS = ("mixin", "callback")
both_ways = pytest.mark.parametrize("way", WAYS)


def in_force(optimizer):
    return {group["name"]: group["weight_decay"] for group in groups_in_force(optimizer)}


def by_name(model, optimizers, key="weight_decay"):
    """Parameter name to what the step has for it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: g[key] for o in optimizers for g in groups_in_force(o) for p in g["params"] if p in names}


def assert_same_weights(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        assert torch.equal(p, q), name


class Lrs(L.Callback):
    """The lr of every parameter at every step, and λ."""

    def __init__(self):
        self.lrs, self.strengths = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.lrs.append(by_name(pl_module, trainer.optimizers, "lr"))

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.strengths.append(by_name(pl_module, trainer.optimizers))


def assert_parity(theirs, **options):
    """A class trains as without rules, with the mixin and with the callback, and its groups are its own."""
    log = Lrs()
    expected, run = fit_with("none", theirs, None, log, **options)
    assert log.lrs, "no optimizer step was taken"
    count = [len(optimizer.param_groups) for optimizer in run.optimizers]
    for way in WAYS:
        found = Lrs()
        model, run = fit_with(way, theirs, SAME, found, **options)
        assert found.lrs == log.lrs
        assert_same_weights(model, expected)
        assert [len(optimizer.param_groups) for optimizer in run.optimizers] == count
        assert not any("decay_params" in group for optimizer in run.optimizers for group in optimizer.param_groups)


class TestReturnShapes:
    SHAPES = {
        "one": lambda o, s: o,
        "list": lambda o, s: [o],
        "two lists": lambda o, s: ([o], [s]),
        "two lists with a dictionary": lambda o, s: [[o], [{"scheduler": s, "interval": "step"}]],
        "dictionary": lambda o, s: {"optimizer": o, "lr_scheduler": s},
        "dictionary of dictionaries": lambda o, s: {
            "optimizer": o,
            "lr_scheduler": {"scheduler": s, "interval": "step"},
        },
        "tuple of a dictionary": lambda o, s: ({"optimizer": o, "lr_scheduler": s},),
    }

    @pytest.mark.parametrize("shape", SHAPES)
    def test_train_as_without_rules_of_other_strengths(self, shape):
        class Theirs(LitBase):
            def configure_optimizers(self):
                optimizer = sgd(two_parts(self))
                return TestReturnShapes.SHAPES[shape](optimizer, schedulers.ExponentialLR(optimizer, gamma=0.5))

        assert_parity(Theirs, max_epochs=2)

    @pytest.mark.parametrize("shape", ["tuple", "tuple of dictionaries", "two lists"])
    def test_several_optimizers(self, shape):
        class Theirs(LitBase):
            automatic_optimization = False

            def configure_optimizers(self):
                body = sgd(self.body.parameters())
                rest = torch.optim.AdamW([*self.norm.parameters(), *self.head.parameters()], lr=0.01, weight_decay=0.1)
                a, b = schedulers.StepLR(body, 1, gamma=0.5), schedulers.CosineAnnealingLR(rest, 9)
                return {
                    "tuple": (body, rest),
                    "tuple of dictionaries": (
                        {"optimizer": body, "lr_scheduler": a},
                        {"optimizer": rest, "lr_scheduler": {"scheduler": b}},
                    ),
                    "two lists": ([body, rest], [a, b]),
                }[shape]

            def training_step(self, batch, batch_idx):
                loss = self.training_step_loss(batch)
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()

            def on_train_epoch_end(self):
                for scheduler in self.lr_schedulers() or []:
                    scheduler.step()

        assert_parity(Theirs, max_epochs=2)


class TestInForce:
    """The rules are in force, or the fit stops."""

    @both_ways
    def test_bit_for_bit_as_groups_by_hand(self, way):
        class Theirs(LitBase):
            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)

        class ByHand(LitBase):
            def configure_optimizers(self):
                names = dict(self.named_parameters())
                groups = [[p for n, p in names.items() if n.endswith("bias") == biased] for biased in (False, True)]
                return torch.optim.AdamW(
                    [{"params": groups[0], "weight_decay": 0.3}, {"params": groups[1], "weight_decay": 0.0}], lr=0.01
                )

        rules = {"*.bias": 0.0, "*": 0.3}
        model, run = fit_with(way, Theirs, rules, max_epochs=2, gradient_clip_val=0.1, accumulate_grad_batches=2)
        by_hand = ByHand()
        trainer(max_epochs=2, gradient_clip_val=0.1, accumulate_grad_batches=2).fit(by_hand)
        for (name, p), q in zip(model.named_parameters(), by_hand.parameters()):
            # Clipping adds up the norms of all gradients in the order of the groups.
            assert torch.allclose(p, q, rtol=1e-5, atol=1e-7), name
        assert in_force(run.optimizers[0]) == {"rest": 0.3, "bias": 0.0}
        assert run.optimizers[0].param_groups[0]["weight_decay"] == 0.1

    def test_in_what_a_class_configures_itself(self):
        class Own(WeightDecayMixin, LitBase):
            decay_rules = RULES

            def configure_optimizers(self):
                return [sgd(self.body.parameters()), sgd([*self.norm.parameters(), *self.head.parameters()])][:1]

        (optimizer,) = Own().configure_optimizers()
        assert in_force(optimizer) == {"rest": 0.05, "bias": 0.0}

    def test_in_what_a_class_makes_of_supers(self):
        class Lookahead(torch.optim.Optimizer):
            def __init__(self, inner):
                super().__init__(inner.param_groups, inner.defaults)
                self.inner, self.param_groups = inner, inner.param_groups

            def step(self, closure=None):
                return self.inner.step(closure)

        class Own(LitRules):
            def configure_optimizers(self):
                return Lookahead(super().configure_optimizers())

        run = trainer()
        run.fit(Own())
        assert in_force(run.optimizers[0]) == {"bias": 0.0, "norm": 0.01, "head": 1e-3, "rest": 0.05}

    @pytest.mark.parametrize("signature", ["(self, params)", "(self)", "(self, *, lr)"])
    @both_ways
    def test_builders_of_a_base_are_the_bases(self, signature, way):
        class Theirs(LitBase):
            def build_lr_scheduler(self, optimizer, gamma=0.5):
                return schedulers.ExponentialLR(optimizer, gamma)

            def configure_optimizers(self):
                optimizer = {
                    "(self, params)": lambda: self.build_optimizer(self.parameters()),
                    "(self)": lambda: self.build_optimizer(),
                    "(self, *, lr)": lambda: self.build_optimizer(lr=0.1),
                }[signature]()
                return [optimizer], [self.build_lr_scheduler(optimizer)]

        builders = {
            "(self, params)": lambda self, params: sgd(params),
            "(self)": lambda self: sgd(self.parameters()),
            "(self, *, lr)": lambda self, *, lr: sgd(self.parameters(), lr=lr),
        }
        theirs = type("Theirs", (Theirs,), {"build_optimizer": builders[signature]})
        _, run = fit_with(way, theirs, RULES)
        assert type(run.optimizers[0]) is torch.optim.SGD
        assert run.optimizers[0].defaults["momentum"] == 0.9
        assert in_force(run.optimizers[0])["head"] == 1e-3

    def test_a_builder_of_a_base_that_cannot_take_the_groups_says_so(self):
        class Theirs(LitBase):
            def build_optimizer(self):
                return sgd(self.parameters())

        with pytest.raises(TypeError, match="build_optimizer of Ours cannot be called with param_groups alone"):
            with_mixin(Theirs, RULES)().configure_optimizers()

    def test_attributes_of_a_base_are_not_hidden(self):
        class Theirs(LitBase):
            def __init__(self):
                super().__init__()
                self._lr, self._groups, self._rules = 0.3, "theirs", "theirs"

            def _loggable(self):
                return "theirs"

            def configure_optimizers(self):
                assert (self._groups, self._rules, self._loggable()) == ("theirs", "theirs", "theirs")
                return sgd(self.parameters(), lr=self._lr)

        _, run = fit_with("mixin", Theirs, RULES)
        assert run.optimizers[0].param_groups[0]["lr"] == 0.3

    @both_ways
    def test_a_model_without_an_optimizer_stops(self, way):
        class Theirs(LitBase):
            automatic_optimization = False

            def configure_optimizers(self):
                return None

            def training_step(self, batch, batch_idx):
                pass

        match = "are in force nowhere: it has no optimizer; give it an optimizer over its parameters"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*returned `None`.*")
            with pytest.raises(ValueError, match=match):
                fit_with(way, Theirs, RULES)

    @both_ways
    def test_an_optimizer_that_never_steps_stops(self, way):
        class Bypass(torch.optim.SGD):
            def descend(self):
                torch.optim.SGD.step.__wrapped__(self)

        class Theirs(LitBase):
            def configure_optimizers(self):
                return Bypass(self.parameters(), lr=0.1)

            def optimizer_step(self, epoch, batch_idx, optimizer, closure):
                closure()
                optimizer.optimizer.descend() if hasattr(optimizer, "optimizer") else optimizer.descend()
                self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.increment_ready()
                progress = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
                progress.optimizer.step.increment_completed()

        torch.optim.SGD([torch.ones(1)])
        with pytest.raises(
            MisconfigurationException, match="are not in force: parameters of Bypass change, but not in its step"
        ):
            fit_with(way, Theirs, RULES)

    @both_ways
    def test_an_optimizer_that_takes_the_place_of_another(self, way):
        class Theirs(LitBase):
            def configure_optimizers(self):
                return sgd(self.parameters())

            def on_train_epoch_start(self):
                if self.current_epoch == 1:
                    self.trainer.strategy.setup_optimizers(self.trainer)

        rules = {"*.bias": 0.0, "*": {**LINEAR, "epochs": 2}}
        log = Lrs()
        _, _run = fit_with(way, Theirs, rules, log, max_epochs=2)
        assert [s["body.weight"] for s in log.strengths] == [1 - i / 8 for i in range(8)]

    @both_ways
    def test_options_in_their_optimizer_are_an_error(self, way):
        class Theirs(LitBase):
            def configure_optimizers(self):
                return sgd(self.parameters())

        rules = {"*": {"weight_decay": 0.1, "options": {"lr": 0.5}}}
        with pytest.raises(ValueError, match=r"has the options 'lr'.*build_optimizer of WeightDecayMixin"):
            fit_with(way, Theirs, rules)

    def test_other_rules_of_a_nested_module_are_not_asked(self):
        class Outer(WeightDecayMixin, LitBase):
            decay_rules = {"*": 0.5}

            def __init__(self):
                super().__init__()
                self.inner = LitRules()

        run = trainer()
        run.fit(Outer())
        assert in_force(run.optimizers[0]) == {"rest": 0.5}

    def test_but_both_in_one_optimizer_are_an_error(self):
        class Outer(WeightDecayMixin, LitBase):
            decay_rules = {"*": 0.5}

            def __init__(self):
                super().__init__()
                self.inner = LitRules()

            def configure_optimizers(self):
                return self.inner.configure_optimizers()

        with pytest.raises(ValueError, match="both LitRules and Outer have decay rules for"):
            Outer().configure_optimizers()

    def test_knows_weight_decay_where_a_group_holds_one(self):
        class Muon(torch.optim.Optimizer):
            """As the reference Muon with auxiliary Adam: no defaults, all in the groups."""

            def __init__(self, groups):
                for group in groups:
                    group.setdefault("lr", 0.01)
                    group.setdefault("weight_decay", 0.0)
                super().__init__(groups, {})

            @torch.no_grad()
            def step(self, closure=None):
                loss = None if closure is None else torch.enable_grad()(closure)()
                for group in self.param_groups:
                    for p in group["params"]:
                        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * p.grad)
                return loss

        class Theirs(LitBase):
            def configure_optimizers(self):
                return Muon([{"params": list(self.parameters()), "use_muon": False}])

        class Rprop(LitBase):
            def configure_optimizers(self):
                return torch.optim.Rprop(self.parameters())

        class Own(LitRules):
            decay_rules = {"*.bias": {"weight_decay": 0.0, "options": {"lr": 0.5}}, "*": 0.1}

            def build_optimizer(self, param_groups):
                return Muon(param_groups)

        _, run = fit_with("mixin", Theirs, RULES)
        assert in_force(run.optimizers[0])["head"] == 1e-3
        assert in_force(Own().configure_optimizers()) == {"bias": 0.0, "rest": 0.1}
        with pytest.raises(ValueError, match="Rprop knows no weight decay"):
            with_mixin(
                type("T", (LitBase,), {"configure_optimizers": lambda s: torch.optim.Rprop(s.parameters())}), RULES
            )().configure_optimizers()


class TestStrays:
    """Parameters of the model that are in none of its optimizers."""

    class Fit(LitBase):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.inner = torch.optim.SGD(self.body.parameters(), lr=0.1)

        def training_step(self, batch, batch_idx):
            self.inner.zero_grad()
            self.manual_backward(self.training_step_loss(batch))
            self.inner.step()
            self.optimizers().step()

        def configure_optimizers(self):
            return torch.optim.SGD([*self.norm.parameters(), *self.head.parameters()], lr=0.1)

    @both_ways
    def test_an_optimizer_inside_that_nobody_returns(self, way):
        with pytest.raises(MisconfigurationException, match=r"are not in force for 'body\.weight': it is trained, but"):
            fit_with(way, self.Fit, {"*.bias": 0.0, "*": 0.3})

    def test_the_advice_works(self):
        model, rules = self.Fit(), {"*.bias": 0.0, "*": 0.3}
        apply_decay_rules(model.inner, model, rules)
        trainer(callbacks=[WeightDecayRules(rules)]).fit(model)

    def test_a_moving_average_is_not_trained(self):
        class Averaged(LitBase):
            def __init__(self):
                super().__init__()
                self.teacher = copy.deepcopy(self.body)

            def on_train_batch_start(self, batch, batch_idx):
                with torch.no_grad():
                    for slow, fast in zip(self.teacher.parameters(), self.body.parameters()):
                        slow.lerp_(fast, 0.1)

            def configure_optimizers(self):
                return torch.optim.SGD(
                    [*self.body.parameters(), *self.norm.parameters(), *self.head.parameters()], lr=0.1
                )

        with pytest.warns(UserWarning, match=r"'teacher.weight', 'teacher.bias' are trainable, but in no optimizer"):
            trainer(max_epochs=2, callbacks=[WeightDecayRules({"*.bias": 0.0, "*": 0.3})]).fit(Averaged())

    def test_steps_that_are_skipped_while_weights_are_clipped_between_batches(self):
        class Skipping(LitBase):
            def configure_optimizers(self):
                return sgd(self.parameters())

            def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
                if batch_idx % 2:
                    optimizer_closure()
                else:
                    optimizer.step(optimizer_closure)

            def on_train_batch_end(self, outputs, batch, batch_idx):
                with torch.no_grad():
                    for parameter in self.parameters():
                        parameter.clamp_(-1, 1)

        _, run = fit_with("callback", Skipping, {"*.bias": 0.0, "*": 0.3}, max_epochs=4)
        assert run.global_step == 16


class TestOnce:
    """Fitting often, and what is left when a fit has ended or failed."""

    class Kept(LitBase):
        """Keeps its optimizer, so that a second fit goes on with its state."""

        optimizer_of_all_fits = None

        def configure_optimizers(self):
            if self.optimizer_of_all_fits is None:
                object.__setattr__(self, "optimizer_of_all_fits", sgd(self.parameters()))
            return self.optimizer_of_all_fits

    @staticmethod
    def what_hangs(optimizer):
        return {
            name: len(value) if "hooks" in name else name in ("step", "__getstate__") or None
            for name, value in vars(optimizer).items()
            if "hooks" in name or name in ("step", "__getstate__")
        }

    @both_ways
    def test_ten_fits_of_one_optimizer(self, way):
        rules = {"*.bias": 0.0, "*": {"decay_mult": 0.5}}
        model = with_mixin(self.Kept, rules)() if way == "mixin" else self.Kept()
        held = []
        for _ in range(5):
            look = []

            class Look(L.Callback):
                def on_train_batch_end(self, trainer, *args, look=look):
                    look.append(TestOnce.what_hangs(trainer.optimizers[0]))

            run = trainer(callbacks=[Look(), *([WeightDecayRules(rules)] if way == "callback" else [])])
            run.fit(model)
            held.append(look[-1])
            assert in_force(run.optimizers[0]) == {"rest": 0.05, "bias": 0.0}
            assert set(self.what_hangs(run.optimizers[0]).values()) == {0}
        assert held == [held[0]] * 5

    def test_without_rules_afterwards_it_is_theirs_again(self):
        model = self.Kept()
        trainer(callbacks=[WeightDecayRules(RULES)]).fit(model)
        run = trainer()
        run.fit(model)
        assert in_force(run.optimizers[0]) == {"0": 0.1}
        reference = self.Kept()
        trainer(max_epochs=2).fit(reference)
        assert model.optimizer_of_all_fits.param_groups[0]["weight_decay"] == 0.1

    POINTS = (
        "setup",
        "configure_optimizers",
        "on_fit_start",
        "on_train_start",
        "on_train_batch_start",
        "training_step",
        "backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
        "on_validation_start",
        "on_train_end",
    )

    @pytest.mark.parametrize("point", POINTS)
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_a_fit_that_fails(self, point, error):
        rules = {"*.bias": 0.0, "*": {"decay_mult": 0.5}}
        for way in WAYS:

            class Theirs(self.Kept):
                failing = point

                def fail(self, where):
                    if where == self.failing:
                        raise error("out of memory")

                def training_step(self, batch, batch_idx):
                    self.fail("training_step")
                    return super().training_step(batch, batch_idx)

            def failing_hook(name):
                def hook(self, *args, **kwargs):
                    self.fail(name)
                    return getattr(super(Theirs, self), name)(*args, **kwargs)

                return hook

            for name in self.POINTS:
                if name != "training_step":
                    setattr(Theirs, name, failing_hook(name))
            model = with_mixin(Theirs, rules)() if way == "mixin" else Theirs()
            callbacks = [WeightDecayRules(rules)] if way == "callback" else []
            before = set(vars(model))
            run = trainer(callbacks=callbacks)
            with pytest.raises((error, SystemExit)):
                run.fit(model, val_dataloaders=digits_loader(64))
            optimizer = model.optimizer_of_all_fits
            if optimizer is not None:
                assert set(self.what_hangs(optimizer).values()) <= {0}
                assert len(optimizer.param_groups) == 1
            assert "configure_optimizers" not in set(vars(model)) - before
            assert all(
                isinstance(c, WeightDecayRules) or not type(c).__name__.startswith("_Rules") for c in run.callbacks
            )

            model.failing = ""
            run = trainer(callbacks=callbacks)
            run.fit(model)
            assert in_force(run.optimizers[0]) == {"rest": 0.05, "bias": 0.0}

    def test_a_corrected_typo_is_forgotten(self):
        model = self.Kept()
        with pytest.raises(ValueError, match=r"rule 1 '\*\.bais' takes nothing"):
            trainer(callbacks=[WeightDecayRules({"*.bais": 0.0, "*": 0.3})]).fit(model)
        run = trainer(callbacks=[WeightDecayRules({"*.bias": 0.0, "*": 0.3})])
        run.fit(model)
        assert in_force(run.optimizers[0]) == {"rest": 0.3, "bias": 0.0}

    def test_two_callbacks_and_mixin_and_callback(self):
        with pytest.raises(MisconfigurationException, match="put all rules into one place"):
            trainer(callbacks=[WeightDecayRules(RULES), WeightDecayRules(SAME)]).fit(self.Kept())
        with pytest.raises(
            MisconfigurationException, match="WeightDecayRules would bring other decay rules to LitRules"
        ):
            trainer(callbacks=[WeightDecayRules(RULES)]).fit(LitRules())

    def test_a_second_fit_with_other_rules(self):
        model = self.Kept()
        for strength in (0.1, 0.2):
            run = trainer(callbacks=[WeightDecayRules({"*": strength})])
            run.fit(model)
            assert in_force(run.optimizers[0]) == {"rest": strength}

    def test_copies_during_and_after_a_fit(self):
        copies = {}

        class Theirs(self.Kept):
            def training_step(self, batch, batch_idx):
                if batch_idx == 2:
                    copies["module"] = copy.deepcopy(self)
                    copies["optimizer"] = copy.deepcopy(self.optimizer_of_all_fits)
                    copies["callback"] = pickle.loads(pickle.dumps(self.trainer.callbacks[0]))
                return super().training_step(batch, batch_idx)

        callback = WeightDecayRules(RULES)
        model = Theirs()
        trainer(callbacks=[callback]).fit(model)
        with pytest.raises(RuntimeError, match="a copy of an optimizer with decay rules in force"):
            copies["optimizer"].step()
        assert copies["callback"].decay_rules == RULES
        copies["module"].optimizer_of_all_fits = None
        trainer(callbacks=[copies["callback"]]).fit(Theirs())
        for again in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
            assert again.decay_rules == RULES
        copy.deepcopy(model).optimizer_of_all_fits.step()

    def test_the_model_is_left_as_it_was(self):
        model = LitBase()
        model.configure_optimizers = chosen = lambda: sgd(model.parameters())
        plain = LitBase()
        plain.configure_optimizers = lambda: sgd(plain.parameters())
        trainer().fit(plain)
        trainer(callbacks=[WeightDecayRules(RULES)]).fit(model)
        assert model.configure_optimizers is chosen
        assert set(vars(model)) == set(vars(plain))

    def test_torch_and_lightning_are_left_as_they_were(self):
        kinds = (torch.optim.Optimizer, torch.optim.SGD, schedulers.LRScheduler, L.LightningModule, L.Trainer)
        sgd([torch.ones(1)])
        before = [dict(vars(kind)) for kind in kinds]
        for way in WAYS:
            fit_with(way, self.Kept, RULES)
        assert [dict(vars(kind)) for kind in kinds] == before


class TestCheckpoints:
    class Theirs(LitBase):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(two_parts(self), lr=0.01, weight_decay=0.1)
            return {"optimizer": optimizer, "lr_scheduler": schedulers.StepLR(optimizer, 1, gamma=0.5)}

    def fit(self, path, way, rules, epochs, ckpt_path=None, theirs=None):
        checkpoint = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
        theirs = theirs or self.Theirs
        model = with_mixin(theirs, rules)() if way == "mixin" else theirs()
        ours = [WeightDecayRules(rules)] if way == "callback" else []
        run = trainer(max_epochs=epochs, callbacks=[*ours, checkpoint], enable_checkpointing=True)
        run.fit(model, ckpt_path=ckpt_path)
        return model, run

    @both_ways
    def test_are_those_of_the_run_without_rules(self, way, tmp_path):
        self.fit(tmp_path / "plain", "none", None, 1)
        self.fit(tmp_path / "ours", way, SAME, 1)
        plain, ours = (torch.load(tmp_path / n / "epoch=0.ckpt", weights_only=True) for n in ("plain", "ours"))
        for one, other in zip(plain["optimizer_states"], ours["optimizer_states"]):
            assert one["param_groups"] == other["param_groups"]
            assert one["state"].keys() == other["state"].keys()
            for number, state in one["state"].items():
                assert all(torch.equal(value, other["state"][number][key]) for key, value in state.items())
        assert plain["lr_schedulers"] == ours["lr_schedulers"]

    @both_ways
    def test_load_with_and_without_rules(self, way, tmp_path):
        whole, _ = self.fit(tmp_path / "whole", "none", None, 3)
        for first, second in (("none", way), (way, "none"), (way, way)):
            path = tmp_path / f"{first} {second}"
            self.fit(path, first, SAME, 1)
            resumed, _ = self.fit(path / "2", second, SAME, 3, ckpt_path=path / "epoch=0.ckpt")
            assert_same_weights(resumed, whole)

    @both_ways
    def test_other_rules_win(self, way, tmp_path):
        self.fit(tmp_path, way, {"*.bias": 0.0, "*": 0.1}, 1)
        _, run = self.fit(tmp_path / "2", way, {"head.*": 0.5, "*": 0.2}, 2, ckpt_path=tmp_path / "epoch=0.ckpt")
        assert set(in_force(run.optimizers[0]).values()) == {0.5, 0.2}

    @both_ways
    def test_steps_of_schedules_go_along(self, way, tmp_path):
        class Theirs(LitBase):
            def configure_optimizers(self):
                return sgd(self.parameters())

        rules = {"*.bias": 0.0, "*": {**LINEAR, "epochs": 3}}
        whole, _ = self.fit(tmp_path / "whole", way, rules, 3, theirs=Theirs)
        self.fit(tmp_path, way, rules, 1, theirs=Theirs)
        resumed, run = self.fit(tmp_path / "2", way, rules, 3, tmp_path / "epoch=0.ckpt", theirs=Theirs)
        assert_same_weights(resumed, whole)
        assert run.optimizers[0].param_groups[0]["decay_step"] == 12

    @both_ways
    def test_a_schedule_that_is_added_counts_the_steps_of_the_run(self, way, tmp_path):
        class Theirs(LitBase):
            def configure_optimizers(self):
                return sgd(self.parameters())

        self.fit(tmp_path, "none", None, 1, theirs=Theirs)
        rules = {"*": {**LINEAR, "epochs": 3}}
        _, run = self.fit(tmp_path / "2", way, rules, 2, tmp_path / "epoch=0.ckpt", theirs=Theirs)
        assert in_force(run.optimizers[0]) == {"rest": pytest.approx(1 - 7 / 12)}

    def test_saved_after_the_fit_they_have_all_as_well(self, tmp_path):
        rules = {"*": {**LINEAR, "epochs": 3}}
        _, run = self.fit(tmp_path, "mixin", rules, 1)
        run.save_checkpoint(tmp_path / "after.ckpt")
        state = torch.load(tmp_path / "after.ckpt", weights_only=True)["optimizer_states"][0]
        assert [group["decay_step"] for group in state["param_groups"]] == [4, 4]


class LitBackbone(LitWithBackbone):
    """Its optimizer holds what is trainable at first, as Lightning's finetuning callbacks want it."""

    def configure_optimizers(self):
        trainable = [p for p in self.parameters() if p.requires_grad]
        return sgd(trainable, weight_decay=0.3)


class LitOwnBackbone(WeightDecayMixin, LitBackbone):
    """The same with an optimizer over the decay groups."""

    decay_rules = {"*.bias": 0.0, "backbone.*": 0.1, "*": 0.05}

    def build_optimizer(self, param_groups):
        return sgd(param_groups)


class TestGrowing:
    RULES = {"*.bias": 0.0, "backbone.*": 0.1, "*": 0.05}

    def finetune(self, epochs, way, rules=RULES, path=None, ckpt_path=None, theirs=LitBackbone):
        unfreezing = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.5, verbose=False)
        log = Lrs()
        saving = [ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)] if path else []
        options = {"max_epochs": epochs, "enable_checkpointing": bool(path)}
        model = with_mixin(theirs, rules)() if way == "mixin" else theirs()
        ours = [WeightDecayRules(rules)] if way == "callback" else []
        run = trainer(callbacks=[unfreezing, log, *saving, *ours], **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*takes frozen parameters only.*")
            run.fit(model, ckpt_path=ckpt_path)
        return model, run, log

    def expected(self, model):
        return {
            name: 0.0 if name.endswith("bias") else 0.1 if name.startswith("backbone") else 0.05
            for name, _ in model.named_parameters()
        }

    @both_ways
    def test_what_a_finetuning_callback_adds(self, way):
        _, _, without = self.finetune(4, "none")
        model, run, log = self.finetune(4, way)
        assert log.lrs == without.lrs
        assert by_name(model, run.optimizers) == self.expected(model)
        assert len(run.optimizers[0].param_groups) == 2

    @both_ways
    @pytest.mark.parametrize("stop", [1, 3])
    def test_resumed_with_other_rules(self, way, stop, tmp_path):
        self.finetune(stop, "none", path=tmp_path)
        ckpt_path = tmp_path / f"epoch={stop - 1}.ckpt"
        model, run, _ = self.finetune(4, way, path=tmp_path / "2", ckpt_path=ckpt_path)
        assert by_name(model, run.optimizers) == self.expected(model)

    def test_own_optimizers_take_it_too_and_resume(self, tmp_path):
        model, run, _ = self.finetune(3, "none", theirs=LitOwnBackbone, path=tmp_path)
        assert by_name(model, run.optimizers) == self.expected(model)

        class Other(LitOwnBackbone):
            decay_rules = {"*.bias": 0.0, "backbone.*": 0.7, "*": 0.05}

        model, run, _ = self.finetune(4, "none", theirs=Other, path=tmp_path / "2", ckpt_path=tmp_path / "epoch=2.ckpt")
        assert by_name(model, run.optimizers)["backbone.0.weight"] == 0.7

    @pytest.mark.parametrize("theirs", [LitBackbone, LitOwnBackbone])
    @pytest.mark.parametrize("how", ["optimizer", "self.optimizers()"])
    @pytest.mark.parametrize("key", ["params", "name"])
    def test_what_a_model_adds_itself(self, theirs, how, key):
        class Thawing(theirs):
            def __init__(self):
                super().__init__()
                self.backbone.requires_grad_(False)

            def on_train_epoch_start(self):
                if self.current_epoch == 1:
                    self.backbone.requires_grad_(True)
                    optimizer = self.trainer.optimizers[0] if how == "optimizer" else self.optimizers()
                    name = {"name": "late"} if key == "name" else {}
                    optimizer.add_param_group({"params": list(self.backbone.parameters()), "lr": 0.01, **name})

        way = "none" if theirs is LitOwnBackbone else "mixin"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*takes frozen parameters only.*")
            model, run = fit_with(way, Thawing, self.RULES, max_epochs=3)
        assert by_name(model, run.optimizers) == self.expected(model)
        assert by_name(model, run.optimizers, "lr")["backbone.0.weight"] == 0.01

    def test_a_finetuning_callback_of_ones_own(self):
        class Thaw(BaseFinetuning):
            def freeze_before_training(self, pl_module):
                self.freeze(pl_module.backbone)

            def finetune_function(self, pl_module, epoch, optimizer):
                if epoch == 1:
                    self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.01)

        run = trainer(max_epochs=2, callbacks=[Thaw()])
        model = LitOwnBackbone()
        run.fit(model)
        assert by_name(model, run.optimizers) == self.expected(model)
        assert [group["lr"] for group in run.optimizers[0].param_groups][-1] == 0.01

    @both_ways
    def test_a_head_that_is_added_while_training(self, way):
        class Growing(LitBackbone):
            def on_train_epoch_start(self):
                if self.current_epoch == 1:
                    self.head2 = nn.Linear(16, 10)
                    self.trainer.optimizers[0].add_param_group({"params": list(self.head2.parameters())})

        model, run = fit_with(way, Growing, self.RULES, max_epochs=3)
        assert by_name(model, run.optimizers) == self.expected(model)

    @both_ways
    def test_parameters_that_nobody_trains_are_named(self, way):
        class Forgetful(LitBackbone):
            def on_train_epoch_start(self):
                if self.current_epoch == 1:
                    self.head2 = nn.Linear(16, 10)

        with pytest.warns(UserWarning, match=r"'head2\.weight', 'head2\.bias' are trainable, but in no opt") as caught:
            fit_with(way, Forgetful, self.RULES, max_epochs=3)
        assert sum("in no optimizer" in str(warning.message) for warning in caught) == 1


class TestCallbacksOfLightning:
    class Theirs(LitBase):
        def __init__(self, lr=1e-3, batch_size=64):
            super().__init__()
            self.save_hyperparameters()
            self.batch_size = batch_size
            self.norm = nn.BatchNorm1d(16)

        def train_dataloader(self):
            return digits_loader(256, self.batch_size)

        def val_dataloader(self):
            return digits_loader(64, self.batch_size)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.1)

    @both_ways
    @pytest.mark.parametrize("lrs", [0.05, [0.05, 0.01]])
    def test_weight_averaging(self, way, lrs):
        class Theirs(self.Theirs):
            def configure_optimizers(self):
                return sgd(two_parts(self) if isinstance(lrs, list) else self.parameters())

        def average():
            return StochasticWeightAveraging(swa_lrs=lrs, swa_epoch_start=1, annealing_epochs=2)

        expected, _ = fit_with("none", Theirs, None, average(), max_epochs=3)
        model, _ = fit_with(way, Theirs, SAME, average(), max_epochs=3)
        assert_same_weights(model, expected)

    @both_ways
    def test_a_schedule_over_a_run_with_weight_averaging(self, way):
        log = Lrs()
        average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
        fit_with(way, self.Theirs, {"*": LINEAR}, log, average, max_epochs=3)
        found = [strengths["body.weight"] for strengths in log.strengths[:12]]
        assert found == pytest.approx([1 - i / 12 for i in range(12)])

    @both_ways
    @pytest.mark.parametrize("schedule", [LINEAR, {"schedule": "follow_lr", "start": 0.1}])
    def test_the_learning_rate_finder(self, way, schedule, tmp_path):
        log = Lrs()
        finder = LearningRateFinder(num_training_steps=10, early_stop_threshold=None)
        options = {"max_epochs": 2, "default_root_dir": tmp_path}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*above the peak.*")  # in the trial
            _model, _ = fit_with(way, self.Theirs, {"*": schedule}, finder, log, **options)
        found = [strengths["body.weight"] for strengths in log.strengths[-8:]]
        assert found == pytest.approx([1 - i / 8 for i in range(8)] if schedule is LINEAR else [0.1] * 8)

    @both_ways
    def test_the_batch_size_finder(self, way, tmp_path):
        log = Lrs()
        finder = BatchSizeFinder(mode="power", steps_per_trial=2, init_val=32, max_trials=1)
        rules = {"*.bias": {**LINEAR, "epochs": 1}, "*": LINEAR}
        _model, run = fit_with(way, self.Theirs, rules, finder, log, max_epochs=2, default_root_dir=tmp_path)
        count = 2 * run.num_training_batches
        found = [strengths["body.weight"] for strengths in log.strengths[-count:]]
        assert found == pytest.approx([1 - i / count for i in range(count)])
        assert log.strengths[-1]["body.bias"] == 0.0

    @both_ways
    def test_a_run_with_more_epochs(self, way, tmp_path):
        rules = {"*": LINEAR}
        _, run = fit_with(way, self.Theirs, rules, max_epochs=1)
        run.save_checkpoint(tmp_path / "one.ckpt")
        log = Lrs()
        model = with_mixin(self.Theirs, rules)() if way == "mixin" else self.Theirs()
        ours = [WeightDecayRules(rules)] if way == "callback" else []
        trainer(max_epochs=4, callbacks=[log, *ours]).fit(model, ckpt_path=tmp_path / "one.ckpt")
        found = [strengths["body.weight"] for strengths in log.strengths]
        assert found == pytest.approx([1 - i / 16 for i in range(4, 16)])

    @both_ways
    def test_a_second_fit(self, way):
        for epochs in (1, 2):
            log = Lrs()
            fit_with(way, TestOnce.Kept, {"*": LINEAR}, log, max_epochs=epochs)
            found = [strengths["body.weight"] for strengths in log.strengths]
            assert found == pytest.approx([1 - i / (4 * epochs) for i in range(4 * epochs)])

    @both_ways
    def test_manual_optimization_with_the_advice_of_the_error(self, way):
        class Manual(self.Theirs):
            automatic_optimization = False
            given = None

            def on_fit_start(self):
                if self.given:
                    schedule_weight_decay(self.optimizers(), total_steps=self.given)

            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(self.training_step_loss(batch))
                optimizer.step()

        with pytest.raises(ValueError, match=r"call lightning_regdecay\.schedule_weight_decay\(optimizer, total_steps"):
            fit_with(way, Manual, {"*": LINEAR})
        log = Lrs()
        fit_with(way, type("Given", (Manual,), {"given": 4}), {"*": LINEAR}, log)
        assert [strengths["body.weight"] for strengths in log.strengths] == [1.0, 0.75, 0.5, 0.25]

    def test_a_callback_of_the_users_with_any_attributes(self):
        class Mine(L.Callback):
            scheduling = "cosine"

        fit_with("callback", self.Theirs, {"*": LINEAR}, Mine())


class TestCallback:
    def test_mistakes_come_when_it_is_made_or_before_training(self):
        with pytest.raises(ValueError, match="weight_decay must be a finite number"):
            WeightDecayRules({"*": -1})

    @pytest.mark.parametrize("value", ["yes", "False", 1, 0, None])
    def test_a_wrong_decay_strict(self, value):
        with pytest.raises(TypeError, match=f"decay_strict must be True or False, got {value!r}"):
            WeightDecayRules({"*": 0.1}, decay_strict=value)

    def test_not_strict(self):
        with pytest.warns(UserWarning, match=r"rule 1 '\*\.bais' takes nothing"):
            trainer(callbacks=[WeightDecayRules({"*.bais": 0.0}, decay_strict=False)]).fit(TestOnce.Kept())

    @pytest.mark.parametrize("scheduler", [[], ["--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "2"]])
    def test_lightning_cli_with_a_chosen_optimizer(self, scheduler, tmp_path):
        callback = {"class_path": "lightning_regdecay.WeightDecayRules", "init_args": {"decay_rules": RULES}}
        config = {"trainer": {"callbacks": [callback], "logger": False, "enable_checkpointing": False, "max_epochs": 3}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        args = ["--config", str(tmp_path / "config.yaml"), "--optimizer", "SGD", "--optimizer.lr", "0.1", *scheduler]
        cli = LightningCLI(LitBase, args=args, run=False, save_config_callback=None)
        cli.trainer.fit(cli.model)
        (optimizer,) = cli.trainer.optimizers
        assert in_force(optimizer) == {"rest": 0.05, "bias": 0.0, "norm": 0.01, "head": 0.001}
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 if scheduler else 0.1)

    @both_ways
    def test_the_monitor_shows_the_rules(self, way, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")

        class Theirs(LitBase):
            def configure_optimizers(self):
                return sgd(two_parts(self))

        monitor = WeightDecayMonitor()
        model, _ = fit_with(way, Theirs, RULES, monitor)
        table = capsys.readouterr().out
        assert "*.bias" in table
        assert "head.*" in table
        record = monitor.history[-1]
        assert record["decay/head/l2_norm"] == pytest.approx(float64_norm([model.head.weight]), rel=1e-6)
        assert {key.split("/")[1] for key in record if key.endswith("l2_norm")} == {
            "rest",
            "0.bias",
            "norm",
            "1.bias",
            "head",
        }

    def test_what_is_applied_by_hand_in_configure_optimizers(self):
        class Theirs(LitBase):
            def configure_optimizers(self):
                optimizer = sgd(self.parameters())
                apply_decay_rules(optimizer, self, {"*": DecayRule(0.5)})
                return optimizer

        _, run = fit_with("none", Theirs, None)
        assert in_force(run.optimizers[0]) == {"rest": 0.5}


def test_a_published_model_trains_as_without_rules_of_other_strengths():
    """N-BEATS of pytorch-forecasting, as its users train it, with its own learning rates per epoch."""
    forecasting = pytest.importorskip("pytorch_forecasting")
    import pandas as pd

    time = torch.arange(120)
    table = pd.DataFrame({"time": time.numpy(), "series": "a", "value": (time / 5).sin().numpy()})
    data = forecasting.TimeSeriesDataSet(
        table,
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=20,
        max_prediction_length=5,
        time_varying_unknown_reals=["value"],
    )

    def fit(kind, *callbacks):
        torch.manual_seed(0)
        lrs = [1e-2, 5e-3, 1e-3]
        model = kind.from_dataset(data, learning_rate=lrs, weight_decay=0.1, optimizer="adam", widths=[16, 16])
        loader = data.to_dataloader(train=True, batch_size=16)
        trainer(max_epochs=3, limit_train_batches=3, callbacks=list(callbacks)).fit(model, loader)
        return model

    rules = {"*.bias": 0.1, "*": 0.1}
    theirs = fit(forecasting.NBeats)
    for model in (fit(with_mixin(forecasting.NBeats, rules)), fit(forecasting.NBeats, WeightDecayRules(rules))):
        assert all(map(torch.equal, model.parameters(), theirs.parameters()))


def test_callbacks_are_of_an_older_pytorch_lightning_too(monkeypatch):
    theirs = type("Callback", (), {})
    older = types.SimpleNamespace(__version__="2.5.2", Callback=theirs)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", older)
    assert issubclass(_callback_of_both_roots(), theirs)
    assert issubclass(_callback_of_both_roots(), L.Callback)
    older.__version__ = "2.6.0"
    assert _callback_of_both_roots() is L.Callback
