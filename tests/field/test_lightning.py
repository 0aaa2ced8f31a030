"""What people met with the Trainer, its callbacks, its checkpoints, and fits that follow each other."""

from __future__ import annotations

import threading

import pytest
import torch
from field.fits import (
    EPOCH,
    LINEAR,
    OTHER,
    OWN,
    RULES,
    LitAdamW,
    LitKept,
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
from helpers import LitBase, LitWithBackbone, digits_loader
from lightning.pytorch.callbacks import BackboneFinetuning, BatchSizeFinder, LearningRateFinder, ModelPruning

from lightning_regdecay import DecayRule, WeightDecayMixin

FACTORS = {"*.bias": 0.0, "*": {"decay_mult": 0.5}}
with_own_too = pytest.mark.parametrize("way", ["mixin", "callback", "own"])


class LitTuned(LitBase):
    """With an lr and a batch size that can be searched for."""

    def __init__(self, lr=1e-3, batch_size=64):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return digits_loader(256, self.hparams.batch_size)

    def val_dataloader(self):
        return digits_loader(64, self.hparams.batch_size)

    def configure_optimizers(self):
        return MyAdamW(self.parameters(), lr=self.hparams.lr)


class LitOwnTuned(WeightDecayMixin, LitTuned):
    """The same with an optimizer over the decay groups."""

    decay_rules = LINEAR

    def build_optimizer(self, param_groups):
        return MyAdamW(param_groups, lr=self.hparams.lr)


class LitBackbone(LitWithBackbone):
    """Its optimizer holds what is trainable at first, as Lightning's finetuning wants it."""

    def configure_optimizers(self):
        return MyAdamW([p for p in self.parameters() if p.requires_grad])


class LitOwnBackbone(WeightDecayMixin, LitBackbone):
    decay_rules = RULES

    def build_optimizer(self, param_groups):
        return MyAdamW(param_groups)


def finder(steps=6):
    return LearningRateFinder(1e-4, 1.0, num_training_steps=steps, early_stop_threshold=None)


class FirstEpochFinder(LearningRateFinder):
    """As Lightning's documentation has it: it searches when an epoch starts."""

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            self.lr_find(trainer, pl_module)


class FirstEpochBatchSizeFinder(BatchSizeFinder):
    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            self.scale_batch_size(trainer, pl_module)


class TestFinders:
    """They train before the run, for a length of their own, with an lr of their own."""

    @both_ways
    def test_a_schedule_over_the_run_that_comes_after_a_trial(self, way, tmp_path):
        """With a learning rate finder among the callbacks, λ reached its end in the first epoch."""
        model, run = fitted(way, LitTuned, LINEAR, finder(), max_epochs=2, default_root_dir=tmp_path)
        assert used_by_weights(model, run.optimizers[0])[-2 * EPOCH :] == falling(2 * EPOCH, 2 * EPOCH)

    @both_ways
    def test_a_schedule_in_epochs_whose_length_the_batch_size_finder_changes(self, way, tmp_path):
        """λ went by the number of batches from before the batch size was found."""
        rules = {"*.bias": {**LINEAR["*"], "epochs": 1}, "*": LINEAR["*"]}
        search = BatchSizeFinder(steps_per_trial=2, init_val=32, max_trials=1)
        model, run = fitted(way, LitTuned, rules, search, max_epochs=2, default_root_dir=tmp_path)
        epoch = run.num_training_batches
        assert epoch != EPOCH
        steps = used(model, run.optimizers[0])[-2 * epoch :]
        assert [step["head.weight"] for step in steps] == falling(2 * epoch, 2 * epoch)
        assert [step["head.bias"] for step in steps] == pytest.approx(
            [*(1 - i / epoch for i in range(epoch))] + [0] * epoch
        )

    @pytest.mark.filterwarnings("ignore:.*above the peak.*")  # in the trial
    def test_the_lr_that_was_found_is_the_peak(self, tmp_path):
        """Timescales and λ that follow the lr went by the lr that the model had before the search."""

        class Lit(LitOwnTuned):
            decay_rules = {
                "*.bias": {"schedule": "timescale", "epochs": 2},
                "*": {"schedule": "follow_lr", "start": 0.5},
            }

        model = Lit(batch_size=16)
        run = fit(model, "own", None, finder(steps=20), max_epochs=2, default_root_dir=tmp_path)
        assert model.hparams.lr != 1e-3
        for step in used(model, run.optimizers[0])[-run.global_step :]:
            assert step["head.weight"] == pytest.approx(0.5)
            assert step["head.bias"] == pytest.approx(1 / (model.hparams.lr * run.global_step))

    @with_own_too
    @pytest.mark.parametrize("kind", [FirstEpochFinder, FirstEpochBatchSizeFinder])
    def test_at_the_start_of_an_epoch(self, way, kind, tmp_path):
        """The finders of Lightning's documentation search in ``on_train_epoch_start``: the trial set the length."""
        if kind is FirstEpochFinder:
            search = kind(num_training_steps=6, early_stop_threshold=None)
        else:
            search = kind(steps_per_trial=2, init_val=32, max_trials=1)
        theirs = LitOwnTuned if way == "own" else LitTuned
        model, run = fitted(way, theirs, LINEAR, search, max_epochs=3, default_root_dir=tmp_path)
        steps = run.global_step
        assert used_by_weights(model, run.optimizers[0])[-steps:] == falling(steps, steps)

    @both_ways
    def test_a_trial_that_fails(self, way, tmp_path):
        """Lightning takes all callbacks out for the trial, so nobody could undo the rules when it failed."""

        class Failing(LitKept):
            fails = True

            def __init__(self):
                super().__init__()
                self.lr = 0.01

            def training_step(self, batch, batch_idx):
                if self.fails and batch_idx == 2:
                    raise RuntimeError("out of memory")
                return super().training_step(batch, batch_idx)

        model = with_rules(way, Failing, RULES)
        with pytest.raises(RuntimeError, match="out of memory"):
            fit(model, way, RULES, finder(), default_root_dir=tmp_path)
        model.fails = False
        if way == "mixin":
            model.decay_rules = OTHER
        fit(model, way, OTHER)
        assert used(model, model.kept)[-EPOCH:] == [strengths(model, 0.25)] * EPOCH
        if way == "callback":
            fit(model, "without", None)
            assert used_by_weights(model, model.kept)[-EPOCH:] == [OWN] * EPOCH


class TestFinetuning:
    def test_resumed_without_the_callback(self, tmp_path):
        """When the backbone's lr had reached that of the head, a run without the callback could not go on."""
        thaw = BackboneFinetuning(
            unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 100.0, backbone_initial_ratio_lr=0.1, verbose=False
        )
        run = fit(LitOwnBackbone(), "own", None, thaw, max_epochs=3)
        assert len({group["lr"] for group in run.optimizers[0].param_groups}) == 1
        run.save_checkpoint(tmp_path / "aligned.ckpt")
        model = LitOwnBackbone()
        run = fit(model, "own", None, max_epochs=4, ckpt_path=tmp_path / "aligned.ckpt")
        assert used(model, run.optimizers[0]) == [strengths(model, 0.5)] * EPOCH

    @pytest.mark.parametrize("first", ["one rule", "no rules"])
    @pytest.mark.parametrize(("stop", "goes_on"), [(1, True), (1, False), (3, True)])
    @pytest.mark.filterwarnings("ignore:.*takes frozen parameters only.*")
    def test_resumed_with_a_rule_more(self, first, stop, goes_on, tmp_path):
        """A group of the checkpoint, from before or after the thaw, is cut by rules that it did not know."""

        def thaw():
            return BackboneFinetuning(unfreeze_backbone_at_epoch=2, lambda_func=lambda epoch: 1.0, verbose=False)

        way = "mixin" if first == "one rule" else "without"
        _, run = fitted(way, LitBackbone, {"*": OWN}, thaw(), max_epochs=stop)
        run.save_checkpoint(tmp_path / "before.ckpt")
        model = with_rules("mixin", LitBackbone, RULES)
        model.backbone[0].requires_grad_(goes_on)  # the norm trains from the start
        again = [thaw()] if goes_on else []
        run = fit(model, "mixin", RULES, *again, max_epochs=4, ckpt_path=tmp_path / "before.ckpt")
        steps = used(model, run.optimizers[0])
        assert len(steps) == (4 - stop) * EPOCH
        for number, step in enumerate(steps, start=stop * EPOCH):
            is_thawed = goes_on and number >= 2 * EPOCH
            expected = strengths(model, 0.5)
            assert step == {name: expected[name] for name in expected if is_thawed or "backbone.0" not in name}


class TestFitsThatFollowEachOther:
    @both_ways
    def test_an_optimizer_that_the_model_keeps(self, way):
        """Each fit of a model that keeps its optimizer multiplied λ by the factor once more."""
        model = with_rules(way, LitKept, FACTORS)
        for _ in range(3):
            fit(model, way, FACTORS)
        assert used(model, model.kept) == [strengths(model, 0.5 * OWN)] * 3 * EPOCH

    @pytest.mark.parametrize("kept", ["configure_optimizers", "build_optimizer"])
    def test_an_own_optimizer_that_is_kept(self, kept):
        """The same with an optimizer over the decay groups, kept by the one method or the other."""

        class Lit(WeightDecayMixin, LitBase):
            decay_rules = FACTORS
            held = None

            def build_optimizer(self, param_groups):
                if self.held is None or kept == "configure_optimizers":
                    self.held = MyAdamW(param_groups)
                return self.held

            def configure_optimizers(self):
                if self.held is None or kept == "build_optimizer":
                    return super().configure_optimizers()
                return self.held

        model = Lit()
        for _ in range(3):
            fit(model, "own", None)
        assert used(model, model.held) == [strengths(model, 0.5 * OWN)] * 3 * EPOCH

    def test_a_fit_that_failed_and_one_without_rules(self):
        """A notebook: out of memory, fit again; then without the callback, in which the old rules lived on."""

        class Failing(LitKept):
            fails = True

            def on_train_batch_end(self, outputs, batch, batch_idx):
                if self.fails and batch_idx == 1:
                    raise RuntimeError("out of memory")

        model = Failing()
        with pytest.raises(RuntimeError, match="out of memory"):
            fit(model, "callback", FACTORS)
        model.fails = False
        fit(model, "callback", FACTORS)
        fit(model, "without", None)
        assert used_by_weights(model, model.kept) == [0.5 * OWN] * (2 + EPOCH) + [OWN] * EPOCH

    @both_ways
    def test_an_optimizer_that_notes_something_after_each_fit(self, way):
        """When its list was as long as its param groups by chance, the next fit refused it as one by number."""

        class Noting(LitKept):
            def __init__(self):
                super().__init__()
                self.kept.losses = []

            def on_train_end(self):
                self.kept.losses.append(float(self.trainer.callback_metrics["train_loss"]))

        model = with_rules(way, Noting, RULES)
        for _ in range(3):
            fit(model, way, RULES)
        assert used(model, model.kept) == [strengths(model, 0.5)] * 3 * EPOCH

    def test_rules_that_were_wrong_at_first(self):
        """Rules with an option that the optimizer has not left the optimizer without its parameters."""
        wrong = {"*.bias": {"weight_decay": 0.0, "options": {"momentum": 0.9}}, "*": 0.5}
        model = with_rules("mixin", LitKept, wrong)
        groups, before = list(model.kept.param_groups), [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match="has the options 'momentum'"):
            fit(model, "mixin", wrong)
        assert all(map(torch.equal, before, model.parameters()))
        assert all(one is other for one, other in zip(model.kept.param_groups, groups))
        model.decay_rules = RULES
        fit(model, "mixin", RULES)
        assert used(model, model.kept) == [strengths(model, 0.5)] * EPOCH

    def test_hyperparameters_saved_by_parent_and_child(self):
        """The second ``save_hyperparameters`` put the name of a predicate in the place of the predicate."""

        class Parent(WeightDecayMixin, LitAdamW):
            def __init__(self, lr=1e-3, decay_rules=None):
                super().__init__()
                self.save_hyperparameters()

        class Child(Parent):
            def __init__(self, dropout=0.1):
                flat = DecayRule(0.0, where=lambda name, parameter, module: parameter.ndim < 2, group="flat")
                super().__init__(decay_rules=[flat, DecayRule(0.3)])
                self.save_hyperparameters("dropout")

        model = Child()
        run = fit(model, "own", None)
        expected = {name: 0.3 if p.ndim == 2 else 0.0 for name, p in model.named_parameters()}
        assert used(model, run.optimizers[0]) == [expected] * EPOCH


class TestResuming:
    @both_ways
    def test_rules_away_and_back(self, way, tmp_path):
        """One epoch under a schedule, one without rules, then the schedule again: the old count was believed."""
        for epochs, rules in ((1, LINEAR), (2, None), (4, LINEAR)):
            model = with_rules(way if rules else "without", LitAdamW, rules)
            path = tmp_path / f"{epochs // 2}.ckpt" if epochs > 1 else None
            run = fit(model, way if rules else "without", rules, max_epochs=epochs, ckpt_path=path)
            run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        assert used_by_weights(model, run.optimizers[0]) == falling(2 * EPOCH, 4 * EPOCH)

    def test_with_another_lr_in_the_code(self, tmp_path):
        """The lr of the checkpoint goes on, and λ that follows it went by the peak of the code."""

        class Lit(LitOwnTuned):
            decay_rules = {"*": {"schedule": "follow_lr", "start": 0.5}}

        fit(Lit(lr=0.01), "own", None).save_checkpoint(tmp_path / "one.ckpt")
        model = Lit(lr=0.1)
        run = fit(model, "own", None, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
        assert run.optimizers[0].param_groups[0]["lr"] == 0.01
        assert used_by_weights(model, run.optimizers[0]) == [0.5] * EPOCH


@both_ways
def test_pruning_keeps_biases_free_of_decay(way):
    """ModelPruning puts ``bias_orig`` in the place of ``bias``, which no pattern for biases took."""
    model, run = fitted(way, LitAdamW, RULES, ModelPruning("l1_unstructured", amount=0.3), max_epochs=2)
    assert used(model, run.optimizers[0]) == [strengths(model, 0.5)] * 2 * EPOCH


def test_two_threads():
    """Two studies of a search in one process: each fit goes by its own rules."""
    models = {strength: [LitKept() for _ in range(3)] for strength in (0.3, 0.7)}
    errors = []

    def study(strength):
        try:
            for model in models[strength]:
                fit(model, "callback", {"*.bias": 0.0, "*": strength})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=study, args=(strength,)) for strength in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for strength, fitted_models in models.items():
        for model in fitted_models:
            assert used(model, model.kept) == [strengths(model, strength)] * EPOCH
