"""Resuming: every parameter goes on with its own state, whatever became of the groups."""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import logging
import pickle
import re
import signal
from pathlib import Path

import pytest
import torch
from helpers import LitBase, LitHparams, Net, digits, run_python, trainer
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed import checkpoint as dist_checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lightning_regdecay import DecayRule, WeightDecayMonitor, build_decay_groups, resume_by_name, schedule_weight_decay

schedulers = torch.optim.lr_scheduler

TWO_GROUPS = {"*.bias": {"weight_decay": 0.1, "options": {"lr": 0.02}}, "*": {"weight_decay": 0.1}}
# The same λ and lr for every parameter, in other groups.
SAME_IN_OTHER_GROUPS = {
    "head": {"params": "head.weight", "weight_decay": 0.1},
    "first": {"params": ["body.bias", "norm.bias"], "weight_decay": 0.1, "options": {"lr": 0.02}},
    "*weight": 0.1,
    "last": {"params": "head.bias", "weight_decay": 0.1, "options": {"lr": 0.02}},
}
# The same two groups, the other one first.
OTHER_WAY_ROUND = {"*weight": 0.1, "*": {"weight_decay": 0.1, "options": {"lr": 0.02}}}
OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "AMSGrad": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    "SGD without momentum": lambda groups: torch.optim.SGD(groups, lr=0.01),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5),
}
SCHEDULERS = {
    "StepLR": lambda o: schedulers.StepLR(o, step_size=3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, milestones=[2, 7]),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=12),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=11, power=2),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.95**step),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.95),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(
        o, max_lr=[2 * group["lr"] for group in o.param_groups], total_steps=20, cycle_momentum=False
    ),
    "CyclicLR": lambda o: schedulers.CyclicLR(
        o,
        base_lr=[group["lr"] / 10 for group in o.param_groups],
        max_lr=[group["lr"] for group in o.param_groups],
        step_size_up=4,
        cycle_momentum=False,
    ),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, total_iters=3), schedulers.CosineAnnealingLR(o, T_max=9)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, total_iters=3), schedulers.ExponentialLR(o, gamma=0.9)], optimizer=o
    ),
    "SequentialLR inside ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [SCHEDULERS["SequentialLR"](o), schedulers.ExponentialLR(o, gamma=0.9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=10.0),
}


class Run:
    """A training in plain PyTorch that can be stopped and gone on with."""

    def __init__(self, rules, build=OPTIMIZERS["AdamW"], scheduler=None, **options):
        torch.manual_seed(0)
        self.net = Net()
        self.groups = build_decay_groups(self.net, rules)
        self.optimizer = build([group.as_param_group() for group in self.groups])
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        schedule_weight_decay(self.optimizer, total_steps=12)
        resume_by_name(self.optimizer, self.net, lr_scheduler=self.scheduler, **options)

    def train(self, steps, first=0):
        pixels, classes = digits(256)
        for step in range(first, first + steps):
            part = slice(20 * step, 20 * step + 20)
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.net(pixels[part]), classes[part])
            loss.backward()
            self.optimizer.step()
            if isinstance(self.scheduler, schedulers.ReduceLROnPlateau):
                self.scheduler.step(loss.item())
            elif self.scheduler is not None:
                self.scheduler.step()
        return self

    def checkpoint(self):
        file = io.BytesIO()
        scheduler = self.scheduler.state_dict() if self.scheduler is not None else None
        torch.save((self.net.state_dict(), self.optimizer.state_dict(), scheduler), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, checkpoint):
        weights, optimizer, scheduler = checkpoint
        self.net.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(scheduler)
        return self

    def group(self, name):
        return next(group for group in self.optimizer.param_groups if group["name"] == name)

    def state_of(self, name):
        return self.optimizer.state.get(self.net.get_parameter(name), {})


class Slow(torch.optim.Optimizer):
    """Lookahead (Zhang et al. 2019) as it is published: around another, with slow weights by number in the state."""

    def __init__(self, groups):
        self.fast = OPTIMIZERS["AdamW"](groups)
        self.param_groups, self.defaults = self.fast.param_groups, self.fast.defaults
        self.state = collections.defaultdict(dict)

    def parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    def zero_grad(self):
        self.fast.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.fast.step(closure)
        for parameter in self.parameters():
            slow = self.state[parameter].setdefault("slow", parameter.clone())
            parameter.copy_(slow.lerp_(parameter, 0.5))
        return loss

    def state_dict(self):
        slow = {number: self.state[p] for number, p in enumerate(self.parameters()) if p in self.state}
        fast = self.fast.state_dict()
        return {"fast": fast["state"], "slow": slow, "param_groups": fast["param_groups"]}

    def load_state_dict(self, state_dict):
        self.fast.load_state_dict({"state": state_dict["fast"], "param_groups": state_dict["param_groups"]})
        self.param_groups = self.fast.param_groups
        for number, parameter in enumerate(self.parameters()):
            self.state[parameter] = state_dict["slow"].get(number, {})


def assert_same_weights(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        assert torch.equal(p, q), name


def assert_same_state(run, before, names):
    for name in names:
        state, expected = run.state_of(name), before.state_of(name)
        assert state.keys() == expected.keys()
        for key, value in state.items():
            assert torch.equal(value, expected[key]) if isinstance(value, torch.Tensor) else value == expected[key]


@pytest.fixture
def log(caplog):
    """What was logged for the user, in lines."""
    caplog.set_level(logging.INFO)
    logging.getLogger("lightning.fabric").addHandler(caplog.handler)
    logging.getLogger("lightning_utilities").setLevel(logging.INFO)
    yield lambda: [record.getMessage() for record in caplog.records]
    logging.getLogger("lightning.fabric").removeHandler(caplog.handler)


class TestOtherGroups:
    """The same λ and lr of every parameter, in groups that were split, joined, renamed and reordered."""

    @pytest.mark.parametrize("kind", OPTIMIZERS)
    def test_goes_on_bit_for_bit_with_any_optimizer(self, kind):
        whole = Run(TWO_GROUPS, OPTIMIZERS[kind]).train(10)
        first = Run(TWO_GROUPS, OPTIMIZERS[kind]).train(5)
        second = Run(SAME_IN_OTHER_GROUPS, OPTIMIZERS[kind]).load(first.checkpoint()).train(5, first=5)
        assert_same_weights(second.net, whole.net)
        assert len(second.optimizer.param_groups) == 4

    def test_goes_on_with_an_optimizer_that_loads_its_state_by_itself(self):
        class Own(torch.optim.AdamW):
            """Runs no hooks, as that of bitsandbytes."""

            def load_state_dict(self, state_dict):
                ids = [number for group in state_dict["param_groups"] for number in group["params"]]
                parameters = [p for group in self.param_groups for p in group["params"]]
                assert len(ids) == len(parameters)
                state = {p: dict(state_dict["state"][number]) for number, p in zip(ids, parameters)}
                groups = [
                    {**new, "params": old["params"]} for new, old in zip(state_dict["param_groups"], self.param_groups)
                ]
                self.__setstate__({"state": collections.defaultdict(dict, state), "param_groups": groups})

        def build(groups):
            return Own(groups, lr=0.01)

        whole = Run(TWO_GROUPS, build).train(10)
        first = Run(TWO_GROUPS, build).train(5)
        second = Run(SAME_IN_OTHER_GROUPS, build).load(first.checkpoint()).train(5, first=5)
        assert_same_weights(second.net, whole.net)

    def test_an_optimizer_around_one_numbers_the_same_parameters_or_does_not_go_on(self):
        first = Run(TWO_GROUPS, Slow).train(4)
        checkpoint = first.checkpoint()
        same, other = Run(TWO_GROUPS, Slow).load(checkpoint), Run(OTHER_WAY_ROUND, Slow)
        assert_same_weights(same.train(4, first=4).net, first.train(4, first=4).net)
        before = copy.deepcopy(other.optimizer.state_dict())
        with pytest.raises(ValueError, match="Slow keeps a state beside that of its AdamW, by the numbers of the para"):
            other.optimizer.load_state_dict(checkpoint[1])
        assert other.optimizer.state_dict() == before
        assert not other.optimizer.state

    def test_an_optimizer_that_takes_no_hooks(self):
        class Bare(torch.optim.Optimizer):
            def __init__(self, params):
                self.param_groups, self.state, self.defaults = params, {}, {"weight_decay": 0.0}

        net = Net()
        (group,) = build_decay_groups(net, {"*": 0.1})
        with pytest.raises(
            TypeError, match=r"Bare does not call torch\.optim\.Optimizer\.__init__, so it takes no hooks"
        ):
            resume_by_name(Bare([group.as_param_group()]), net)

    @pytest.mark.parametrize("kind", SCHEDULERS)
    @pytest.mark.parametrize("rules", [(TWO_GROUPS, SAME_IN_OTHER_GROUPS), (SAME_IN_OTHER_GROUPS, TWO_GROUPS)])
    def test_goes_on_bit_for_bit_with_any_scheduler(self, kind, rules):
        before, today = rules
        build, scheduler = OPTIMIZERS["SGD"], SCHEDULERS[kind]
        whole = Run(before, build, scheduler).train(10)
        first = Run(before, build, scheduler).train(5)
        second = Run(today, build, scheduler).load(first.checkpoint()).train(5, first=5)
        assert_same_weights(second.net, whole.net)
        by_name = {name: group["lr"] for group in second.optimizer.param_groups for name in group["decay_params"]}
        assert all(
            group["lr"] == by_name[name] for group in whole.optimizer.param_groups for name in group["decay_params"]
        )

    def test_a_scheduler_with_an_object_per_group(self):
        class Decay:
            def __init__(self, rate):
                self.rate, self.calls = rate, 0

            def __call__(self, step):
                self.calls += 1
                return self.rate**step

        def by_bias(optimizer):
            rates = [0.5 if all("bias" in n for n in g["decay_params"]) else 0.9 for g in optimizer.param_groups]
            return schedulers.LambdaLR(optimizer, [Decay(rate) for rate in rates])

        whole = Run(TWO_GROUPS, scheduler=by_bias).train(10)
        first = Run(TWO_GROUPS, scheduler=by_bias).train(5)
        second = Run(SAME_IN_OTHER_GROUPS, scheduler=by_bias).load(first.checkpoint()).train(5, first=5)
        assert_same_weights(second.net, whole.net)
        assert [decay.calls for decay in second.scheduler.lr_lambdas] == [11] * 4

    def test_a_scheduler_can_be_copied_and_pickled(self):
        run = Run(TWO_GROUPS, scheduler=SCHEDULERS["StepLR"])
        twin = copy.deepcopy(run.scheduler)
        again = pickle.loads(pickle.dumps(run.scheduler))
        run.train(2)
        assert run.scheduler.state_dict()["last_epoch"] == 2
        assert twin.state_dict()["last_epoch"] == again.state_dict()["last_epoch"] == 0
        twin.load_state_dict({**run.scheduler.state_dict(), "last_epoch": 7})
        assert run.scheduler.last_epoch == 2

    def test_an_equal_number_of_groups_in_another_order(self):
        whole = Run(TWO_GROUPS, scheduler=SCHEDULERS["StepLR"]).train(8)
        first = Run(TWO_GROUPS, scheduler=SCHEDULERS["StepLR"]).train(4)
        rules = [DecayRule(0.1, min_ndim=2), DecayRule(0.1, params="norm.weight"), DecayRule(0.1, options={"lr": 0.02})]
        second = Run(rules, scheduler=SCHEDULERS["StepLR"]).load(first.checkpoint()).train(4, first=4)
        assert_same_weights(second.net, whole.net)

    def test_the_scheduler_can_be_saved_again(self):
        first = Run(TWO_GROUPS, scheduler=SCHEDULERS["SequentialLR"]).train(3)
        again = Run(SAME_IN_OTHER_GROUPS, scheduler=SCHEDULERS["SequentialLR"]).load(first.checkpoint())
        fresh = schedulers.StepLR(Run(TWO_GROUPS).optimizer, step_size=3)
        saved = Run(TWO_GROUPS, scheduler=SCHEDULERS["StepLR"]).scheduler.state_dict()
        assert saved.keys() == fresh.state_dict().keys()
        third = Run(TWO_GROUPS, scheduler=SCHEDULERS["SequentialLR"]).load(again.checkpoint())
        assert third.scheduler.get_last_lr() == first.scheduler.get_last_lr()

    def test_parameters_of_other_learning_rates_cannot_join(self):
        first = Run(TWO_GROUPS).train(2)
        second = Run({"*": 0.1})
        before = copy.deepcopy(second.optimizer.state_dict())
        message = "group 'rest' joins parameters whose lr differs in the checkpoint: 0.01 of 'body.weight' and 0.02 of"
        with pytest.raises(ValueError, match=message):
            second.optimizer.load_state_dict(first.checkpoint()[1])
        assert second.optimizer.state_dict() == before


class Nests(schedulers.StepLR):
    """Puts torch's state under a key of its own."""

    def state_dict(self):
        return {"torch": super().state_dict(), "phase": "warm"}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict["torch"])


class Copies(schedulers.StepLR):
    """Saves what it is made of by itself."""

    def state_dict(self):
        return {"attributes": {name: value for name, value in vars(self).items() if name != "optimizer"}}

    def load_state_dict(self, state_dict):
        vars(self).update(state_dict["attributes"])


class Asks(schedulers.StepLR):
    """Takes arguments of its own, and has a key that torch's have for other things."""

    def __init__(self, optimizer, step_size):
        self._schedulers = {"inner": [1, 2]}
        super().__init__(optimizer, step_size)

    def state_dict(self, prefix=""):
        return {prefix + name: value for name, value in super().state_dict().items()}

    def load_state_dict(self, state_dict, strict=True, *, phase=None):
        super().load_state_dict(state_dict)
        self.asked = strict, phase


class TestLRSchedulers:
    """Their state comes before or after the optimizer's, once or again, and is as without us."""

    @pytest.mark.parametrize("kind", SCHEDULERS)
    def test_go_on_bit_for_bit_where_their_state_is_loaded_first(self, kind):
        build, scheduler = OPTIMIZERS["SGD"], SCHEDULERS[kind]
        first, second = (Run(rules, build, scheduler) for rules in (TWO_GROUPS, OTHER_WAY_ROUND))
        weights, optimizer, state = first.train(5).checkpoint()
        second.scheduler.load_state_dict(state)
        second.optimizer.load_state_dict(optimizer)
        second.net.load_state_dict(weights)
        assert_same_weights(second.train(3, first=5).net, first.train(3, first=5).net)
        biases, rest = (group["lr"] for group in first.optimizer.param_groups)
        assert [group["lr"] for group in second.optimizer.param_groups] == [rest, biases]

    @pytest.mark.parametrize("kind", SCHEDULERS)
    def test_take_their_own_state_again_as_it_is(self, kind):
        first = Run(TWO_GROUPS, scheduler=SCHEDULERS[kind]).train(5)
        second = Run(OTHER_WAY_ROUND, scheduler=SCHEDULERS[kind]).load(first.checkpoint())
        before = copy.deepcopy(second.scheduler.state_dict())
        for _ in range(2):
            second.scheduler.load_state_dict(copy.deepcopy(second.scheduler.state_dict()))
        assert second.scheduler.state_dict() == before

    def test_that_have_gone_on_since_stay_where_they_are(self):
        first = Run(TWO_GROUPS, scheduler=SCHEDULERS["StepLR"]).train(3)
        _, optimizer, state = first.checkpoint()
        second = Run(OTHER_WAY_ROUND, scheduler=SCHEDULERS["StepLR"])
        second.scheduler.load_state_dict(state)
        second.train(2)
        second.optimizer.load_state_dict(optimizer)
        assert second.scheduler.last_epoch == 5

    def test_that_were_named_are_not_forgotten_by_a_second_call(self):
        first = Run(TWO_GROUPS, scheduler=SCHEDULERS["LambdaLR"]).train(5)
        second = Run(OTHER_WAY_ROUND, scheduler=SCHEDULERS["LambdaLR"])
        resume_by_name(second.optimizer, second.net)
        second.load(first.checkpoint()).train(3, first=5)
        assert_same_weights(second.net, first.train(3, first=5).net)

    def test_several_of_one_optimizer(self):
        def build(rules):
            run = Run(rules)
            every = [schedulers.StepLR(run.optimizer, 3), schedulers.ExponentialLR(run.optimizer, 0.9)]
            resume_by_name(run.optimizer, run.net, lr_scheduler=every)
            return run, every

        run, every = build(TWO_GROUPS)
        again, others = build(OTHER_WAY_ROUND)
        again.load(run.train(1).checkpoint())
        for one, other in zip(every, others):
            other.load_state_dict(one.state_dict())
        assert [one.base_lrs for one in every] == [[0.02, 0.01]] * 2
        assert [other.base_lrs for other in others] == [[0.01, 0.02]] * 2

    @pytest.mark.parametrize(
        "kind", [Nests, Copies, Asks, *SCHEDULERS.values()], ids=["Nests", "Copies", "Asks", *SCHEDULERS]
    )
    def test_save_what_they_save_without_us(self, kind):
        def saved(*, by_name):
            optimizer = torch.optim.SGD([torch.ones(1)], lr=0.1, momentum=0.9)
            scheduler = kind(optimizer, 3) if isinstance(kind, type) else kind(optimizer)
            if by_name:
                resume_by_name(optimizer, nn.Module(), lr_scheduler=scheduler)
            file = io.BytesIO()
            torch.save(scheduler.state_dict(), file)
            file.seek(0)
            return torch.load(file, weights_only=True)

        assert saved(by_name=True) == saved(by_name=False)

    @pytest.mark.parametrize("kind", [Nests, Copies, Asks])
    def test_of_a_users_class_load_as_that_does(self, kind):
        first = Run(TWO_GROUPS, scheduler=lambda o: kind(o, 3)).train(5)
        second = Run(TWO_GROUPS, scheduler=lambda o: kind(o, 3)).load(first.checkpoint())
        assert second.scheduler.last_epoch == 5
        assert_same_weights(second.train(3, first=5).net, first.train(3, first=5).net)

    def test_of_a_users_class_get_its_arguments(self):
        first = Run(TWO_GROUPS, scheduler=lambda o: Asks(o, 3)).train(5)
        second = Run(OTHER_WAY_ROUND, scheduler=lambda o: Asks(o, 3))
        second.optimizer.load_state_dict(first.checkpoint()[1])
        second.scheduler.load_state_dict(first.checkpoint()[2], False, phase="warm")
        assert second.scheduler.asked == (False, "warm")
        assert second.scheduler.base_lrs == [0.01, 0.02]
        assert second.scheduler._schedulers == {"inner": [1, 2]}
        assert second.scheduler.state_dict(prefix="x.").keys() == {f"x.{key}" for key in second.scheduler.state_dict()}


class TestOtherParameters:
    def test_new_ones_start_without_state_and_are_named(self):
        first = Run({"*": 0.1})
        first.net.head.requires_grad_(False)
        first.optimizer = OPTIMIZERS["AdamW"]([g.as_param_group() for g in build_decay_groups(first.net, {"*": 0.1})])
        first.train(3)
        second = Run({"*.bias": 0.0, "*": 0.2})
        message = "no optimizer state of 'head.bias', 'head.weight': new, or frozen when it was saved"
        with pytest.warns(UserWarning, match=message):
            second.load(first.checkpoint())
        assert_same_state(second, first, ["body.weight", "body.bias", "norm.weight", "norm.bias"])
        assert not second.state_of("head.weight")
        second.train(1)
        assert second.state_of("head.weight")["step"] == 1
        assert second.state_of("body.weight")["step"] == 4

    def test_frozen_ones_are_named(self):
        first = Run({"*": 0.1}).train(3)
        second = Run({"*": 0.1})
        second.net.body.requires_grad_(False)
        groups = build_decay_groups(second.net, {"*": 0.1})
        second.optimizer = OPTIMIZERS["AdamW"]([group.as_param_group() for group in groups])
        resume_by_name(second.optimizer, second.net)
        message = "optimizer state of 'body.bias', 'body.weight' that is not used: gone from the model, or frozen now"
        with pytest.warns(UserWarning, match=message):
            second.load(first.checkpoint())
        assert_same_state(second, first, ["head.weight", "head.bias", "norm.weight", "norm.bias"])

    def test_a_group_of_new_ones_only_joins_the_lr_schedule(self):
        def half(net):
            groups = build_decay_groups(net.body, {"*": 0.1})
            return [dict(group.as_param_group(), decay_params=["body.weight", "body.bias"]) for group in groups]

        net = Net()
        before = torch.optim.SGD(half(net), lr=0.1)
        scheduler = schedulers.LinearLR(before, start_factor=1.0, end_factor=0.0, total_iters=10)
        for _ in range(4):
            before.step()
            scheduler.step()
        head = {"params": [net.head.weight], "lr": 0.5, "name": "head"}
        today = torch.optim.SGD([head, *half(net)], lr=0.1)
        follows = schedulers.LinearLR(today, start_factor=1.0, end_factor=0.0, total_iters=10)
        resume_by_name(today, net, lr_scheduler=follows)
        with pytest.warns(UserWarning, match="no optimizer state of 'head.weight'"):
            today.load_state_dict(before.state_dict())
        follows.load_state_dict(scheduler.state_dict())
        assert [group["lr"] for group in today.param_groups] == pytest.approx([0.3, 0.06])
        assert follows.get_last_lr() == pytest.approx([0.3, 0.06])
        assert follows.base_lrs == [0.5, 0.1]

    @pytest.mark.parametrize("steps", range(1, 40, 6))
    def test_such_a_group_joins_whatever_the_rounding(self, steps):
        net = Net()
        layers = {"body": 0.1, "norm": 0.03}
        groups = [
            {"params": [net.get_submodule(name).weight], "param_names": [f"{name}.weight"], "lr": lr}
            for name, lr in layers.items()
        ]
        before = torch.optim.SGD([dict(group) for group in groups])
        scheduler = schedulers.LambdaLR(before, lambda step: 0.95**step)
        for _ in range(steps):
            before.step()
            scheduler.step()
        today = torch.optim.SGD([*groups, {"params": [net.head.weight], "param_names": ["head.weight"], "lr": 0.01}])
        schedulers.LambdaLR(today, lambda step: 0.95**step)
        resume_by_name(today, net)
        with pytest.warns(UserWarning, match="no optimizer state of 'head.weight'"):
            today.load_state_dict(before.state_dict())
        assert today.param_groups[-1]["lr"] == pytest.approx(0.01 * 0.95**steps)

    def test_or_says_that_it_cannot(self):
        net = Net()
        old = [{"params": [net.body.weight], "param_names": ["body.weight"], "lr": 0.1, "initial_lr": 0.2}]
        old += [{"params": [net.norm.weight], "param_names": ["norm.weight"], "lr": 0.1, "initial_lr": 0.1}]
        new = {
            "params": [net.head.weight],
            "param_names": ["head.weight"],
            "lr": 0.01,
            "initial_lr": 0.01,
            "name": "head",
        }
        today = torch.optim.SGD([*[{**group, "initial_lr": group["lr"]} for group in old], new])
        resume_by_name(today, net)
        with pytest.warns(UserWarning, match="group 'head' has new parameters only, and begins with the lr 0.01"):
            today.load_state_dict(torch.optim.SGD(old).state_dict())

    def test_a_tied_parameter_under_its_other_name(self):
        class Tied(nn.Module):
            def __init__(self, order):
                super().__init__()
                shared = nn.Linear(3, 3)
                for name in order:
                    self.add_module(name, shared)

        def optimizer(order):
            model = Tied(order)
            groups = build_decay_groups(model, {"*": 0.1})
            built = torch.optim.AdamW([group.as_param_group() for group in groups])
            resume_by_name(built, model)
            return model, built

        before, one = optimizer("ab")
        before.a.weight.grad = torch.ones(3, 3)
        one.step()
        after, two = optimizer("ba")
        two.load_state_dict(one.state_dict())
        assert two.state[after.a.weight]["step"] == 1

    def test_parameters_that_were_tied_since(self):
        class Three(nn.Module):
            def __init__(self, names):
                super().__init__()
                for name in names:
                    self.add_module(name, nn.Linear(2, 2, bias=False))

        def optimizer(model):
            (group,) = build_decay_groups(model, {"*": 0.0})
            built = torch.optim.SGD([group.as_param_group()], lr=0.1, momentum=0.9)
            resume_by_name(built, model)
            return built

        before = Three("abc")
        one = optimizer(before)
        for number, parameter in enumerate(before.parameters(), start=1):
            parameter.grad = torch.full((2, 2), float(number))
        one.step()
        after = Three("abcd")
        after.b.weight = after.a.weight
        two = optimizer(after)
        with (
            pytest.warns(UserWarning, match="states of 1 parameters that are tied to others now"),
            pytest.warns(UserWarning, match=r"no optimizer state of 'd\.weight'"),
        ):
            two.load_state_dict(one.state_dict())
        assert torch.equal(two.state[after.a.weight]["momentum_buffer"], torch.full((2, 2), 1.0))
        assert torch.equal(two.state[after.c.weight]["momentum_buffer"], torch.full((2, 2), 3.0))
        assert after.d.weight not in two.state

    def test_a_parameter_of_another_shape(self):
        first = Run({"*": 0.1}).train(1)
        second = Run({"*": 0.1})
        second.net.head = nn.Linear(16, 5)
        second.optimizer = OPTIMIZERS["AdamW"]([g.as_param_group() for g in build_decay_groups(second.net, {"*": 0.1})])
        resume_by_name(second.optimizer, second.net)
        with pytest.raises(
            ValueError, match=re.escape("of 'head.weight' in the checkpoint has the shape (10, 16), the")
        ):
            second.optimizer.load_state_dict(first.checkpoint()[1])
        assert not second.optimizer.state

    @pytest.mark.parametrize("kind", ["AdamW", "AMSGrad", "SGD", "Adafactor", "RMSprop"])
    @pytest.mark.parametrize("size", [(16, 1), (1, 10)])
    def test_a_parameter_of_a_shape_that_only_broadcasts(self, size, kind):
        first, second = Run({"*": 0.1}), Run({"*": 0.1}, OPTIMIZERS[kind])
        first.net.head = nn.Linear(*size, bias=False)
        first.optimizer = OPTIMIZERS[kind](build_decay_groups(first.net, {"*": 0.1}).as_param_groups())
        for parameter in first.net.parameters():
            parameter.grad = torch.ones_like(parameter)
        first.optimizer.step()
        with pytest.raises(ValueError, match=r"of 'head\.weight' in the checkpoint .*, the parameter \(10, 16\)"):
            second.optimizer.load_state_dict(first.checkpoint()[1])
        assert not second.optimizer.state

    FORMS = {
        "one number": [(1,)],
        "one number each": [(), (1,), (1, 1)],
        "the factors of torch's Adafactor": [(10, 1), (1, 16)],
        "the factors of transformers' Adafactor": [(10,), (16,)],
        "whole and something else": [(10, 16), (7,)],
        "flattened": [(160,), (1,)],
    }

    def load_state_of_head(self, shapes):
        """The state of a weight of (10, 16) before and after it was loaded."""
        first, second = Run({"*": 0.1}, OPTIMIZERS["SGD"]), Run({"head.*": 0.1, "*": 0.1}, OPTIMIZERS["SGD"])
        first.optimizer.state[first.net.head.weight] = {str(shape): torch.rand(shape) for shape in shapes}
        second.optimizer.load_state_dict(first.checkpoint()[1])
        return first.state_of("head.weight"), second.state_of("head.weight")

    @pytest.mark.parametrize("shapes", FORMS.values(), ids=FORMS)
    def test_a_state_in_another_form_than_the_parameter_goes_on(self, shapes):
        before, after = self.load_state_of_head(shapes)
        assert list(before) == list(after)
        assert all(torch.equal(before[key], after[key]) for key in before)

    @pytest.mark.parametrize("shapes", [[(10,)], [(1, 16)], [(10, 1)], [(1, 16), (1, 8)], [(10,), (15,)], [(16, 9)]])
    def test_a_state_in_no_form_of_the_parameter_does_not(self, shapes):
        with pytest.raises(ValueError, match=r"of 'head\.weight' in the checkpoint .*, the parameter \(10, 16\)"):
            self.load_state_of_head(shapes)

    @pytest.mark.parametrize("way", [lambda name: f"model.{name}", lambda name: name.removeprefix("net.")])
    def test_names_of_a_part_of_the_model_or_of_one_around_it(self, way):
        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.net = Net()

        first, model = Run({"*": 0.1}).train(2), Outer()
        state = first.checkpoint()[1]
        names = state["param_groups"][0].pop("decay_params")
        state["param_groups"][0]["param_names"] = [way(f"net.{name}") for name in names]
        groups = build_decay_groups(model, {"*.bias": 0.0, "*": 0.1})
        optimizer = torch.optim.AdamW([group.as_param_group() for group in groups], lr=0.01)
        resume_by_name(optimizer, model)
        optimizer.load_state_dict(state)
        expected = first.state_of("body.bias")["exp_avg"]
        assert torch.equal(optimizer.state[model.net.body.bias]["exp_avg"], expected)

    def test_names_of_another_model(self):
        state = Run({"*": 0.1}).train(1).checkpoint()[1]
        state["param_groups"][0]["decay_params"] = [f"layer{i}.w" for i in range(6)]
        today = Run({"*": 0.1})
        with pytest.raises(
            ValueError, match="not one of the parameters that the optimizer state in the checkpoint names"
        ):
            today.optimizer.load_state_dict(state)

    @pytest.mark.parametrize("given", ["one of them", "both"])
    def test_two_models_with_the_same_names(self, given):
        models = [Net(), Net()]
        groups = [group for model in models for group in build_decay_groups(model, {"*": 0.1}).as_param_groups()]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        state = copy.deepcopy(optimizer.state_dict())
        resume_by_name(optimizer, models[0] if given == "one of them" else nn.ModuleList(models))
        message = (
            "holds a parameter 'body.weight' that is not the model's of this name"
            if given == "one of them"
            else "two parameters of the name 'body.weight', so it cannot be told which state is whose; build the groups"
        )
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)

    def test_two_models_in_one_module_have_names_of_their_own(self):
        def build(rules):
            models = nn.ModuleDict({"a": Net(), "b": Net()})
            optimizer = torch.optim.SGD(build_decay_groups(models, rules).as_param_groups(), lr=0.1, momentum=0.9)
            resume_by_name(optimizer, models)
            return models, optimizer

        models, optimizer = build({"*.bias": 0.0, "*": 0.0})
        for number, parameter in enumerate(models.parameters()):
            parameter.grad = torch.full_like(parameter, number)
        optimizer.step()
        others, other = build({"b.*": 0.1, "*": 0.2})
        other.load_state_dict(optimizer.state_dict())
        for number, parameter in enumerate(others.parameters()):
            assert torch.all(other.state[parameter]["momentum_buffer"] == number)

    def test_a_parameter_that_the_model_has_put_another_in_the_place_of(self):
        first, second = Run({"*": 0.1}).train(1), Run({"*.bias": 0.0, "*": 0.1})
        second.net.head.load_state_dict(copy.deepcopy(second.net.head.state_dict()), assign=True)
        before = [dict(group) for group in second.optimizer.param_groups]
        with pytest.raises(ValueError, match=r"holds a parameter 'head\.bias' that is not the model's of this name"):
            second.optimizer.load_state_dict(first.checkpoint()[1])
        assert second.optimizer.param_groups == before
        assert not second.optimizer.state

    def test_names_with_the_prefixes_of_wrappers(self):
        first = Run({"*": 0.1}).train(2)
        checkpoint = first.checkpoint()
        for group in checkpoint[1]["param_groups"]:
            group["decay_params"] = [f"_orig_mod.{name}" for name in group["decay_params"]]
        second = Run({"*.bias": 0.0, "*": 0.1}).load(checkpoint)
        assert_same_state(second, first, ["body.weight", "head.bias"])


class TestOtherStrengths:
    def test_the_rules_win_and_say_so(self, log):
        first = Run({"*.bias": 0.0, "*": 0.1}).train(2)
        second = Run({"*.bias": 0.0, "*": 0.5}).load(first.checkpoint())
        assert [group["weight_decay"] for group in second.optimizer.param_groups] == [0.0, 0.5]
        assert log() == ["weight decay of group 'rest': 0.1 (checkpoint) → 0.5 (rules)"]

    def test_a_group_that_joins_several(self, log):
        first = Run({"*.bias": 0.0, "head.*": 0.2, "*": 0.1}).train(2)
        Run({"*": 0.5}).load(first.checkpoint())
        assert log() == ["weight decay of group 'rest': 0.1 and 0 and 0.2 (checkpoint) → 0.5 (rules)"]

    def test_a_multiple_of_the_optimizers_own(self):
        first = Run({"*": 0.1}).train(1)
        net = Run({"*": 0.1}).net
        (group,) = build_decay_groups(net, {"*": {"decay_mult": 0.5}})
        optimizer = torch.optim.AdamW([group.as_param_group(weight_decay=0.4)], weight_decay=0.4)
        resume_by_name(optimizer, net)
        optimizer.load_state_dict(first.checkpoint()[1])
        assert optimizer.param_groups[0]["weight_decay"] == 0.2

    def test_a_learning_rate_stays_that_of_the_checkpoint_and_says_so(self, log):
        first = Run({"*": 0.1}).train(1)
        second = Run({"*": {"weight_decay": 0.1, "options": {"lr": 0.5}}}).load(first.checkpoint())
        assert second.group("rest")["lr"] == 0.01
        assert log() == ["lr of group 'rest': 0.01 (checkpoint) goes on, 0.5 is configured"]

    def test_a_strength_that_differs_in_the_last_digits_only(self, log):
        first = Run({"*": 0.1}).train(1)
        Run({"*": 0.1000001}).load(first.checkpoint())
        assert log() == ["weight decay of group 'rest': 0.1 (checkpoint) → 0.1 (rules)"]

    def test_other_options_stay_those_of_the_checkpoint_and_say_so(self, log):
        first = Run({"*": 0.1}).train(1)
        second = Run({"*": {"weight_decay": 0.1, "options": {"betas": [0.5, 0.6]}}}).load(first.checkpoint())
        assert second.group("rest")["betas"] == (0.9, 0.999)
        assert log() == ["betas of group 'rest': (0.9, 0.999) (checkpoint) goes on, (0.5, 0.6) is configured"]

    @pytest.mark.parametrize(
        ("before", "today"), [("Adamax", "AdamW"), ("RAdam", "AdamW"), ("AdamW", "RAdam"), ("SGD", "RMSprop")]
    )
    def test_another_optimizer_of_the_same_family(self, before, today):
        first = Run({"*": 0.1}, getattr(torch.optim, before)).train(1)
        with pytest.raises(ValueError, match=f"in the checkpoint is not that of {today}: it "):
            Run({"*": 0.1}, getattr(torch.optim, today)).load(first.checkpoint())

    @pytest.mark.skipif(
        "decoupled_weight_decay" not in torch.optim.AdamW([torch.ones(1)]).defaults, reason="older torch"
    )
    def test_an_optimizer_of_the_other_kind_of_decay(self):
        first = Run({"*": 0.1}, torch.optim.AdamW).train(1)
        with pytest.raises(ValueError, match="is not that of Adam: its decoupled_weight_decay is True"):
            Run({"*": 0.1}, torch.optim.Adam).load(first.checkpoint())

    def test_keys_of_the_users_own_are_no_other_optimizer(self):
        first = Run({"*": 0.1})
        first.optimizer.param_groups[0]["layer"] = 7
        second = Run({"*": 0.1}).load(first.train(1).checkpoint())
        assert second.group("rest")["layer"] == 7

    def test_another_optimizer(self):
        first = Run({"*": 0.1}, OPTIMIZERS["SGD"]).train(1)
        second = Run({"*": 0.1})
        message = (
            "not that of AdamW: it has the options 'dampening', 'momentum', 'nesterov' and it lacks 'amsgrad', 'betas'"
        )
        with pytest.raises(ValueError, match=message):
            second.load(first.checkpoint())


class TestSchedules:
    SCHEDULE = {"schedule": "linear", "start": 0.0, "end": 1.2}

    def test_go_on_where_they_were(self):
        whole = Run({"*": self.SCHEDULE}).train(12)
        first = Run({"*": self.SCHEDULE}).train(5)
        second = Run({"head.*": self.SCHEDULE, "*": self.SCHEDULE}).load(first.checkpoint())
        assert [group["weight_decay"] for group in second.optimizer.param_groups] == pytest.approx([0.5, 0.5])
        assert_same_weights(second.train(7, first=5).net, whole.net)

    def test_the_live_strength_is_there_before_the_first_step(self, tmp_path):
        class Lit(LitHparams):
            def on_train_start(self):
                self.seen = self.optimizers().param_groups[0]["weight_decay"]

        def fit(epochs, **options):
            model = Lit(decay_rules={"*": {"schedule": "linear", "start": 0.0, "end": 1.2, "steps": 12}})
            checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
            run = trainer(max_epochs=epochs, callbacks=[checkpoint], enable_checkpointing=True)
            run.fit(model, **options)
            return model

        fit(1)
        assert fit(2, ckpt_path=tmp_path / "epoch=0.ckpt").seen == pytest.approx(0.4)  # of the fifth step of twelve

    def test_a_new_one_counts_the_steps_of_the_checkpoint(self, log):
        first = Run({"*": 0.1}).train(5)
        second = Run({"*": self.SCHEDULE}).load(first.checkpoint()).train(1, first=5)
        assert second.group("rest")["weight_decay"] == pytest.approx(0.5)
        assert log() == ["weight decay of group 'rest': 0.1 (checkpoint) → linear 0 to 1.2 (rules)"]

    def test_a_new_one_where_the_checkpoint_counts_no_steps(self):
        first = Run({"*": 0.1}, OPTIMIZERS["SGD"]).train(5)
        second = Run({"*": self.SCHEDULE}, OPTIMIZERS["SGD"])
        with pytest.warns(
            UserWarning, match="does not tell how many optimizer steps were done: schedules.* begin anew"
        ):
            second.load(first.checkpoint())

    def test_one_that_is_gone(self, log):
        first = Run({"*": self.SCHEDULE}).train(5)
        second = Run({"*": 0.3}).load(first.checkpoint()).train(1, first=5)
        assert second.group("rest")["weight_decay"] == 0.3
        assert "decay_schedule" not in second.group("rest")
        assert log() == ["weight decay of group 'rest': linear 0 to 1.2 (checkpoint) → 0.3 (rules)"]

    def test_a_peak_that_has_changed(self, log):
        follow = {"schedule": "follow_lr", "start": 0.1, "peak_lr": 0.1}
        first = Run({"*": follow}).train(2)
        second = Run({"*": {**follow, "peak_lr": 1.0}}).load(first.checkpoint())
        assert second.group("rest")["weight_decay"] == pytest.approx(0.001)
        assert log() == [
            "weight decay of group 'rest': follow_lr 0.1 at lr 0.1 (checkpoint) → follow_lr 0.1 at lr 1 (rules)"
        ]


class TestCheckpointsWithoutNames:
    """From before the mixin."""

    def before(self, build_groups, kind="AdamW", steps=3):
        torch.manual_seed(0)
        run = Run({"*": 0.1})
        run.optimizer = OPTIMIZERS[kind](build_groups(run.net))
        return run.train(steps)

    def resumed(self, before):
        return Run({"*.bias": 0.0, "*norm*": 0.0, "*": 0.2}).load(before.checkpoint())

    ORDERS = {
        "one group": lambda net: net.parameters(),
        "part after part": lambda net: [
            {"params": net.body.parameters()},
            {"params": [*net.norm.parameters(), *net.head.parameters()]},
        ],
        "by dimension": lambda net: [
            {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
    }

    @pytest.mark.parametrize("order", ORDERS)
    def test_are_read_in_the_order_of_the_model(self, order, log):
        before = self.before(self.ORDERS[order])
        in_doubt = contextlib.nullcontext()
        if order == "part after part":  # of the norm, or of the body, the biases have the same shape
            text = (
                "group after group ('body.weight' to 'body.bias'; 'norm.weight' to 'head.bias'), but shapes would allow"
            )
            in_doubt = pytest.warns(UserWarning, match=re.escape(text))
        with in_doubt:
            after = self.resumed(before)
        assert_same_state(after, before, [name for name, _ in before.net.named_parameters()])
        told = [line for line in log() if "read in the order of model.parameters()" in line]
        assert len(told) == (order != "part after part")

    def test_with_frozen_parameters_left_out_or_not(self):
        def trainable(net):
            net.body.requires_grad_(False)
            return [p for p in net.parameters() if p.requires_grad]

        def everything(net):
            net.body.requires_grad_(False)
            return net.parameters()

        for build in (trainable, everything):
            before = self.before(build)
            after = Run({"*": 0.2})
            after.net.body.requires_grad_(False)
            after.optimizer = OPTIMIZERS["AdamW"](
                [g.as_param_group() for g in build_decay_groups(after.net, {"*": 0.2})]
            )
            resume_by_name(after.optimizer, after.net)
            after.load(before.checkpoint())
            assert_same_state(after, before, ["norm.weight", "norm.bias", "head.weight", "head.bias"])

    def test_groups_that_fit_in_several_ways(self):
        def weights_and_biases(net):  # of the norm, both have the same shape
            names = dict(net.named_parameters())
            return [{"params": [p for n, p in names.items() if n.endswith(end)]} for end in ("weight", "bias")]

        with pytest.raises(ValueError, match="in no way, or in several; write the names into the checkpoint"):
            self.resumed(self.before(weights_and_biases))

    def test_that_can_be_given_names(self):
        def in_an_order_of_their_own(net):
            return [{"params": [net.norm.bias, net.norm.weight]}, {"params": [net.head.bias, net.head.weight]}]

        before = self.before(in_an_order_of_their_own)
        checkpoint = before.checkpoint()
        checkpoint[1]["param_groups"][0]["param_names"] = ["norm.bias", "norm.weight"]
        checkpoint[1]["param_groups"][1]["param_names"] = ["head.bias", "head.weight"]
        with pytest.warns(UserWarning, match="no optimizer state of 'body.bias', 'body.weight'"):
            after = Run({"*": 0.2}).load(checkpoint)
        assert_same_state(after, before, ["norm.bias", "head.weight"])

    @pytest.mark.parametrize("nameless", [[0], [1], [2], [3], [0, 3]])
    def test_of_some_groups_only(self, nameless):
        first = Run(SAME_IN_OTHER_GROUPS).train(5)
        checkpoint = first.checkpoint()
        for number in nameless:
            del checkpoint[1]["param_groups"][number]["decay_params"]
        second = Run(TWO_GROUPS).load(checkpoint).train(3, first=5)
        assert_same_weights(second.net, first.train(3, first=5).net)

    def test_of_some_groups_only_that_fit_in_several_ways(self):
        checkpoint = Run(SAME_IN_OTHER_GROUPS).train(1).checkpoint()
        for group in checkpoint[1]["param_groups"][1:]:  # of which the norm's have the shape of the body's bias
            del group["decay_params"]
        with pytest.raises(ValueError, match=r"its 5 parameters in 3 groups fit the 5 .* in no way, or in several"):
            Run(TWO_GROUPS).load(checkpoint)

    @pytest.mark.filterwarnings("error")
    def test_of_a_group_beside_the_named_ones_in_another_order(self):
        first = Run({"*": 0.1})
        net, names = first.net, [name for name, _ in first.net.named_parameters()]
        nameless = [name for name in names if not name.startswith("norm")]
        named = {"params": [net.norm.bias, net.norm.weight], "decay_params": ["norm.bias", "norm.weight"]}
        first.optimizer = OPTIMIZERS["AdamW"]([named, {"params": [net.get_parameter(name) for name in nameless]}])
        second = Run({"*.bias": 0.0, "*": 0.2}).load(first.train(2).checkpoint())
        assert_same_state(second, first, names)

    def test_of_many_groups_are_told_in_few_words(self):
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(200)))
        before = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1, momentum=0.9)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before.step()
        today = torch.optim.SGD(build_decay_groups(model, {"*": 0.1}).as_param_groups(), lr=0.1, momentum=0.9)
        resume_by_name(today, model)
        with pytest.warns(UserWarning, match=r"'0\.weight' to '0\.weight'; .* and \d+ more\), but shapes") as caught:
            today.load_state_dict(before.state_dict())
        assert max(len(str(warning.message)) for warning in caught) < 2000

    def test_of_another_model(self):
        before = self.before(lambda net: net.head.parameters())
        with pytest.raises(
            ValueError, match=re.escape("its 2 parameters in 1 groups fit the 6 of the model (6 trainable)")
        ):
            self.resumed(before)

    def test_without_state_only_equal_options_are_unambiguous(self):
        def apart(net):
            return [
                {"params": net.body.parameters(), "lr": 0.1},
                {"params": [*net.norm.parameters(), *net.head.parameters()]},
            ]

        before = self.before(apart, "SGD without momentum")
        after = Run({"*.bias": 0.0, "*": 0.2}, OPTIMIZERS["SGD without momentum"])
        with pytest.raises(ValueError, match="in no way, or in several"):
            after.load(before.checkpoint())


class TestPlainPytorch:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((None, nn.Linear(1, 1)), "optimizer must be an optimizer, .* got an object of type NoneType"),
            ((torch.optim.SGD([torch.ones(1)]), None), "model must be a torch.nn.Module, got NoneType"),
            ((torch.optim.SGD([torch.ones(1)]), nn.Linear(1, 1), "x"), "lr_scheduler must be an lr scheduler, .* str"),
        ],
    )
    def test_arguments_of_another_kind(self, arguments, message):
        optimizer, model, *lr_scheduler = arguments
        with pytest.raises(TypeError, match=message):
            resume_by_name(optimizer, model, lr_scheduler=lr_scheduler)

    def test_a_scheduler_needs_the_optimizer_first(self):
        first = Run(TWO_GROUPS, scheduler=SCHEDULERS["StepLR"]).train(2)
        second = Run({"*": 0.1}, scheduler=SCHEDULERS["StepLR"])
        with pytest.raises(
            ValueError, match="is of 2 param groups, today there are 1; load the state of the optimizer first"
        ):
            second.scheduler.load_state_dict(first.checkpoint()[2])

    @pytest.mark.parametrize("rules", [SAME_IN_OTHER_GROUPS, OTHER_WAY_ROUND], ids=["other groups", "other way round"])
    @pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
    def test_torch_distributed_checkpoint(self, flat, rules, tmp_path):
        options = {"options": StateDictOptions(flatten_optimizer_state_dict=flat)}
        first = Run(TWO_GROUPS).train(4)
        state = get_optimizer_state_dict(first.net, first.optimizer, **options)
        dist_checkpoint.save({"optim": state}, checkpoint_id=tmp_path)
        second = Run(rules, checkpoint=tmp_path)
        second.net.load_state_dict(first.net.state_dict())
        state = {"optim": get_optimizer_state_dict(second.net, second.optimizer, **options)}
        dist_checkpoint.load(state, checkpoint_id=tmp_path)
        set_optimizer_state_dict(second.net, second.optimizer, state["optim"], **options)
        assert_same_weights(second.train(4, first=4).net, first.train(4, first=4).net)
        assert [group["lr"] for group in second.optimizer.param_groups] == [0.01, 0.02] * (len(rules) // 2)
        # What is saved from now on has the groups of today.
        assert len(get_optimizer_state_dict(second.net, second.optimizer)["param_groups"]) == len(rules)

    def test_torch_distributed_checkpoint_without_a_parameter(self, tmp_path):
        first = Run(TWO_GROUPS)
        first.net.head.requires_grad_(False)
        groups = build_decay_groups(first.net, {"*": 0.1})
        first.optimizer = OPTIMIZERS["AdamW"]([group.as_param_group() for group in groups])
        first.train(1)
        dist_checkpoint.save({"optim": get_optimizer_state_dict(first.net, first.optimizer)}, checkpoint_id=tmp_path)
        second = Run({"*": 0.1}, checkpoint=tmp_path)
        with pytest.raises(ValueError, match=r"the checkpoint has no optimizer state of 'head\.bias', 'head\.weight'"):
            get_optimizer_state_dict(second.net, second.optimizer)

    def test_fabric(self, tmp_path):
        fabric = Fabric(accelerator="cpu", devices=1)

        def setup(rules):
            torch.manual_seed(0)
            module = LitHparams(decay_rules=rules)
            module.lr_scheduler = SCHEDULERS["StepLR"]
            config = module.configure_optimizers()
            model, optimizer = fabric.setup(module, config["optimizer"])
            return module, model, optimizer, config["lr_scheduler"]

        def step(module, optimizer):
            pixels, classes = digits(64)
            optimizer.zero_grad()
            fabric.backward(module.training_step_loss([pixels, classes]))
            optimizer.step()

        module, model, optimizer, scheduler = setup({"*.bias": 0.0, "*": 0.1})
        step(module, optimizer)
        fabric.save(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer, "scheduler": scheduler})
        again, model, other, scheduler = setup({"head.*": 0.5, "*.bias": 0.0, "*": 0.1})
        fabric.load(tmp_path / "state.ckpt", {"model": model, "optimizer": other, "scheduler": scheduler})
        names = dict(again.named_parameters())
        for name, parameter in module.named_parameters():
            state, expected = other.optimizer.state[names[name]], optimizer.optimizer.state[parameter]
            assert torch.equal(state["exp_avg"], expected["exp_avg"])
        assert [group["weight_decay"] for group in other.param_groups] == [0.5, 0.0, 0.1]


class TestLightning:
    def fit(self, path, rules, epochs, kind="AdamW", ckpt_path=None, model=LitHparams, **attributes):
        model = model(decay_rules=rules)
        for name, value in attributes.items():
            setattr(model, name, value)
        model.build_optimizer = OPTIMIZERS[kind]
        model.build_lr_scheduler = lambda optimizer: {
            "scheduler": schedulers.CosineAnnealingLR(optimizer, T_max=16),
            "interval": "step",
        }
        monitor = WeightDecayMonitor(every_n_steps=1, summary=False)
        checkpoint = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
        options = {"callbacks": [monitor, checkpoint], "enable_checkpointing": True, "max_epochs": epochs}
        trainer(**options).fit(model, ckpt_path=ckpt_path)
        return model, monitor

    @pytest.mark.parametrize("kind", ["AdamW", "SGD"])
    def test_unchanged_rules_go_on_bit_for_bit(self, kind, tmp_path):
        rules = {"*.bias": 0.0, "*": {"schedule": "cosine", "start": 0.04, "end": 0.4, "steps": 16}}
        whole, expected = self.fit(tmp_path / "whole", rules, 4, kind)
        self.fit(tmp_path / "first", rules, 2, kind)
        second, monitor = self.fit(tmp_path / "second", rules, 4, kind, ckpt_path=tmp_path / "first" / "epoch=1.ckpt")
        assert_same_weights(second, whole)
        assert monitor.history == expected.history
        assert len(monitor.history) == 16

    def test_changed_rules(self, tmp_path, log):
        self.fit(tmp_path, {"*.bias": 0.0, "*": 0.1}, 1)
        rules = {"head.*": 0.5, "*.bias": 0.0, "*": 0.1}
        _, monitor = self.fit(tmp_path / "second", rules, 2, ckpt_path=tmp_path / "epoch=0.ckpt")
        assert monitor.history[-1]["decay/head/weight_decay"] == 0.5
        assert "weight decay of group 'head': 0.1 and 0 (checkpoint) → 0.5 (rules)" in log()

    def test_a_scheduler_that_a_subclass_adds(self, tmp_path):
        class Adds(LitHparams):
            def configure_optimizers(self):
                optimizer = super().configure_optimizers()
                # Unlike others it computes the lr anew from its list of first values.
                scheduler = schedulers.LambdaLR(optimizer, lambda step: 0.9**step)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def fit(name, rules, epochs, **options):
            model = Adds(decay_rules=rules)
            checkpoint = ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1)
            trainer(callbacks=[checkpoint], enable_checkpointing=True, max_epochs=epochs).fit(model, **options)
            return model

        bias, rest = {"weight_decay": 0.1, "options": {"lr": 0.02}}, {"weight_decay": 0.1, "options": {"lr": 0.01}}
        whole = fit("whole", {"*.bias": bias, "*": rest}, 3)
        fit("first", {"*.bias": bias, "*": rest}, 1)
        rules = {"*weight": rest, "head.bias": bias, "*.bias": bias}
        resumed = fit("second", rules, 3, ckpt_path=tmp_path / "first" / "epoch=0.ckpt")
        assert_same_weights(resumed, whole)

    def test_a_checkpoint_from_before_the_mixin(self, tmp_path):
        class Before(LitBase):
            def configure_optimizers(self):
                optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
                scheduler = schedulers.CosineAnnealingLR(optimizer, T_max=16)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def fit(path, epochs):
            checkpoint = ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
            model = Before()
            trainer(callbacks=[checkpoint], enable_checkpointing=True, max_epochs=epochs).fit(model)
            return model

        expected = fit(tmp_path / "whole", 3)
        fit(tmp_path, 2)
        rules = {"*.bias": 0.1, "*": 0.1}
        resumed, _ = self.fit(tmp_path / "second", rules, 3, ckpt_path=tmp_path / "epoch=1.ckpt")
        assert_same_weights(resumed, expected)

    def test_a_checkpoint_loads_where_the_package_is_not(self, tmp_path):
        self.fit(tmp_path, {"*.bias": 0.0, "*": {"schedule": "follow_lr", "start": 0.1}}, 1)
        code = (
            "import sys; sys.modules['lightning_regdecay'] = None\n"
            "import torch; state = torch.load('epoch=0.ckpt', weights_only=True)\n"
            "print(state['optimizer_states'][0]['param_groups'][1]['decay_schedule'])"
        )
        assert "{'schedule': 'follow_lr', 'start': 0.1}" in run_python("-c", code, cwd=tmp_path, timeout=60)

    @pytest.mark.parametrize("kind", ["AdamW", "SGD"])
    def test_a_run_that_was_killed_in_mid_epoch(self, kind, tmp_path):
        program = Path(__file__).with_name("resuming_run.py")
        expected = run_python(program, kind, "whole", "never", cwd=tmp_path, timeout=120)
        # Killed at the end of step 7 of 12, after the checkpoint of step 6.
        run_python(program, kind, "killed", 7, cwd=tmp_path, timeout=120, returncode=-signal.SIGKILL)
        assert not (tmp_path / "killed.json").exists()
        assert "resumed at step 6" in run_python(program, kind, "killed", "never", cwd=tmp_path, timeout=120)
        assert (tmp_path / "killed.json").read_text() == (tmp_path / "whole.json").read_text()
        assert "resumed" not in expected
