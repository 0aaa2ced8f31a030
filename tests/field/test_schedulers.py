"""What people met with lr schedulers of all kinds, theirs and their own, and with λ that follows the lr."""

from __future__ import annotations

import pytest
import torch
from field.fits import (
    EPOCH,
    OWN,
    RULES,
    LitOwn,
    MyAdamW,
    MySGD,
    both_ways,
    fit,
    fitted,
    strengths,
    used,
    used_by_weights,
)
from helpers import LitBase, Net, digits
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR

from lightning_regdecay import apply_decay_rules, build_decay_groups, schedule_weight_decay

SAME = {"*.bias": OWN, "*": OWN}
"""What the optimizers have anyhow, in two groups."""
FOLLOWING = {"*.bias": 0.0, "*": {"schedule": "follow_lr", "start": 0.5}}


class LitTwoGroups(LitBase):
    """With two param groups, and a scheduler that steps after each batch."""

    def build_scheduler(self, optimizer):
        raise NotImplementedError

    def configure_optimizers(self):
        head = {"params": self.head.parameters(), "lr": 0.05}
        optimizer = MyAdamW([{"params": [*self.body.parameters(), *self.norm.parameters()]}, head])
        return [optimizer], [{"scheduler": self.build_scheduler(optimizer), "interval": "step"}]


class Pairs(LRScheduler):
    """Warms up over pairs of two values, start and end, for all groups."""

    def __init__(self, optimizer, betas=(0.85, 0.95), warmup_lr=(0.1, 1.0)):
        self.betas, self.warmup_lr = betas, warmup_lr
        super().__init__(optimizer)

    def get_lr(self):
        part = min(self.last_epoch / (2 * EPOCH), 1.0)
        for group in self.optimizer.param_groups:
            group["betas"] = (self.betas[0] + (self.betas[1] - self.betas[0]) * part, 0.999)
        return [base * (self.warmup_lr[0] + (self.warmup_lr[1] - self.warmup_lr[0]) * part) for base in self.base_lrs]


class Piecewise(LRScheduler):
    """A factor for each stretch of the run."""

    def __init__(self, optimizer, boundaries, values):
        self.boundaries, self.values = boundaries, values
        super().__init__(optimizer)

    def get_lr(self):
        reached = sum(self.last_epoch >= boundary for boundary in self.boundaries)
        return [base * self.values[reached] for base in self.base_lrs]


class LitPairs(LitTwoGroups):
    def build_scheduler(self, optimizer):
        return Pairs(optimizer, betas=(0.85, 0.95), warmup_lr=(0.1, 1.0))


class LitListMadeLate(LitTwoGroups):
    """Its scheduler has a list per group, and a class that is made when it is needed, as with optional packages."""

    def build_scheduler(self, optimizer):
        class Ramp(LRScheduler):
            def __init__(self, optimizer, final_lrs):
                self.final_lrs = final_lrs
                super().__init__(optimizer)

            def get_lr(self):
                part = self.last_epoch / (2 * EPOCH)
                return [base + (final - base) * part for base, final in zip(self.base_lrs, self.final_lrs, strict=True)]

        return Ramp(optimizer, [0.001, 0.1])


class LitListOverTime(LitTwoGroups):
    """Its scheduler has as many values over time as there are param groups."""

    def build_scheduler(self, optimizer):
        return Piecewise(optimizer, [EPOCH], [1.0, 0.1])


class TestInTheirOptimizer:
    @both_ways
    @pytest.mark.parametrize("theirs", [LitPairs, LitListMadeLate, LitListOverTime])
    def test_lists_of_a_users_scheduler(self, way, theirs):
        """A pair, or a list over time, was taken for one value per group; a real one of a late class was not."""
        expected, _ = fitted("without", theirs, None, max_epochs=2)
        model, run = fitted(way, theirs, SAME, max_epochs=2)
        assert all(map(torch.equal, model.parameters(), expected.parameters()))
        model, run = fitted(way, theirs, RULES, max_epochs=2)
        assert used(model, run.optimizers[0]) == [strengths(model, 0.5)] * 2 * EPOCH

    @both_ways
    def test_a_pair_in_a_run_that_began_without_rules(self, way, tmp_path):
        """Resumed with the package, the pair of the checkpoint was to fit the groups of the rules."""
        expected, _ = fitted("without", LitPairs, None, max_epochs=2)
        _, run = fitted("without", LitPairs, None, max_epochs=1)
        run.save_checkpoint(tmp_path / "plain.ckpt")
        model, run = fitted(way, LitPairs, SAME, max_epochs=2, ckpt_path=tmp_path / "plain.ckpt")
        assert all(map(torch.equal, model.parameters(), expected.parameters()))
        assert run.lr_scheduler_configs[0].scheduler.warmup_lr == (0.1, 1.0)

    @both_ways
    def test_an_optimizer_around_another_that_shares_its_dictionaries(self, way):
        """The lr schedule of the outer one, which reached the inner one by the shared groups, no longer did."""

        class Outer(torch.optim.Optimizer):
            def __init__(self, inner):
                self.inner = inner
                super().__init__(inner.param_groups, inner.defaults)

            def step(self, closure=None):
                return self.inner.step(closure)

        class Theirs(LitBase):
            def configure_optimizers(self):
                optimizer = Outer(MySGD(self.parameters(), lr=0.1))
                return [optimizer], [{"scheduler": StepLR(optimizer, 1, gamma=0.1), "interval": "step"}]

        expected, _ = fitted("without", Theirs, None)
        model, _ = fitted(way, Theirs, SAME)
        assert all(map(torch.equal, model.parameters(), expected.parameters()))
        model, run = fitted(way, Theirs, RULES)
        assert used(model, run.optimizers[0].inner) == [strengths(model, 0.5)] * EPOCH
        assert run.optimizers[0].inner.param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**EPOCH)


class TestResumed:
    def test_a_pair_and_rules_in_another_order(self, tmp_path):
        """With two rules and a pair, the pair was turned round together with the rules, in silence."""

        class Lit(LitOwn):
            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                return [optimizer], [{"scheduler": Pairs(optimizer), "interval": "step"}]

        class Turned(Lit):
            decay_rules = {"*.weight": 0.5, "*": 0.0}

        expected = Lit()
        fit(expected, "own", None, max_epochs=2)
        fit(Lit(), "own", None, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
        model = Turned()
        run = fit(model, "own", None, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
        assert run.lr_scheduler_configs[0].scheduler.warmup_lr == (0.1, 1.0)
        assert all(map(torch.equal, model.parameters(), expected.parameters()))

    @pytest.mark.parametrize("rules", [RULES, {"*.bias": 0.0, "head.*": 0.2, "*": 0.5}], ids=["as before", "one more"])
    @pytest.mark.filterwarnings("ignore:.*Detected call of `lr_scheduler.step.*")
    def test_a_scheduler_that_stores_under_names_of_its_own(self, rules, tmp_path):
        """Its state has ``base_lrs``, the object has no such attribute: an AttributeError."""

        class Decreasing:
            def __init__(self, optimizer):
                self.optimizer, self.first, self.count = optimizer, [g["lr"] for g in optimizer.param_groups], 0

            def step(self):
                self.count += 1
                for group, lr in zip(self.optimizer.param_groups, self.first):
                    group["lr"] = lr / (1 + self.count)

            def state_dict(self):
                return {"base_lrs": self.first, "count": self.count}

            def load_state_dict(self, state):
                self.first, self.count = state["base_lrs"], state["count"]

        class Lit(LitOwn):
            def build_lr_scheduler(self, optimizer):
                return Decreasing(optimizer)

            def lr_scheduler_step(self, scheduler, metric):
                scheduler.step()

        fit(Lit(), "own", None, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
        model = Lit()
        model.decay_rules = rules
        run = fit(model, "own", None, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
        assert run.lr_scheduler_configs[0].scheduler.count == 2
        lrs = [group["lr"] for group in run.optimizers[0].param_groups]
        assert lrs[:2] == [pytest.approx(0.01 / 3)] * 2
        assert used_by_weights(model, run.optimizers[0]) == [rules.get("head.*", 0.5)] * EPOCH


class TestFollowed:
    @pytest.mark.parametrize("first", [0.0, 0.2])
    def test_a_warm_up_that_is_made_after_super(self, first):
        """The scheduler is made when ``super().configure_optimizers()`` has returned: its first lr became the peak."""

        class Lit(LitOwn):
            decay_rules = FOLLOWING

            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                warm_up = LambdaLR(optimizer, lambda step: min(first + step / 4, 1.0))
                return [optimizer], [{"scheduler": warm_up, "interval": "step"}]

        model = Lit()
        run = fit(model, "own", None, max_epochs=2)
        expected = [0.5 * min(first + step / 4, 1.0) for step in range(2 * EPOCH)]
        assert used_by_weights(model, run.optimizers[0]) == pytest.approx(expected)

    def test_a_group_that_was_added(self):
        """λ of all parts of an added group but the last followed the lr of the step before."""
        model = Net()
        optimizer = MyAdamW(model.head.parameters())
        rules = {"*.bias": {"schedule": "follow_lr", "start": 1.0}, "*": {"schedule": "follow_lr", "start": 1.0}}
        apply_decay_rules(optimizer, model, rules)
        optimizer.add_param_group({"params": [*model.body.parameters(), *model.norm.parameters()], "lr": 0.1})
        for lr in (0.1, 0.05, 0.025):
            optimizer.param_groups[1]["lr"] = lr
            step_once(model, optimizer)
            step = used(model, optimizer)[-1]
            assert step == pytest.approx({name: 1.0 if name.startswith("head") else lr / 0.1 for name in step})

    def test_sparse_gradients_in_a_first_step_with_lr_zero(self):
        """An embedding with sparse gradients, a warm-up from 0, a schedule: the first step crashed."""
        torch.manual_seed(0)
        model = nn.ModuleDict({"words": nn.Embedding(10, 4, sparse=True), "head": nn.Linear(4, 1)})
        groups = build_decay_groups(model, {"words.*": 0.0, "*": {"schedule": "linear", "start": 1.0, "end": 0.0}})
        optimizer = MySGD(groups.as_param_groups(OWN), lr=0.1)
        scheduler = LambdaLR(optimizer, lambda step: min(step / 2, 1.0))
        schedule_weight_decay(optimizer, total_steps=4)
        before = model["words"].weight.detach().clone()
        for step in range(4):
            optimizer.zero_grad()
            model["head"](model["words"](torch.tensor([1, 2, 2]))).square().mean().backward()
            optimizer.step()
            scheduler.step()
            assert (step == 0) is torch.equal(model["words"].weight, before)
        assert used_by_weights(model, optimizer) == [1.0, 0.75, 0.5, 0.25]


def step_once(model, optimizer):
    pixels, classes = digits(64)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(pixels), classes).backward()
    optimizer.step()
