"""The mixin: rules and optimizers from where users put them, training as by hand, plain data in what is stored."""

from __future__ import annotations

import ast
import copy
import functools
import pickle
import re
import subprocess
import sys

import lightning as L
import pytest
import pytorch_lightning as pl
import torch
import yaml
from helpers import RULES, LitBase, LitHparams, LitRules, Net, digits_loader, float64_norm, members, trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from omegaconf import OmegaConf
from packaging.version import Version
from torch import nn

from lightning_regdecay import DecayRule, WeightDecayMixin, WeightDecayMonitor, groups_in_force
from lightning_regdecay.rules.forms import shortest_rules


def strengths(optimizer):
    return {group["name"]: group["weight_decay"] for group in groups_in_force(optimizer)}


class TestWhereTheRulesComeFrom:
    def test_the_class(self):
        assert strengths(LitRules().configure_optimizers()) == {"bias": 0.0, "norm": 0.01, "head": 1e-3, "rest": 0.05}

    def test_hyperparameters_before_the_class(self):
        class Lit(LitHparams):
            decay_rules = RULES

        assert strengths(Lit(decay_rules={"*": 0.3}).configure_optimizers()) == {"rest": 0.3}
        assert strengths(Lit(decay_rules=None).configure_optimizers())["rest"] == 0.05

    def test_the_instance_before_hyperparameters(self):
        model = LitHparams(decay_rules={"*": 0.3})
        model.decay_rules = {"*": 0.4}
        assert strengths(model.configure_optimizers()) == {"rest": 0.4}

    def test_hyperparameters_changed_later_count(self):
        model = LitHparams(decay_rules={"*": DecayRule(0.3)})
        model.hparams.decay_rules = {"*": 0.5}
        assert strengths(model.configure_optimizers()) == {"rest": 0.5}

    def test_empty_rules_leave_all_to_the_optimizer(self):
        model = LitHparams(decay_rules={})
        assert strengths(model.configure_optimizers()) == {"default": 0.01}

    def test_no_rules_anywhere_is_an_error(self):
        with pytest.raises(ValueError, match="LitHparams has no decay rules; set the class attribute") as error:
            LitHparams().configure_optimizers()
        (suggested,) = re.findall(r"decay_rules = (\{.*?\})", str(error.value))
        assert ast.literal_eval(suggested) == {"*.bias": 0.0, "*": 0.05}

    def test_rules_that_the_user_changes_afterwards_do_not_change_the_model(self):
        rules = {"*.bias": DecayRule(0.0), "*": {"weight_decay": 0.1}}
        model = LitHparams(decay_rules=rules)
        rules["*"]["weight_decay"] = 0.9
        rules["*.bias"] = 0.9
        assert strengths(model.configure_optimizers()) == {"bias": 0.0, "rest": 0.1}

    def test_an_omegaconf_object_is_not_written_to(self):
        class Lit(WeightDecayMixin, LitBase):
            def __init__(self, config):
                super().__init__()
                self.save_hyperparameters(config)

        config = OmegaConf.create({"base": 0.2, "lr": 0.1, "decay_rules": {"*.bias": 0.0, "*": "${base}"}})
        OmegaConf.set_readonly(config, True)
        assert strengths(Lit(config).configure_optimizers()) == {"bias": 0.0, "rest": 0.2}
        assert OmegaConf.to_container(config, resolve=False)["decay_rules"]["*"] == "${base}"

    def test_the_bases_in_the_wrong_order(self):
        with pytest.raises(TypeError, match="WeightDecayMixin must come before LightningModule in the bases of Wrong"):

            class Wrong(LitBase, WeightDecayMixin):
                pass

    def test_an_attribute_error_in_a_predicate_is_shown(self):
        model = LitHparams(decay_rules=[DecayRule(0.1, where=lambda n, p, m: m.no_such_thing)])
        for ask in (model.configure_optimizers, lambda: model.decay_groups):
            with pytest.raises(RuntimeError, match="has no attribute 'no_such_thing'"):
                ask()

    def test_predicates_and_classes_in_hyperparameters_stay_in_force(self):
        rules = [DecayRule(0.0, where=lambda n, p, m: n == "head.bias", group="one"), DecayRule(0.1, modules=nn.Linear)]
        model = LitHparams(decay_rules=[*rules, DecayRule(0.2)])
        assert members(model.decay_groups)["one"] == ["head.bias"]

    def test_decay_strict(self):
        model = LitHparams(decay_rules={"*.bais": 0.0, "*": 0.1})
        with pytest.raises(ValueError, match="takes nothing"):
            model.configure_optimizers()
        model.decay_strict = False
        with pytest.warns(UserWarning, match="takes nothing"):
            assert strengths(model.configure_optimizers()) == {"rest": 0.1}

    @pytest.mark.parametrize("value", ["yes", "False", 1, 0, None])
    def test_a_wrong_decay_strict(self, value):
        model = LitHparams(decay_rules={"*.bais": 0.0, "*": 0.1})
        model.decay_strict = value
        before = [p.clone() for p in model.parameters()]
        for act in (model.configure_optimizers, lambda: model.decay_groups, lambda: trainer().fit(model)):
            with pytest.raises(TypeError, match=f"decay_strict of LitHparams must be True or False, got {value!r}"):
                act()
        assert all(map(torch.equal, before, model.parameters()))

    def test_mistakes_come_before_the_first_step(self):
        model = LitHparams(decay_rules={"*.bais": 0.0})
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(ValueError, match="takes nothing"):
            trainer().fit(model)
        assert all(map(torch.equal, before, model.parameters()))


class TestWhereTheOptimizerComesFrom:
    @pytest.mark.parametrize("lr", [0.25, "2.5e-1"])
    def test_adamw_with_the_learning_rate_of_the_hyperparameters(self, lr):
        optimizer = LitHparams(lr=lr, decay_rules=RULES).configure_optimizers()
        assert type(optimizer) is torch.optim.AdamW
        assert {group["lr"] for group in optimizer.param_groups} == {0.25}

    @pytest.mark.parametrize("name", ["lr", "learning_rate"])
    def test_or_of_the_module(self, name):
        model = LitRules()
        setattr(model, name, 0.5)
        assert model.configure_optimizers().param_groups[0]["lr"] == 0.5

    def test_or_of_its_class(self):
        class Attribute(LitRules):
            lr = 0.5

        class Property(LitRules):
            @property
            def lr(self):
                return 0.5

        for model in (Attribute(), Property()):
            assert model.configure_optimizers().param_groups[0]["lr"] == 0.5

    def test_hyperparameters_come_before_the_module(self):
        model = LitHparams(lr=0.25, decay_rules=RULES)
        model.lr = 0.5
        assert model.configure_optimizers().param_groups[0]["lr"] == 0.25

    def test_a_learning_rate_that_is_no_number(self):
        with pytest.raises(ValueError, match="lr must be a number, got the text 'fast'"):
            LitHparams(lr="fast", decay_rules=RULES).configure_optimizers()

    def test_or_adamws_own(self):
        assert (
            LitRules().configure_optimizers().param_groups[0]["lr"] == torch.optim.AdamW([torch.ones(1)]).defaults["lr"]
        )

    def test_a_callable_that_the_model_was_given(self):
        model = LitRules()
        model.optimizer = lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        model.lr_scheduler = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3)
        config = model.configure_optimizers()
        assert strengths(config["optimizer"])["head"] == 1e-3
        assert isinstance(config["lr_scheduler"], torch.optim.lr_scheduler.StepLR)

    def test_a_plateau_scheduler_from_the_command_line_keeps_its_metric(self):
        model = LitRules()
        model.lr_scheduler = lambda optimizer: ReduceLROnPlateau(optimizer, monitor="train_loss")
        assert model.configure_optimizers()["lr_scheduler"]["monitor"] == "train_loss"
        trainer().fit(model)

    def test_build_methods_and_super_from_a_subclass(self):
        class Lit(LitRules):
            def build_optimizer(self, param_groups):
                return torch.optim.Adam(param_groups, lr=0.2)

            def build_lr_scheduler(self, optimizer):
                return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

            def configure_optimizers(self):
                config = super().configure_optimizers()
                return {**config, "lr_scheduler": {"scheduler": config["lr_scheduler"], "interval": "step"}}

        run = trainer()
        run.fit(Lit())
        assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.2 * 0.5**4)

    def test_options_reach_their_groups(self):
        model = LitHparams(lr=0.1, decay_rules={"head.*": {"weight_decay": 0.1, "options": {"lr": 0.01}}, "*": 0.2})
        assert [group["lr"] for group in model.configure_optimizers().param_groups] == [0.01, 0.1]

    def test_multiples_of_the_optimizers_own(self):
        model = LitHparams(decay_rules={"head.*": {"decay_mult": 0.5}, "*.bias": {"decay_mult": 0}, "norm.*": 0.3})
        model.optimizer = lambda groups: torch.optim.AdamW(groups, weight_decay=0.2)
        assert strengths(model.configure_optimizers()) == {"head": 0.1, "bias": 0.0, "norm": 0.3, "default": 0.2}

    def test_a_multiple_of_no_weight_decay_is_a_warning(self):
        model = LitHparams(decay_rules={"*": {"decay_mult": 2}})
        model.optimizer = lambda groups: torch.optim.SGD(groups, lr=0.1)
        with pytest.warns(UserWarning, match="decay_mult=2, a factor on the weight decay of SGD, which is 0"):
            model.configure_optimizers()

    @pytest.mark.parametrize("kind", ["LBFGS", "Rprop", "SparseAdam"])
    @pytest.mark.parametrize("rules", [RULES, {"*": 0.1}], ids=["groups", "one group"])
    def test_an_optimizer_that_knows_no_weight_decay(self, kind, rules):
        model = LitHparams(decay_rules=rules)
        model.optimizer = getattr(torch.optim, kind)
        with pytest.raises(
            ValueError, match="knows no weight decay, so decay rules cannot work with it; use one such as"
        ):
            model.configure_optimizers()

    def test_other_errors_of_an_optimizer_stay_as_they_are(self):
        model = LitRules()
        model.optimizer = lambda groups: torch.optim.AdamW(groups, lr=-1)
        with pytest.raises(ValueError, match="Invalid learning rate: -1"):
            model.configure_optimizers()

    @pytest.mark.parametrize(
        ("optimizer", "error", "message"),
        [
            ("adamw", TypeError, "self.optimizer must be a callable that takes param groups, .* got 'adamw'"),
            (lambda groups: None, TypeError, "build_optimizer must return a torch.optim.Optimizer, got None"),
        ],
    )
    def test_an_optimizer_that_is_none(self, optimizer, error, message):
        model = LitRules()
        model.optimizer = optimizer
        with pytest.raises(error, match=message):
            model.configure_optimizers()

    def test_a_scheduler_that_is_none(self):
        model = LitRules()
        model.lr_scheduler = "cosine"
        with pytest.raises(TypeError, match=r"self\.lr_scheduler must be a callable .* got 'cosine'"):
            model.configure_optimizers()

    def test_an_optimizer_that_forgets_the_groups(self):
        class Lit(LitRules):
            def build_optimizer(self, param_groups):
                return torch.optim.AdamW(self.parameters())

        with pytest.raises(
            ValueError, match=r"AdamW was not built over the decay groups .*'bias', 'norm', 'head', 'rest'"
        ):
            Lit().configure_optimizers()

    def test_an_option_that_the_optimizer_does_not_know(self):
        model = LitHparams(decay_rules={"head.*": {"weight_decay": 0.1, "options": {"momentun": 0.9}}})
        model.optimizer = lambda groups: torch.optim.SGD(groups, lr=0.1)
        with pytest.raises(
            ValueError,
            match=r"group 'head' has the option 'momentun', .* did you mean 'momentum'\?",
        ):
            model.configure_optimizers()


class TestTraining:
    @pytest.mark.parametrize(
        "build",
        [
            lambda groups: torch.optim.AdamW(groups, lr=1e-2),
            lambda groups: torch.optim.Adam(groups, lr=1e-2),
            lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        ],
        ids=["AdamW", "Adam", "SGD"],
    )
    def test_is_bit_for_bit_that_of_groups_written_by_hand(self, build):
        class ByHand(LitBase):
            def configure_optimizers(self):
                decay = {"head.weight": 1e-3, "body.weight": 0.05, "norm.weight": 0.01}
                biases = [p for name, p in self.named_parameters() if name.endswith("bias")]
                groups = [{"params": [p], "weight_decay": decay[n]} for n, p in self.named_parameters() if n in decay]
                return build([{"params": biases, "weight_decay": 0.0}, *groups])

        class WithRules(LitRules):
            def build_optimizer(self, param_groups):
                return build(param_groups)

        runs = [WithRules(), ByHand()]
        for model in runs:
            trainer(max_epochs=10).fit(model)
        assert all(map(torch.equal, runs[0].parameters(), runs[1].parameters()))

    @pytest.mark.parametrize("watched", [False, True])
    def test_with_pytorch_lightning_modules_and_trainer(self, watched):
        if watched and Version(pl.__version__) < Version("2.6"):
            pytest.skip("pytorch_lightning before 2.6 takes no callback of lightning.pytorch")

        class Lit(WeightDecayMixin, pl.LightningModule):
            decay_rules = RULES

            def __init__(self, lr=0.01):
                super().__init__()
                self.save_hyperparameters()
                net = Net()
                self.body, self.norm, self.head = net.body, net.norm, net.head

            training_step = LitBase.training_step

        model = Lit()
        run = pl.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            callbacks=[WeightDecayMonitor()] if watched else [],
        )
        run.fit(model, digits_loader())
        assert strengths(run.optimizers[0]) == {"bias": 0.0, "norm": 0.01, "head": 1e-3, "rest": 0.05}
        if watched:
            truth = float64_norm([model.head.weight])
            assert run.callback_metrics["decay/head/l2_norm"].item() == pytest.approx(truth, rel=1e-6)

    def test_with_the_learning_rate_finder(self, tmp_path):
        model = LitHparams(decay_rules=RULES)
        run = trainer(max_epochs=10, callbacks=[WeightDecayMonitor()], default_root_dir=tmp_path)
        finder = Tuner(run).lr_find(model, num_training=30, update_attr=True)
        assert finder.suggestion() == model.hparams.lr != 1e-3
        run.fit(model)
        assert {group["lr"] for group in run.optimizers[0].param_groups} == {model.hparams.lr}
        assert strengths(run.optimizers[0])["rest"] == 0.05

    def test_learning_rate_monitor_shows_the_names(self, tmp_path):
        callback = LearningRateMonitor()
        trainer(callbacks=[callback], logger=CSVLogger(tmp_path)).fit(LitRules())
        assert set(callback.lrs) == {f"lr-AdamW/{name}" for name in ("bias", "norm", "head", "rest")}

    def test_warnings_come_once(self):
        class Lit(LitRules):
            decay_rules = {"*.bais": 0.0, "*": 0.1}
            decay_strict = False

        with pytest.warns(UserWarning, match="takes nothing") as caught:
            trainer(callbacks=[WeightDecayMonitor()]).fit(Lit())
        assert sum("takes nothing" in str(w.message) for w in caught) == 1

    @pytest.mark.filterwarnings("ignore")
    def test_models_can_still_be_scripted(self):
        class Scriptable(LitRules):
            def forward(self, pixels):
                return self.head(self.norm(self.body(pixels)))

        model = Scriptable()
        if not hasattr(model, "to_torchscript"):
            pytest.skip("lightning has no to_torchscript from 2.8 on")
        pixels = torch.rand(3, 64)
        assert torch.equal(model.to_torchscript()(pixels), model.eval()(pixels))

    def test_an_optimizer_can_be_copied_and_pickled(self):
        optimizer = LitRules().configure_optimizers()
        for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert strengths(copied) == strengths(optimizer)

    def test_param_groups_carry_names(self):
        optimizer = LitRules().configure_optimizers()
        assert optimizer.param_groups[0]["decay_params"] == ["body.bias", "norm.bias", "head.bias"]
        assert groups_in_force(optimizer)[0]["param_names"] == ["body.bias", "norm.bias", "head.bias"]

    def test_resumes_with_its_param_group_names(self, tmp_path):
        run = trainer(enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path, save_last=True)])
        run.fit(LitRules())
        again = trainer(max_epochs=2)
        again.fit(LitRules(), ckpt_path=tmp_path / "last.ckpt")
        straight = LitRules()
        trainer(max_epochs=2).fit(straight)
        assert all(map(torch.equal, again.lightning_module.parameters(), straight.parameters()))


class TestReplacedOnTheInstance:
    """As LightningCLI replaces ``configure_optimizers``, for one."""

    FORMS = [
        lambda optimizer: optimizer,
        lambda optimizer: [optimizer],
        lambda optimizer: ([optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]),
        lambda optimizer: {"optimizer": optimizer},
        lambda optimizer: ({"optimizer": optimizer},),
    ]

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("names", [False, True])
    def test_the_rules_are_in_force_in_an_optimizer_over_other_groups(self, form, names):
        model = LitRules()
        params = model.named_parameters if names else model.parameters
        model.configure_optimizers = lambda: form(torch.optim.SGD(params(), lr=0.1))
        run = trainer()
        run.fit(model)
        assert len(run.optimizers[0].param_groups) == 1
        assert strengths(run.optimizers[0]) == {"bias": 0.0, "norm": 0.01, "head": 1e-3, "rest": 0.05}

    @pytest.mark.parametrize("form", FORMS)
    def test_an_optimizer_over_the_decay_groups_is_welcome(self, form):
        model = LitRules()
        model.configure_optimizers = lambda: form(LitRules.configure_optimizers(model))
        run = trainer()
        run.fit(model)
        run.fit_loop.max_epochs = 2
        run.fit(model)
        assert strengths(run.optimizers[0]) == {"bias": 0.0, "norm": 0.01, "head": 1e-3, "rest": 0.05}

    def test_evaluation_needs_no_optimizer(self):
        model = LitRules()
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.1)
        trainer().validate(model, digits_loader(), verbose=False)

    def test_in_a_module_of_pytorch_lightning(self):
        class Lit(WeightDecayMixin, pl.LightningModule):
            decay_rules = {"*": 0.1}

            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(64, 10)

            def training_step(self, batch, batch_idx):
                return nn.functional.cross_entropy(self.fc(batch[0]), batch[1])

        model = Lit()
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.1)
        run = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
        run.fit(model, digits_loader())
        assert strengths(run.optimizers[0]) == {"rest": 0.1}

    def test_a_copy_of_the_module_has_one_of_its_own(self):
        model = LitRules()
        model.configure_optimizers = functools.partial(LitRules.configure_optimizers, model)
        trainer().fit(model)
        copied = copy.deepcopy(model)
        optimizer = copied.configure_optimizers()
        assert {p for group in optimizer.param_groups for p in group["params"]} == set(copied.parameters())

    def test_reading_the_trainer_is_lightnings_own_way(self):
        class Sub(LitRules):
            pass

        assert Sub.trainer.fget is LitRules.trainer.fget is L.LightningModule.trainer.fget
        assert Sub.trainer.fset is LitRules.trainer.fset
        with pytest.raises(RuntimeError, match="Sub is not attached to a `Trainer`"):
            _ = Sub().trainer


class TestStoredHyperparameters:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        rules = {
            "no_decay": DecayRule(0.0, modules=[nn.LayerNorm]),
            "*.bias": "1e-5",
            "head": {"params": ["head.*"], "weight_decay": 1e-3},
            "*": 0.05,
        }
        model = LitHparams(lr=0.01, decay_rules=rules)
        run = trainer(logger=CSVLogger(tmp_path, name="", version=""), enable_checkpointing=True)
        run.fit(model)
        run.save_checkpoint(tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt"

    STORED = {
        "no_decay": {"weight_decay": 0.0, "modules": "torch.nn.modules.normalization.LayerNorm"},
        "*.bias": "1e-5",
        "head": {"params": ["head.*"], "weight_decay": 1e-3},
        "*": 0.05,
    }

    def test_hparams_yaml_is_readable(self, checkpoint):
        stored = yaml.safe_load((checkpoint.parent / "hparams.yaml").read_text())
        assert stored == {"lr": 0.01, "decay_rules": shortest_rules(self.STORED)}

    def test_a_checkpoint_loads_with_weights_only_where_the_package_is_not(self, checkpoint):
        code = (
            "import sys; sys.modules['lightning_regdecay'] = None; import torch\n"
            f"print(torch.load({str(checkpoint)!r}, weights_only=True)['hyper_parameters']['decay_rules'])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == str(self.STORED), done.stderr

    def test_load_from_checkpoint_means_the_same(self, checkpoint):
        model = LitHparams.load_from_checkpoint(checkpoint)
        assert members(model.decay_groups) == {
            "no_decay": ["norm.weight", "norm.bias"],
            "bias": ["body.bias", "head.bias"],
            "head": ["head.weight"],
            "rest": ["body.weight"],
        }

    def test_load_from_checkpoint_takes_other_rules(self, checkpoint):
        model = LitHparams.load_from_checkpoint(checkpoint, decay_rules={"*": 0.7})
        assert strengths(model.configure_optimizers()) == {"rest": 0.7}
        assert model.hparams.lr == 0.01

    def test_a_stored_predicate_says_what_to_do(self, tmp_path):
        rules = [DecayRule(0.0, where=lambda n, p, m: p.ndim == 1, group="vectors"), DecayRule(0.1)]
        model = LitHparams(decay_rules=rules)
        run = trainer()
        run.fit(model)
        run.save_checkpoint(tmp_path / "model.ckpt")
        loaded = LitHparams.load_from_checkpoint(tmp_path / "model.ckpt")
        with pytest.raises(TypeError, match="pass the rules with the function again, in code"):
            loaded.configure_optimizers()
        again = LitHparams.load_from_checkpoint(tmp_path / "model.ckpt", decay_rules=rules)
        assert list(members(again.decay_groups)) == ["vectors", "rest"]

    def test_a_config_object_as_hyperparameters(self):
        class Lit(WeightDecayMixin, LitBase):
            def __init__(self, config):
                super().__init__()
                self.save_hyperparameters(config)

        model = Lit({"lr": 0.1, "decay_rules": {"*": DecayRule(0.2)}})
        assert strengths(model.configure_optimizers()) == {"rest": 0.2}
        assert model.hparams.decay_rules == {"*": {"weight_decay": 0.2}}
