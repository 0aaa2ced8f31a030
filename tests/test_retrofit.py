"""Any existing model: its optimizers and schedulers, to the bit, over groups by decay rules."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import yaml
from helpers import RULES, LitBase, LitRules, digits_loader, float64_norm, members, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_regdecay import WeightDecayMixin, WeightDecayMonitor, build_decay_groups
from lightning_regdecay.retrofit import WeightDecayRules

schedulers = torch.optim.lr_scheduler
SAME = {"*.bias": 0.1, "*norm*": 0.1, "*": 0.1}  # what SGD has below, in three groups


def sgd(params, **options):
    return torch.optim.SGD(params, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, **options})


def two_parts(model):
    """Param groups as users write them."""
    return [
        {"params": model.body.parameters()},
        {"params": [*model.norm.parameters(), *model.head.parameters()], "lr": 0.02},
    ]


class Record:
    """The lr of every parameter at every optimizer step, by name."""

    def __init__(self, model):
        self.model, self.lrs = model, []

    def __call__(self, optimizer, args, kwargs):
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        lrs = {names[p]: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        self.lrs.append(dict(sorted(lrs.items())))


def record(model):
    """Note learning rates of all optimizers that the model configures, whoever asks for them."""
    log = Record(model)
    configure = model.configure_optimizers

    def recording():
        config = configure()
        stack = [config]
        while stack:
            part = stack.pop()
            if isinstance(part, torch.optim.Optimizer):
                part.register_step_post_hook(log)
            elif isinstance(part, dict):
                stack.append(part.get("optimizer"))
            elif isinstance(part, (list, tuple)):
                stack.extend(part)
        return config

    model.configure_optimizers = recording
    return log


def fit(model, **options):
    log = record(model)
    trainer(max_epochs=3, **options).fit(model, val_dataloaders=digits_loader(64))
    return model, log.lrs


def assert_parity(theirs, rules=SAME, groups=None):
    """A class trains as without the mixin, with the mixin, and with the callback."""

    class Ours(WeightDecayMixin, theirs):
        decay_rules = rules

    expected, lrs = fit(theirs())
    assert lrs, "no optimizer step was taken"
    ours, ours_lrs = fit(Ours())
    callback, callback_lrs = theirs(), []

    class Watch(WeightDecayMonitor):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            names = {parameter: name for name, parameter in pl_module.named_parameters()}
            found = {names[p]: float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
            callback_lrs.append(dict(sorted(found.items())))

    run = trainer(max_epochs=3, callbacks=[WeightDecayRules(rules), Watch()])
    run.fit(callback, val_dataloaders=digits_loader(64))
    assert ours_lrs == lrs
    assert callback_lrs == lrs
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name
        assert torch.equal(parameter, callback.get_parameter(name)), name
    return ours, run


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
        "dictionary without scheduler": lambda o, s: {"optimizer": o},
        "tuple of a dictionary": lambda o, s: ({"optimizer": o, "lr_scheduler": s},),
    }

    @pytest.mark.parametrize("shape", SHAPES)
    def test_train_as_without_rules_of_other_strengths(self, shape):
        class Theirs(LitBase):
            def configure_optimizers(self):
                optimizer = sgd(two_parts(self))
                return TestReturnShapes.SHAPES[shape](optimizer, schedulers.ExponentialLR(optimizer, gamma=0.5))

        _, run = assert_parity(Theirs)
        names = [group["name"] for group in run.optimizers[0].param_groups]
        assert names == ["rest", "bias", "norm", "bias_2", "rest_2"]

    def test_none(self):
        class Theirs(LitBase):
            automatic_optimization = False

            def configure_optimizers(self):
                return None

            def training_step(self, batch, batch_idx):
                pass

        class Ours(WeightDecayMixin, Theirs):
            decay_rules = SAME

        trainer().fit(Ours())

    @pytest.mark.parametrize("shape", ["tuple", "list", "tuple of dictionaries", "two lists"])
    def test_several_optimizers(self, shape):
        class Theirs(LitBase):
            automatic_optimization = False

            def configure_optimizers(self):
                body = sgd(self.body.parameters())
                rest = torch.optim.AdamW([*self.norm.parameters(), *self.head.parameters()], lr=0.01, weight_decay=0.1)
                a, b = schedulers.StepLR(body, 1, gamma=0.5), schedulers.CosineAnnealingLR(rest, 9)
                return {
                    "tuple": (body, rest),
                    "list": [body, rest],
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

        _, run = assert_parity(Theirs)
        names = [[group["name"] for group in optimizer.param_groups] for optimizer in run.optimizers]
        assert names == [["rest", "bias"], ["norm", "bias", "rest"]]


class TestSchedulers:
    SCHEDULERS = {
        "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
        "LambdaLR of a list": lambda o: schedulers.LambdaLR(o, [lambda step: 0.9**step, lambda step: 0.5**step]),
        "MultiplicativeLR of a list": lambda o: schedulers.MultiplicativeLR(o, [lambda step: 0.9, lambda step: 0.5]),
        "StepLR": lambda o: schedulers.StepLR(o, 2),
        "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5]),
        "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=3),
        "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=4),
        "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
        "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=9, power=2),
        "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=9, eta_min=1e-3),
        "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=3),
        "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.2, total_steps=20),
        "OneCycleLR of a list": lambda o: schedulers.OneCycleLR(o, [0.2, 0.05], total_steps=20),
        "CyclicLR of lists": lambda o: schedulers.CyclicLR(
            o, [0.01, 0.02], max_lr=[0.1, 0.2], step_size_up=3, base_momentum=[0.8, 0.7], max_momentum=[0.9, 0.95]
        ),
        "SequentialLR": lambda o: schedulers.SequentialLR(
            o, [schedulers.LinearLR(o, total_iters=3), schedulers.LambdaLR(o, [lambda s: 0.9**s] * 2)], milestones=[3]
        ),
        "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
            [schedulers.ConstantLR(o, total_iters=3), schedulers.ExponentialLR(o, 0.9)], optimizer=o
        ),
        "SWALR of a list": lambda o: torch.optim.swa_utils.SWALR(o, [0.05, 0.01], anneal_epochs=5),
    }

    @pytest.mark.parametrize("kind", SCHEDULERS)
    def test_every_learning_rate_is_what_it_was(self, kind):
        class Theirs(LitBase):
            def configure_optimizers(self):
                optimizer = sgd(two_parts(self))
                scheduler = TestSchedulers.SCHEDULERS[kind](optimizer)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        assert_parity(Theirs)

    @pytest.mark.parametrize("min_lr", [1e-4, [0.04, 0.001]])
    def test_plateaus(self, min_lr):
        class Theirs(LitBase):
            def configure_optimizers(self):
                optimizer = sgd(two_parts(self))
                scheduler = schedulers.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0, min_lr=min_lr)
                return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}

        assert_parity(Theirs)

    def test_one_of_the_users_own(self):
        class Warm(schedulers.LRScheduler):
            def __init__(self, optimizer, final_lrs, steps):
                self.final_lrs, self.steps = final_lrs, steps
                super().__init__(optimizer)

            def get_lr(self):
                part = min(self.last_epoch / self.steps, 1.0)
                return [base + part * (final - base) for base, final in zip(self.base_lrs, self.final_lrs)]

        class Theirs(LitBase):
            def configure_optimizers(self):
                optimizer = sgd(two_parts(self))
                return [optimizer], [{"scheduler": Warm(optimizer, [0.5, 0.01], 6), "interval": "step"}]

        assert_parity(Theirs)

    def test_one_that_is_no_scheduler_of_torch(self):
        class Halving:
            """As timm's: values per group, taken from the optimizer when it is made."""

            def __init__(self, optimizer):
                self.optimizer, self.steps = optimizer, 0
                self.base_values = [group["lr"] for group in optimizer.param_groups]

            def step(self, *args):
                self.steps += 1
                for group, value in zip(self.optimizer.param_groups, self.base_values):
                    group["lr"] = value * 0.5**self.steps

            def state_dict(self):
                return {"steps": self.steps}

            def load_state_dict(self, state_dict):
                self.steps = state_dict["steps"]

        class Theirs(LitBase):
            def configure_optimizers(self):
                optimizer = sgd(two_parts(self))
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": Halving(optimizer), "interval": "step"}}

            def lr_scheduler_step(self, scheduler, metric):
                scheduler.step()

        assert_parity(Theirs)

    def test_torch_is_left_as_it_was(self):
        before = (torch.optim.Optimizer.add_param_group, schedulers.LambdaLR.__init__, schedulers.LRScheduler.__init__)

        class Broken(LitBase):
            def configure_optimizers(self):
                raise RuntimeError("theirs")

        class Ours(WeightDecayMixin, Broken):
            decay_rules = SAME

        with pytest.raises(RuntimeError, match="theirs"):
            Ours().configure_optimizers()
        after = (torch.optim.Optimizer.add_param_group, schedulers.LambdaLR.__init__, schedulers.LRScheduler.__init__)
        assert after == before


class TestGroups:
    def ours(self, configure, rules=RULES, **attributes):
        theirs = type("Theirs", (LitBase,), {"configure_optimizers": configure})
        model = type("Ours", (WeightDecayMixin, theirs), {"decay_rules": rules})()
        return model, model.configure_optimizers()

    def test_rules_set_the_strength_and_keep_other_options(self):
        _, optimizer = self.ours(lambda self: sgd(two_parts(self), nesterov=True))
        found = {
            group["name"]: (group["param_names"], group["weight_decay"], group["lr"])
            for group in optimizer.param_groups
        }
        assert found == {
            "rest": (["body.weight"], 0.05, 0.1),
            "bias": (["body.bias"], 0.0, 0.1),
            "norm": (["norm.weight"], 0.01, 0.02),
            "bias_2": (["norm.bias", "head.bias"], 0.0, 0.02),
            "head": (["head.weight"], 0.001, 0.02),
        }
        assert all(group["nesterov"] for group in optimizer.param_groups)

    def test_names_of_their_groups_stay_in_front(self):
        _, optimizer = self.ours(
            lambda self: sgd([{"params": self.parameters(), "name": "all of it"}]), {"*.bias": 0.0}
        )
        assert [group["name"] for group in optimizer.param_groups] == ["all_of_it.default", "all_of_it.bias"]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]

    def test_a_multiple_is_of_what_their_group_had(self):
        def configure(self):
            return sgd([{"params": self.body.parameters(), "weight_decay": 0.4}, {"params": self.head.parameters()}])

        _, optimizer = self.ours(configure, {"*.bias": 0.0, "*": {"decay_mult": 0.5}})
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0, 0.05, 0.0]

    def test_schedules_and_options(self):
        rules = {
            "*": {"weight_decay": {"schedule": "linear", "start": 0, "end": 1, "steps": 10}, "options": {"lr": 0.5}}
        }
        _, optimizer = self.ours(lambda self: sgd(self.parameters()), rules)
        optimizer.step()
        optimizer.step()
        assert optimizer.param_groups[0]["weight_decay"] == 0.1
        assert optimizer.param_groups[0]["lr"] == 0.5

    @pytest.mark.parametrize(
        "params",
        [
            lambda self: self.named_parameters(),
            lambda self: list(self.parameters()),
            lambda self: [{"params": self.body.weight}, {"params": list(self.body.named_parameters())[1:]}],
        ],
    )
    def test_every_way_to_pass_parameters(self, params):
        _, optimizer = self.ours(lambda self: sgd(params(self)))
        names = [name for group in optimizer.param_groups for name in group["param_names"]]
        assert names[:2] == ["body.weight", "body.bias"]

    def test_frozen_parameters_that_their_optimizer_holds_go_by_the_rules(self):
        class Theirs(LitBase):
            def __init__(self):
                super().__init__()
                self.body.requires_grad_(False)

            def configure_optimizers(self):
                return sgd(self.parameters())

        class Ours(WeightDecayMixin, Theirs):
            decay_rules = RULES

        optimizer = Ours().configure_optimizers()
        assert {"body.weight", "body.bias"} <= {n for group in optimizer.param_groups for n in group["param_names"]}

    def test_an_optimizer_without_weight_decay(self):
        with pytest.raises(ValueError, match="Rprop knows no weight decay"):
            self.ours(lambda self: torch.optim.Rprop(self.parameters()))

    def test_one_beside_others_whose_parameters_need_none(self):
        def configure(self):
            return sgd(self.body.parameters()), torch.optim.Rprop([*self.norm.parameters(), *self.head.parameters()])

        _, (first, second) = self.ours(configure, {"body.*": 0.3, "*": 0.0})
        assert first.param_groups[0]["weight_decay"] == 0.3
        assert "weight_decay" not in second.param_groups[0]

    def test_an_option_that_their_optimizer_does_not_know(self):
        rules = {"*": {"weight_decay": 0.1, "options": {"betas": [0.9, 0.99]}}}
        with pytest.raises(ValueError, match="group 'rest' has the option 'betas', which SGD does not know"):
            self.ours(lambda self: sgd(self.parameters()), rules)

    def test_a_set_of_parameters_is_torchs_own_error(self):
        with pytest.raises(TypeError, match="ordered"):
            self.ours(lambda self: sgd([{"params": set(self.parameters())}]))

    def test_a_module_with_a_builder_of_its_own_uses_that(self):
        class Theirs(LitBase):
            def configure_optimizers(self):
                raise AssertionError("not to be called")

        class Ours(WeightDecayMixin, Theirs):
            decay_rules = RULES

            def build_optimizer(self, param_groups):
                return torch.optim.Adagrad(param_groups)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert isinstance(Ours().configure_optimizers(), torch.optim.Adagrad)

    def test_the_monitor_shows_the_rules(self, capsys):
        model, _ = self.ours(lambda self: sgd(two_parts(self)))
        monitor = WeightDecayMonitor()
        trainer(callbacks=[monitor]).fit(model)
        table = capsys.readouterr().out
        assert "*.bias" in table
        assert "head.*" in table
        heads = [model.head.weight]
        assert monitor.history[-1]["decay/head/l2_norm"] == pytest.approx(float64_norm(heads), rel=1e-6)

    @pytest.mark.parametrize(
        "kind",
        ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD"],
    )
    def test_every_optimizer_of_torch_trains_as_with_groups_by_hand(self, kind):
        build = getattr(torch.optim, kind)

        class Theirs(LitBase):
            def configure_optimizers(self):
                return build(self.parameters(), lr=0.01)

        class Ours(WeightDecayMixin, Theirs):
            decay_rules = {"*.bias": 0.0, "*": 0.3}

        class ByHand(LitBase):
            def configure_optimizers(self):
                names = dict(self.named_parameters())
                groups = [[p for n, p in names.items() if n.endswith("bias") == biased] for biased in (False, True)]
                return build(
                    [{"params": groups[0], "weight_decay": 0.3}, {"params": groups[1], "weight_decay": 0.0}], lr=0.01
                )

        models = [Ours(), ByHand()]
        for model in models:
            trainer(max_epochs=2).fit(model)
        for ours, by_hand in zip(*(model.parameters() for model in models)):
            assert torch.equal(ours, by_hand)


class TestCallback:
    def test_the_model_is_left_as_it_was(self):
        model = LitBase()
        model.configure_optimizers = chosen = lambda: sgd(model.parameters())
        run = trainer(callbacks=[WeightDecayRules(RULES)])
        run.fit(model)
        assert len(run.optimizers[0].param_groups) == 4
        assert model.configure_optimizers is chosen
        del model.configure_optimizers
        run.validate(model, digits_loader(64))
        assert "configure_optimizers" not in vars(model)

    def test_a_model_with_rules_of_its_own(self):
        with pytest.raises(
            MisconfigurationException, match="LitRules has WeightDecayMixin, and WeightDecayRules would"
        ):
            trainer(callbacks=[WeightDecayRules(RULES)]).fit(LitRules())

    def test_mistakes_come_when_it_is_made_or_before_training(self):
        with pytest.raises(ValueError, match="weight_decay must be a finite number"):
            WeightDecayRules({"*": -1})
        with pytest.raises(ValueError, match=r"rule 1 '\*\.bais' takes nothing"):
            trainer(callbacks=[WeightDecayRules({"*.bais": 0.0})]).fit(LitAdam())

    def test_not_strict(self):
        with pytest.warns(UserWarning, match=r"rule 1 '\*\.bais' takes nothing"):
            trainer(callbacks=[WeightDecayRules({"*.bais": 0.0}, decay_strict=False)]).fit(LitAdam())

    @pytest.mark.parametrize("scheduler", [[], ["--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "2"]])
    def test_lightning_cli_with_a_chosen_optimizer(self, scheduler, tmp_path):
        callback = {"class_path": "lightning_regdecay.retrofit.WeightDecayRules", "init_args": {"decay_rules": RULES}}
        config = {"trainer": {"callbacks": [callback], "logger": False, "enable_checkpointing": False, "max_epochs": 3}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        args = ["--config", str(tmp_path / "config.yaml"), "--optimizer", "SGD", "--optimizer.lr", "0.1", *scheduler]
        cli = LightningCLI(LitBase, args=args, run=False, save_config_callback=None)
        cli.trainer.fit(cli.model)
        (optimizer,) = cli.trainer.optimizers
        found = {group["name"]: (group["weight_decay"], group["lr"]) for group in optimizer.param_groups}
        lr = pytest.approx(0.01 if scheduler else 0.1)
        assert found == {"rest": (0.05, lr), "bias": (0.0, lr), "norm": (0.01, lr), "head": (0.001, lr)}

    def test_resumes_with_other_rules(self, tmp_path):
        def fit(rules, epochs, **options):
            checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
            run = trainer(max_epochs=epochs, callbacks=[WeightDecayRules(rules), checkpoint], enable_checkpointing=True)
            model = LitAdam()
            run.fit(model, **options)
            return model, run.optimizers[0]

        whole, _ = fit({"*.bias": 0.1, "*": 0.1}, 2)
        resumed, optimizer = fit({"head.*": 0.1, "*": 0.1}, 2, ckpt_path=tmp_path / "epoch=0.ckpt")
        assert [group["name"] for group in optimizer.param_groups] == ["rest", "head"]
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


class LitAdam(LitBase):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": schedulers.StepLR(optimizer, 1, gamma=0.5)}


class LitBackbone(LitBase):
    """As Lightning's finetuning callbacks want it: its optimizer holds what is trainable at first."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(self.body, nn.BatchNorm1d(16))
        del self.body

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.norm(self.backbone(batch[0])).relu()), batch[1])

    def configure_optimizers(self):
        trainable = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trainable, lr=0.1, momentum=0.9, weight_decay=0.3)


class LitRulesBackbone(WeightDecayMixin, LitBackbone):
    decay_rules = {"*.bias": 0.0, "backbone.*": 0.1, "*": 0.05}


class TestFinetuning:
    def fit(self, epochs, model=LitRulesBackbone, path=None, ckpt_path=None):
        model = model()
        unfreezing = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.5, verbose=False)
        monitor = WeightDecayMonitor(summary=False)
        saving = [ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)] if path else []
        run = trainer(max_epochs=epochs, callbacks=[unfreezing, monitor, *saving], enable_checkpointing=bool(path))
        log = record(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*takes frozen parameters only.*")
            run.fit(model, ckpt_path=ckpt_path)
        return model, run.optimizers[0], log.lrs, monitor

    def test_groups_that_are_added_get_the_rules(self):
        model, optimizer, _, monitor = self.fit(3)
        found = {tuple(group["param_names"]): group["weight_decay"] for group in optimizer.param_groups[-2:]}
        assert found == {("backbone.0.bias",): 0.0, ("backbone.0.weight",): 0.1}
        # The norms of the backbone were trainable from the start, under the same rule.
        added = [model.backbone[0].weight]
        assert monitor.history[-1]["decay/backbone_2/l2_norm"] == pytest.approx(float64_norm(added), rel=1e-6)

    def test_their_learning_rates_are_what_they_were(self):
        _, _, expected, _ = self.fit(5, LitBackbone)
        _, _, found, _ = self.fit(5)
        assert found == expected
        assert len({lrs["backbone.0.weight"] for lrs in expected if "backbone.0.weight" in lrs}) == 4

    def test_resuming_such_a_run(self, tmp_path):
        class SameStrengths(LitRulesBackbone):
            decay_rules = {"*.bias": 0.3, "*": 0.3}

        resumed = {}
        for model in (LitBackbone, SameStrengths):
            path = tmp_path / model.__name__
            self.fit(3, model, path=path)
            resumed[model] = self.fit(5, model, path=path / "2", ckpt_path=path / "epoch=2.ckpt")
        (theirs, _, expected, _), (ours, optimizer, lrs, _) = resumed.values()
        assert lrs == expected
        for name, parameter in theirs.named_parameters():
            assert torch.equal(parameter, ours.get_parameter(name)), name
        assert len(optimizer.param_groups) == 4

    def test_resuming_such_a_run_with_other_rules(self, tmp_path):
        class Other(LitRulesBackbone):
            decay_rules = {"*.bias": 0.0, "backbone.*": 0.7, "*": 0.05}

        self.fit(3, path=tmp_path)
        _, optimizer, _, _ = self.fit(4, Other, path=tmp_path / "2", ckpt_path=tmp_path / "epoch=2.ckpt")
        assert next(g["weight_decay"] for g in optimizer.param_groups if g["name"].startswith("backbone")) == 0.7

    def test_a_finetuning_callback_of_ones_own(self):
        class Thaw(BaseFinetuning):
            def freeze_before_training(self, pl_module):
                self.freeze(pl_module.backbone)

            def finetune_function(self, pl_module, epoch, optimizer):
                if epoch == 1:
                    self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.01)

        run = trainer(max_epochs=2, callbacks=[Thaw()])
        run.fit(LitRulesBackbone())
        assert [group["weight_decay"] for group in run.optimizers[0].param_groups] == [0.05, 0.0, 0.1, 0.1, 0.0]
        assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.1, 0.1, 0.1, 0.01, 0.01]


class RunsNoHooks(torch.optim.AdamW):
    """As bitsandbytes' optimizers: a ``load_state_dict`` of its own, which takes groups as they stand."""

    def load_state_dict(self, state_dict, move_to_device=True):
        saved = copy.deepcopy(state_dict)
        if len(saved["param_groups"]) != len(self.param_groups):
            raise ValueError("loaded state dict has a different number of parameter groups")
        params = [p for group in self.param_groups for p in group["params"]]
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        state = {p: saved["state"][key] for p, key in zip(params, keys)}
        groups = [{**new, "params": old["params"]} for old, new in zip(self.param_groups, saved["param_groups"])]
        self.__setstate__({"state": state, "param_groups": groups})


class GoesBackToTheGivenState(torch.optim.AdamW):
    """As pytorch-optimizer's: what torch has loaded is put right by the state as it was given."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            for parameter, key in zip(group["params"], saved["params"]):
                self.state[parameter] = copy.deepcopy(state_dict["state"][key])


class HasNoHooks(torch.optim.Optimizer):
    """As the Lookahead of pytorch-optimizer and of torch_optimizer: an optimizer around another."""

    def __init__(self, inner):
        self.inner, self.defaults = inner, inner.defaults
        self.param_groups, self.state = inner.param_groups, {}


class SwitchedByAttribute(torch.optim.Optimizer):
    """As adabelief-pytorch's: an option that is no option of a param group."""

    def __init__(self, params, lr=0.1, weight_decay=0.0, decouple=True):
        self.decouple = decouple
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                factor = group["lr"] if self.decouple else group["lr"] ** 2
                p.data.mul_(1 - factor * group["weight_decay"])


def steps(model, optimizer, numbers):
    """Optimizer steps on digits, 64 at a time."""
    pixels, classes = next(iter(digits_loader(256, 256)))
    for number in numbers:
        part = slice(64 * (number % 4), 64 * (number % 4) + 64)
        optimizer.zero_grad()
        model.training_step_loss([pixels[part], classes[part]]).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def assert_goes_on_over_other_groups(build):
    """Stopped and resumed with other groups, each parameter with the λ that it had, a run ends as one that went on."""

    class Two(WeightDecayMixin, LitBase):
        decay_rules = {"*.bias": 0.0, "*": 0.3}

        def build_optimizer(self, param_groups):
            return build(param_groups)

    class Three(Two):
        decay_rules = {"head.weight": 0.3, "*.bias": 0.0, "*": 0.3}

    model = Two()
    optimizer = model.configure_optimizers()
    steps(model, optimizer, range(5))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = steps(model, optimizer, range(5, 10))

    resumed = Three()
    resumed.load_state_dict(weights)
    optimizer = resumed.configure_optimizers()
    assert len(optimizer.param_groups) == 3
    optimizer.load_state_dict(state)
    found = steps(resumed, optimizer, range(5, 10))
    assert all(map(torch.equal, found, expected))


class TestOptimizersOfOthers:
    @pytest.mark.parametrize("kind", [RunsNoHooks, GoesBackToTheGivenState])
    def test_resume_over_other_groups_by_a_load_state_dict_of_their_own(self, kind):
        assert_goes_on_over_other_groups(lambda groups: kind(groups, lr=0.01))

    @pytest.mark.parametrize("strength", [0.1, {"schedule": "linear", "start": 0.1, "end": 0, "steps": 20}])
    def test_one_that_takes_no_hooks_is_refused(self, strength):
        class Ours(WeightDecayMixin, LitBase):
            decay_rules = {"*": strength}

            def build_optimizer(self, param_groups):
                return HasNoHooks(torch.optim.AdamW(param_groups))

        with pytest.raises(TypeError, match=r"HasNoHooks does not call torch\.optim\.Optimizer\.__init__"):
            Ours().configure_optimizers()

    @pytest.mark.parametrize("decouple", [True, False])
    def test_a_timescale_sees_options_that_are_no_options_of_a_group(self, decouple):
        class Ours(WeightDecayMixin, LitBase):
            decay_rules = {"*": {"schedule": "timescale", "steps": 100}}

            def build_optimizer(self, param_groups):
                return SwitchedByAttribute(param_groups, decouple=decouple)

        if decouple:
            optimizer = Ours().configure_optimizers()
            optimizer.step()
            assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.1)
        else:
            with pytest.raises(ValueError, match="SwitchedByAttribute cannot have: a step without a gradient does not"):
                Ours().configure_optimizers()

    @pytest.mark.parametrize("kind", ["Lion", "AdaBelief", "Lamb", "SOAP", "ScheduleFreeAdamW"])
    def test_those_of_pytorch_optimizer(self, kind):
        build = getattr(pytest.importorskip("pytorch_optimizer"), kind)

        class Ours(WeightDecayMixin, LitBase):
            decay_rules = {"*.bias": 0.0, "*": {"schedule": "linear", "start": 0.1, "end": 0, "steps": 20}}

            def build_optimizer(self, param_groups):
                return build(param_groups, lr=0.01)

        model, by_hand = Ours(), LitBase()
        found = steps(model, model.configure_optimizers(), range(20))
        names = dict(by_hand.named_parameters())
        groups = [[p for n, p in names.items() if n.endswith(".bias") == biased] for biased in (True, False)]
        optimizer = build([{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1]}], lr=0.01)
        for step in range(20):
            optimizer.param_groups[1]["weight_decay"] = 0.1 + (0 - 0.1) * (step / 20)
            expected = steps(by_hand, optimizer, [step])
        assert all(map(torch.equal, found, expected))
        assert_goes_on_over_other_groups(lambda groups: build(groups, lr=0.01))


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

    class Ours(WeightDecayMixin, forecasting.NBeats):
        decay_rules = {"*.bias": 0.1, "*": 0.1}

    def fit(kind, *callbacks):
        torch.manual_seed(0)
        lrs = [1e-2, 5e-3, 1e-3]
        model = kind.from_dataset(data, learning_rate=lrs, weight_decay=0.1, optimizer="adam", widths=[16, 16])
        log = record(model)
        trainer(max_epochs=3, limit_train_batches=3, callbacks=list(callbacks)).fit(
            model, data.to_dataloader(train=True, batch_size=16)
        )
        return model, log.lrs

    theirs, lrs = fit(forecasting.NBeats)
    for model, found in (fit(Ours), fit(forecasting.NBeats, WeightDecayRules({"*.bias": 0.1, "*": 0.1}))):
        assert found == lrs
        assert all(map(torch.equal, model.parameters(), theirs.parameters()))


def test_a_group_without_names_joins_an_optimizer_of_fabric_or_plain_pytorch():
    class Lit(LitRules):
        def __init__(self):
            super().__init__()
            self.late = nn.Linear(2, 2)
            self.late.requires_grad_(False)

    model = Lit()
    optimizer = model.configure_optimizers()
    optimizer.add_param_group({"params": model.late.parameters(), "lr": 0.5})
    assert [(g["name"], g["weight_decay"], g["lr"]) for g in optimizer.param_groups[-2:]] == [
        ("rest_2", 0.05, 0.5),
        ("bias_2", 0.0, 0.5),
    ]
    assert members(build_decay_groups(model, RULES)).keys() == {"bias", "norm", "head", "rest"}
    assert math.isclose(optimizer.param_groups[0]["lr"], 1e-3)
