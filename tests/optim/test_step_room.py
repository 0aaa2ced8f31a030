"""The step room: rules in force inside of a step, and nothing of them outside, whatever happens meanwhile."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from helpers import SAM
from optim.by_hand import (
    OWN,
    RULES,
    TARGETS,
    AsItWas,
    cut,
    loss_of,
    net,
    one_group,
    strength,
    train,
    two_groups,
    weights,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_regdecay import DecayRule, apply_decay_rules, groups_in_force, schedule_weight_decay

LINEAR = {"schedule": "linear", "start": 1.0, "end": 0.0, "steps": 10}


def adamw(groups, **options):
    return torch.optim.AdamW(groups, **{"lr": 0.05, "weight_decay": OWN, "foreach": False, **options})


def ours(groups_of=one_group, build=adamw, rules=RULES, model=None):
    model = net() if model is None else model
    optimizer = build(groups_of(model))
    apply_decay_rules(optimizer, model, rules)
    return model, optimizer


def by_hand(groups_of=one_group, build=adamw):
    model = net()
    return model, build(cut(model, groups_of(model)))


def in_force(optimizer):
    return {group["name"]: group["weight_decay"] for group in groups_in_force(optimizer)}


def assert_as_by_hand(drive, groups_of=one_group, build=adamw):
    """``drive(model, optimizer)`` leads to the same weights with rules as with groups by hand."""
    model, optimizer = ours(groups_of, build)
    before = AsItWas(optimizer)
    drive(model, optimizer)
    before.check(keys=False)
    reference, other = by_hand(groups_of, build)
    drive(reference, other)
    assert all(map(torch.equal, weights(model), weights(reference)))
    return model, optimizer


class Inner(torch.optim.SGD):
    """Notes what its code steps over."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{"lr": 0.1, "weight_decay": OWN, **options})
        self.strengths = []

    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.strengths.append([group["weight_decay"] for group in self.param_groups])
        super().step()
        return loss


class TestInForce:
    def test_inside_of_a_step_and_nowhere_else(self):
        model, optimizer = ours(build=Inner)
        before = AsItWas(optimizer)
        state = copy.deepcopy(optimizer.state_dict())
        loss_of(model).backward()
        optimizer.step()
        assert optimizer.strengths == [[0.05, 0.0, 0.3, 0.2]]
        before.check()
        assert optimizer.state_dict() == state
        assert in_force(optimizer) == {"rest": 0.05, "bias": 0.0, "1": 0.3, "2.weight": 0.2}

    def test_names_of_parts(self):
        model = net()
        optimizer = adamw([{**group, "name": name} for group, name in zip(two_groups(model), ("body", "head"))])
        apply_decay_rules(optimizer, model, RULES)
        assert list(in_force(optimizer)) == ["rest", "body.bias", "1", "head.bias", "2.weight"]
        model, optimizer = ours(two_groups)
        assert list(in_force(optimizer)) == ["rest", "0.bias", "1", "1.bias", "2.weight"]

    def test_what_is_told_are_copies_of_what_is_now(self):
        _model, optimizer = ours(two_groups)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        optimizer.step()
        scheduler.step()
        told = groups_in_force(optimizer)
        assert {group["lr"] for group in told} == {0.025}
        assert told[0]["param_names"] == ["0.weight"]
        told[0]["lr"] = 7.0
        told[0]["params"].clear()
        assert groups_in_force(optimizer)[0]["lr"] == 0.025
        assert len(optimizer.param_groups[0]["params"]) == 2

    def test_a_group_that_no_rule_takes_from_is_stepped_over_itself(self):
        model = net()
        optimizer = Inner(two_groups(model))
        apply_decay_rules(optimizer, model, {"2.*": 0.5})
        optimizer.step()
        assert optimizer.strengths == [[OWN, OWN, 0.5]]

    def test_a_factor_follows_what_they_give(self):
        _model, optimizer = ours(rules={"*": {"decay_mult": 0.5}}, build=Inner)
        optimizer.step()
        optimizer.param_groups[0]["weight_decay"] = 0.6
        optimizer.step()
        assert optimizer.strengths == [[0.05], [0.3]]

    def test_a_number_holds_against_what_they_set_and_says_so_once(self):
        _model, optimizer = ours(rules={"*.bias": 0.0, "*": 0.3}, build=Inner)
        optimizer.param_groups[0]["weight_decay"] = 0.7
        with pytest.warns(UserWarning, match="was set to 0.7 while training: decay rules that give λ hold"):
            optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for value in (0.8, 0.9):
                optimizer.param_groups[0]["weight_decay"] = value
                optimizer.step()
        assert optimizer.strengths == [[0.3, 0.0]] * 3
        assert optimizer.param_groups[0]["weight_decay"] == 0.9


class TestWaysAround:
    """1: bypasses and swaps."""

    def test_the_step_of_the_class(self):
        def drive(model, optimizer):
            for _ in range(3):
                optimizer.zero_grad()
                loss_of(model).backward()
                type(optimizer).step(optimizer)

        assert_as_by_hand(drive)

    def test_a_step_that_is_set_later(self):
        def drive(model, optimizer):
            optimizer.step = functools.partial(type(optimizer).step, optimizer)
            train(model, optimizer, 3)

        assert_as_by_hand(drive)

    def test_a_step_that_is_wrapped_before(self):
        calls = []

        def build(groups):
            optimizer = adamw(groups)
            original = optimizer.step
            optimizer.step = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
            return optimizer

        assert_as_by_hand(lambda model, optimizer: train(model, optimizer, 3), build=build)
        assert len(calls) == 6

    def test_schedulers_find_their_mark(self):
        model, optimizer = ours()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        with pytest.warns(UserWarning, match=r"lr_scheduler\.step\(\)` before `optimizer\.step"):
            scheduler.step()
        model = net()
        optimizer = adamw(one_group(model))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        apply_decay_rules(optimizer, model, RULES)
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler.step()


class TestCopies:
    """2: the four copies."""

    WAYS = {
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
        "torch.save": lambda optimizer: _saved(optimizer),
    }

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("step", ["its own", "of its class"])
    def test_refuses_to_step(self, way, step):
        model, optimizer = ours()
        loss_of(model).backward()
        copied = self.WAYS[way](optimizer)
        with pytest.raises(RuntimeError, match="AdamW is a copy of an optimizer with decay rules in force"):
            copied.step() if step == "its own" else type(copied).step(copied)
        assert "_optimizer_step_pre_hooks" in vars(optimizer)
        optimizer.step()

    @pytest.mark.parametrize("way", WAYS)
    def test_steps_again_with_rules(self, way):
        model, optimizer = ours()
        train(model, optimizer, 2)
        twin, copied = copy.deepcopy((model, optimizer))
        apply_decay_rules(copied, twin, RULES)
        train(twin, copied, 2)
        train(model, optimizer, 2)
        assert all(map(torch.equal, weights(model), weights(twin)))

    def test_where_rules_change_nothing_a_copy_is_one_of_torchs(self):
        model = net()
        optimizer = adamw(one_group(model))
        apply_decay_rules(optimizer, model, {})
        copy.deepcopy(optimizer).step()

    def test_state_dicts_are_plain(self):
        model, optimizer = ours()
        train(model, optimizer, 1)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        plain = adamw(one_group(net()))
        plain.load_state_dict(state)
        assert set(state["param_groups"][0]) == set(plain.param_groups[0])


def _saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class TestHooksOfUsers:
    """3: they see their own groups, and what they steer reaches all parts."""

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("how", ["index", "name", "object"])
    def test_steering(self, when, how):
        def attach(optimizer, group):
            def steer(optimizer, args, kwargs):
                found = {
                    "index": lambda: optimizer.param_groups[0],
                    "name": lambda: next(g for g in optimizer.param_groups if g.get("name") == "body"),
                    "object": lambda: group,
                }[how]()
                found["lr"] *= 0.5
                assert len(optimizer.param_groups) == 2

            optimizer.register_step_pre_hook(steer)

        model = net()
        optimizer = adamw([{**group, "name": name} for group, name in zip(two_groups(model), ("body", "head"))])
        group = optimizer.param_groups[0]
        if when == "before":
            attach(optimizer, group)
        apply_decay_rules(optimizer, model, RULES)
        if when == "after":
            attach(optimizer, group)
        reference = net()
        other = adamw(cut(reference, two_groups(reference)))
        for _ in range(4):
            train(model, optimizer, 1)
            for part in other.param_groups[:2]:
                part["lr"] *= 0.5
            train(reference, other, 1)
        assert all(map(torch.equal, weights(model), weights(reference)))

    def test_post_hooks_and_global_hooks(self):
        seen = []

        def look(optimizer, args, kwargs):
            seen.append(len(optimizer.param_groups))

        handles = [
            register_optimizer_step_pre_hook(look),
            register_optimizer_step_post_hook(look),
        ]
        try:
            model, optimizer = ours()
            optimizer.register_step_post_hook(look)
            optimizer.register_step_pre_hook(look)
            train(model, optimizer, 2)
            type(optimizer).step(optimizer)
        finally:
            for handle in handles:
                handle.remove()
        assert seen == [1] * 12

    def test_a_scheduler_that_steps_in_one(self):
        model, optimizer = ours(two_groups)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        optimizer.register_step_post_hook(lambda *args: scheduler.step())
        train(model, optimizer, 3)
        reference, other = by_hand(two_groups)
        follows = torch.optim.lr_scheduler.ExponentialLR(other, 0.5)
        train(reference, other, 3, after=lambda step: follows.step())
        assert all(map(torch.equal, weights(model), weights(reference)))


class TestReEntrancy:
    """4: steps in steps, closures that are called never, once, often."""

    def test_a_step_that_calls_super(self):
        assert_as_by_hand(lambda model, optimizer: train(model, optimizer, 3, closure=True), build=Inner)

    @pytest.mark.parametrize("times", [0, 1, 3])
    def test_a_closure(self, times):
        seen = []

        class Often(torch.optim.SGD):
            def step(self, closure=None):
                for group in self.param_groups:  # in a loop over the groups, too
                    for _ in range(times):
                        torch.enable_grad()(closure)()
                    group.setdefault("calls", 0)
                return super().step()

        def drive(model, optimizer):
            def closure():
                seen.append(len(optimizer.param_groups))
                optimizer.zero_grad()
                loss = loss_of(model)
                loss.backward()
                return loss

            loss_of(model).backward()
            for _ in range(3):
                optimizer.step(closure)

        assert_as_by_hand(drive, build=lambda groups: Often(groups, lr=0.1, weight_decay=OWN))
        assert set(seen[: 3 * 4 * times]) <= {1}

    def test_a_step_in_the_closure_of_another(self):
        model, optimizer = ours(rules={"*": LINEAR})
        loss_of(model).backward()
        optimizer.step(lambda: optimizer.step())
        assert optimizer.param_groups[0]["decay_step"] == 2

    def test_only_a_closure_is_taken_for_one(self):
        class Odd(torch.optim.SGD):
            def step(self, callback, closure=None):
                callback(len(self.param_groups))
                return super().step()

        seen = []
        _model, optimizer = ours(build=lambda groups: Odd(groups, lr=0.1, weight_decay=OWN))
        optimizer.step(seen.append)
        assert seen == [4]


class Fails(Exception):
    pass


class TestExceptions:
    """5: at every point; afterwards all is as it was, and a checkpoint and the next steps are right."""

    class Failing(torch.optim.SGD):
        where = ""

        def step(self, closure=None):
            if self.where == "before the closure":
                raise Fails
            loss = None if closure is None else torch.enable_grad()(closure)()
            if self.where == "after the closure":
                raise Fails
            super().step()
            if self.where == "after the step":
                raise Fails
            return loss

    POINTS = ("before the closure", "closure", "after the closure", "after the step", "pre-hook", "post-hook")

    @pytest.mark.parametrize("point", POINTS)
    @pytest.mark.parametrize("error", [Fails, KeyboardInterrupt])
    @pytest.mark.parametrize("past", [False, True], ids=["", "past our layer"])
    def test_leaves_all_as_it_was(self, point, error, past):
        global Fails
        original, Fails = Fails, error
        try:
            model, optimizer = ours(
                two_groups, build=lambda groups: self.Failing(groups, lr=0.1, momentum=0.9, weight_decay=OWN)
            )
            before = AsItWas(optimizer)
            step = functools.partial(type(optimizer).step, optimizer) if past else optimizer.step
            reference, other = by_hand(
                two_groups, build=lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=OWN)
            )

            def fail(*args):
                raise error

            def closure():
                optimizer.zero_grad()
                loss_of(model).backward()
                if point == "closure":
                    raise error

            handle = None
            optimizer.where = point
            if point == "pre-hook":
                handle = optimizer.register_step_pre_hook(fail)
            if point == "post-hook":
                handle = optimizer.register_step_post_hook(fail)
            with pytest.raises(error):
                step(closure)
            done = point in ("after the step", "post-hook")
            if done:
                train(reference, other, 1)
            if not past:
                before.check()
            optimizer.where = ""
            if handle is not None:
                handle.remove()
            state = optimizer.state_dict()
            assert len(state["param_groups"]) == 2
            before.check()
            point = ""
            for _ in range(3):
                step(closure)
            train(reference, other, 3)
            before.check()
            assert all(map(torch.equal, weights(model), weights(reference)))
        finally:
            Fails = original

    def test_parts_that_cannot_be_made(self):
        rules = {"*": {"schedule": "linear", "start": 1.0, "end": 0.0}}
        model, optimizer = ours(rules=rules)
        before, held = AsItWas(optimizer), weights(model)
        loss_of(model).backward()
        for _ in range(2):
            with pytest.raises(ValueError, match="needs the length of the run, which is not known here"):
                optimizer.step()
            before.check()
        assert all(map(torch.equal, weights(model), held))
        schedule_weight_decay(optimizer, total_steps=10)
        optimizer.step()
        assert in_force(optimizer) == {"rest": 1.0}


class TestChangingGroups:
    """6: empty, frozen, shrunk, grown groups; keys and lists that change in a step."""

    def test_empty_and_frozen(self):
        def drive(model, optimizer):
            model[0].requires_grad_(False)
            train(model, optimizer, 2)
            model[0].requires_grad_(True)
            train(model, optimizer, 2)

        assert_as_by_hand(drive, lambda model: [{"params": []}, *two_groups(model)])

    def test_grown(self):
        class Growing(nn.Sequential):
            pass

        model, optimizer = ours(build=lambda groups: Inner(groups))
        model.append(nn.Linear(3, 3))
        optimizer.add_param_group({"params": list(model[3].parameters()), "lr": 0.5})
        optimizer.step()
        assert optimizer.strengths[-1] == [0.05, 0.0, 0.3, 0.2, 0.05, 0.0]
        assert [group["name"] for group in groups_in_force(optimizer)[-2:]] == ["1.rest", "1.bias"]

    def test_members_that_come_and_go(self):
        _model, optimizer = ours(build=Inner)
        members = optimizer.param_groups[0]["params"]
        gone = members.pop()
        optimizer.step()
        assert sum(len(group["params"]) for group in groups_in_force(optimizer)) == 5
        members.insert(0, gone)
        optimizer.step()
        assert optimizer.strengths[-1] == [0.0, 0.05, 0.3, 0.2]

    def test_what_is_added_and_deleted_reaches_the_parts(self):
        class Looks(Inner):
            def step(self, closure=None):
                self.keys = [("mark" in group, group.get("momentum")) for group in self.param_groups]
                return super().step(closure)

        _model, optimizer = ours(build=Looks)
        optimizer.step()
        optimizer.param_groups[0]["mark"] = True
        optimizer.param_groups[0]["momentum"] = 0.5
        optimizer.step()
        assert optimizer.keys == [(True, 0.5)] * 4
        del optimizer.param_groups[0]["mark"]
        optimizer.step()
        assert optimizer.keys == [(False, 0.5)] * 4

    def test_what_the_optimizer_writes_and_deletes_reaches_theirs(self):
        class Writes(Inner):
            def step(self, closure=None):
                for group in self.param_groups:
                    group["k"] = group.get("k", 0) + 1
                    group.pop("once", None)
                return super().step(closure)

        _model, optimizer = ours(build=Writes)
        optimizer.param_groups[0]["once"] = 1
        for _ in range(3):
            optimizer.step()
        assert optimizer.param_groups[0]["k"] == 3
        assert "once" not in optimizer.param_groups[0]

    def test_lists_with_an_entry_per_parameter(self):
        class Scaled(Inner):
            def step(self, closure=None):
                self.seen = [list(zip(group["scales"], map(len, group["params"]))) for group in self.param_groups]
                return super().step(closure)

        model = net()
        _names, params = zip(*model.named_parameters())
        optimizer = Scaled([{"params": list(params), "scales": list(range(6)), "betas": [0.1, 0.2]}])
        apply_decay_rules(optimizer, model, RULES)
        optimizer.step()
        assert [[scale for scale, _ in group] for group in optimizer.seen] == [[0], [1, 3, 5], [2], [4]]
        assert optimizer.param_groups[0]["scales"] == list(range(6))
        assert optimizer.param_groups[0]["betas"] == [0.1, 0.2]

    def test_names_of_torch(self):
        model = net()
        optimizer = adamw(model.named_parameters())
        apply_decay_rules(optimizer, model, RULES)
        train(model, optimizer, 2)
        assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
        optimizer.add_param_group({"params": list(nn.Linear(1, 1).named_parameters())})

    def test_a_list_that_is_replaced_in_a_step(self):
        class Replaces(Inner):
            def step(self, closure=None):
                self.param_groups = list(self.param_groups)
                return super().step(closure)

        _model, optimizer = ours(two_groups, build=Replaces)
        groups = list(optimizer.param_groups)
        for _ in range(2):
            optimizer.step()
            assert [id(group) for group in optimizer.param_groups] == [id(group) for group in groups]

    def test_a_group_that_is_added_in_a_step(self):
        extra = nn.Parameter(torch.ones(2))

        class Adds(Inner):
            def step(self, closure=None):
                if not any(extra is p for group in self.param_groups for p in group["params"]):
                    self.add_param_group({"params": [extra]})
                return super().step(closure)

        _model, optimizer = ours(build=Adds)
        optimizer.step()
        assert len(optimizer.param_groups) == 2
        optimizer.step()
        assert optimizer.strengths[-1] == [0.05, 0.0, 0.3, 0.2, OWN]

    def test_a_state_that_is_loaded_in_a_closure(self):
        model, optimizer = ours()
        train(model, optimizer, 2)
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0]["lr"] = 0.5

        def closure():
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.load_state_dict(state)

        optimizer.step(closure)
        assert len(optimizer.param_groups) == 1
        assert {group["lr"] for group in groups_in_force(optimizer)} == {0.5}


class TestCounters:
    """7: resumed and applied again, with whatever an optimizer counts in its groups."""

    class Counts(torch.optim.SGD):
        """With a float, a tensor counted in place, and one that is replaced."""

        def __init__(self, groups):
            super().__init__([{**group, "t": torch.tensor(0.0), "f": 0.0, "r": torch.tensor(1.0)} for group in groups])
            for group in self.param_groups:
                group["lr"], group["weight_decay"] = 0.1, group.get("weight_decay", OWN) or group["weight_decay"]

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                group["t"] += 1
                group["f"] += 0.5
                group["r"] = group["r"] * 2
                for p in group["params"]:
                    if p.grad is not None:
                        scale = group["lr"] / (group["t"] + group["f"] + group["r"])
                        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(scale * p.grad)

    def build(self, groups):
        return self.Counts([{"weight_decay": OWN, **group} for group in groups])

    def test_go_on(self):
        _, optimizer = assert_as_by_hand(lambda model, optimizer: train(model, optimizer, 5), build=self.build)
        (group,) = optimizer.param_groups
        assert (group["t"].item(), group["f"], group["r"].item()) == (5.0, 2.5, 32.0)

    @pytest.mark.parametrize("again", [False, True], ids=["", "applied again"])
    def test_resume(self, again):
        model, optimizer = ours(two_groups, build=self.build)
        train(model, optimizer, 3)
        state, held = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
        if again:
            apply_decay_rules(optimizer, model, RULES)
        train(model, optimizer, 3)
        resumed, other = ours(two_groups, build=self.build)
        resumed.load_state_dict(held)
        other.load_state_dict(state)
        train(resumed, other, 3)
        reference, hand = by_hand(two_groups, build=self.build)
        train(reference, hand, 6)
        assert all(map(torch.equal, weights(model), weights(reference)))
        assert all(map(torch.equal, weights(resumed), weights(reference)))

    def test_reset_by_the_user(self):
        model, optimizer = ours(build=self.build)
        train(model, optimizer, 2)
        optimizer.param_groups[0]["t"].zero_()
        optimizer.param_groups[0]["f"] = 0.0
        train(model, optimizer, 1)
        assert (optimizer.param_groups[0]["t"].item(), optimizer.param_groups[0]["f"]) == (1.0, 0.5)

    def test_prodigys_numerator(self):
        prodigy = pytest.importorskip("prodigyopt").Prodigy

        def build(groups):
            return prodigy(groups, lr=1.0, weight_decay=OWN)

        model, optimizer = ours(build=build)
        train(model, optimizer, 4)
        state, held = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
        resumed, other = ours(build=build)
        resumed.load_state_dict(held)
        other.load_state_dict(state)
        train(resumed, other, 4)
        reference, hand = by_hand(build=build)
        train(reference, hand, 8)
        assert all(map(torch.equal, weights(resumed), weights(reference)))


def test_schedule_free_in_train_and_eval():
    """8: what ``train()`` and ``eval()`` read and write outside of a step."""
    kind = pytest.importorskip("schedulefree").AdamWScheduleFree

    def drive(model, optimizer):
        for _ in range(3):
            optimizer.train()
            train(model, optimizer, 2)
            optimizer.eval()
            loss_of(model)

    assert_as_by_hand(drive, two_groups, lambda groups: kind(groups, lr=0.05, weight_decay=OWN, warmup_steps=4))


@pytest.mark.parametrize("option", [{"lr": 0.1}, {"betas": (0.5, 0.6)}, {"amsgrad": True}])
def test_options_other_than_the_strength_are_refused(option):
    """9: they would not follow schedulers, nor be stored."""
    model = net()
    optimizer = adamw(one_group(model))
    before = dict(vars(optimizer))
    with pytest.raises(
        ValueError,
        match=r"has the options .* rules set the weight decay and a factor on the lr \(lr_mult\) alone: build",
    ):
        apply_decay_rules(optimizer, model, {"*": DecayRule(0.1, options=option)})
    assert vars(optimizer) == before


@pytest.mark.parametrize("value", [None, nn.Linear(1, 1), [], torch.optim.SGD])
@pytest.mark.parametrize(
    "call",
    [lambda value: apply_decay_rules(value, nn.Linear(1, 1), {"*": 0.1}), schedule_weight_decay, groups_in_force],
    ids=["apply_decay_rules", "schedule_weight_decay", "groups_in_force"],
)
def test_what_is_no_optimizer(call, value):
    with pytest.raises(
        TypeError, match=r"optimizer must be an optimizer, with a step\(\) and a list param_groups, got"
    ):
        call(value)


class SAMByInheritance(torch.optim.SGD):
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        closure()
        with torch.no_grad():
            held = [p.clone() for group in self.param_groups for p in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for p in params:
                p.add_(p.grad, alpha=0.05)
        closure()
        with torch.no_grad():
            for p, old in zip(params, held):
                p.copy_(old)
        super().step()


class SharedDictionaries(torch.optim.Optimizer):
    """Torch keeps the very dictionaries, in another list."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


class Lookahead(torch.optim.Optimizer):
    """Does not call torch's constructor, and counts in the groups of the optimizer inside."""

    def __init__(self, inner):
        self.inner, self.defaults, self.state = inner, inner.defaults, {}

    @property
    def param_groups(self):
        return self.inner.param_groups

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    def step(self, closure=None):
        loss = self.inner.step(closure)
        for group in self.param_groups:
            group["counter"] = group.get("counter", 0) + 1
        return loss


class LARC:
    """No optimizer of torch; takes weight decay from the one inside and does it by itself."""

    def __init__(self, optim):
        self.optim = optim

    @property
    def param_groups(self):
        return self.optim.param_groups

    def zero_grad(self):
        self.optim.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        strengths = []
        for group in self.optim.param_groups:
            strengths.append(group["weight_decay"])
            group["weight_decay"] = 0.0
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(p, alpha=strengths[-1]).mul_(0.5)
        self.optim.step()
        for group, value in zip(self.optim.param_groups, strengths):
            group["weight_decay"] = value


class Several(torch.optim.Optimizer):
    """A container whose list of groups is made anew whenever it is asked for."""

    def __init__(self, *optimizers):
        self.optimizers, self.defaults, self.state = optimizers, {}, {}

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=OWN)


class TestHolders:
    """10: optimizers around others."""

    FORMS = {
        "SAM": lambda groups: SAM(groups, torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=OWN),
        "SAM by inheritance": lambda groups: SAMByInheritance(groups, lr=0.1, momentum=0.9, weight_decay=OWN),
        "shared dictionaries": lambda groups: SharedDictionaries(sgd(groups)),
        "Lookahead": lambda groups: Lookahead(sgd(groups)),
        "LARC": lambda groups: LARC(sgd(groups)),
        "Lookahead around SAM": lambda groups: Lookahead(
            SAM(groups, torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=OWN)
        ),
        "several": lambda groups: Several(*(sgd([group]) for group in groups)),
    }

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("attached", ["outer", "inner", "both"])
    def test_trains_as_by_hand(self, form, attached):
        model = net()
        optimizer = self.FORMS[form](two_groups(model))
        outside = list(optimizer.param_groups)
        inner = getattr(optimizer, "base_optimizer", getattr(optimizer, "inner", getattr(optimizer, "optim", None)))
        if attached != "outer" and inner is None:
            pytest.skip("holds none")
        if attached != "inner":
            apply_decay_rules(optimizer, model, RULES)
        if attached != "outer":
            apply_decay_rules(inner, model, RULES)
        if attached == "inner" and form == "LARC":
            pytest.skip("what stands around it decays, and nobody told of that")
        train(model, optimizer, 4, closure=form != "LARC" and form != "several")
        assert [id(group) for group in optimizer.param_groups] == [id(group) for group in outside]
        reference = net()
        other = self.FORMS[form](cut(reference, two_groups(reference)))
        train(reference, other, 4, closure=form != "LARC" and form != "several")
        assert all(map(torch.equal, weights(model), weights(reference)))
        found = dict(in_force(optimizer).items())
        assert found == {"rest": 0.05, "0.bias": 0.0, "1": 0.3, "1.bias": 0.0, "2.weight": 0.2}

    def test_counts_a_step_of_two_phases_once(self):
        model = net()
        optimizer = self.FORMS["SAM"](one_group(model))
        apply_decay_rules(optimizer, model, {"*": LINEAR})
        train(model, optimizer, 3, closure=True)
        for _ in range(2):
            loss_of(model).backward()
            optimizer.first_step()
            loss_of(model).backward()
            optimizer.second_step()
        assert optimizer.param_groups[0]["decay_step"] == 5

    def test_goes_on_after_a_checkpoint(self):
        model = net()
        optimizer = self.FORMS["SAM"](one_group(model))
        apply_decay_rules(optimizer, model, RULES)
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, 3, closure=True)
        reference = net()
        train(reference, self.FORMS["SAM"](cut(reference, one_group(reference))), 3, closure=True)
        assert all(map(torch.equal, weights(model), weights(reference)))

    def test_a_list_made_anew_with_nothing_inside_is_refused(self):
        class Fleeting(torch.optim.SGD):
            @property
            def param_groups(self):
                return list(self._groups)

            @param_groups.setter
            def param_groups(self, groups):
                self._groups = groups

            def add_param_group(self, group):
                self._groups.append({"weight_decay": OWN, "lr": 0.1, **group, "params": list(group["params"])})

        model = net()
        optimizer = Fleeting(one_group(model), lr=0.1)
        with pytest.raises(ValueError, match="its param_groups is made anew whenever it is asked for"):
            apply_decay_rules(optimizer, model, RULES)


class TestNumbered:
    """11: optimizers with lists of their own, an entry per group."""

    class AdaBound(torch.optim.SGD):
        def __init__(self, params, **options):
            super().__init__(params, **options)
            self.base_lrs = [group["lr"] for group in self.param_groups]

        def step(self, closure=None):
            for group, _ in zip(self.param_groups, self.base_lrs):
                for p in group["params"]:
                    p.data.sub_(group["lr"] * p.grad)

    def test_are_refused_before_anything_moves(self):
        model = net()
        optimizer = self.AdaBound(one_group(model), lr=0.1)
        before = dict(vars(optimizer))
        with pytest.raises(
            ValueError, match="this AdaBound: it has something for each of its param groups in base_lrs"
        ):
            apply_decay_rules(optimizer, model, RULES)
        assert vars(optimizer) == before

    def test_are_fine_where_no_group_is_cut(self):
        model = net()
        optimizer = self.AdaBound(cut(model, one_group(model)), lr=0.1)
        apply_decay_rules(optimizer, model, RULES)
        train(model, optimizer, 1)

    def test_also_where_it_lies_deeper(self):
        class Manager:
            def __init__(self):
                self.index2config = {(0, 1): {"betas": (0.1, 0.2)}}

        model = net()
        optimizer = adamw(one_group(model))
        optimizer.mng = Manager()
        with pytest.raises(ValueError, match=r"mng\.index2config"):
            apply_decay_rules(optimizer, model, RULES)
        optimizer.mng.index2config.clear()
        apply_decay_rules(optimizer, model, RULES)

    def test_a_list_that_grows_is_none(self):
        _model, optimizer = ours(build=Inner)
        optimizer.step()
        assert len(optimizer.strengths) == len(optimizer.param_groups)
        optimizer.param_groups[0]["params"].reverse()
        optimizer.step()


class TestDistributedCheckpoint:
    """12: its step with lr 0 and no gradients, plain and flattened."""

    @pytest.mark.parametrize("flat", [False, True])
    @pytest.mark.parametrize("kind", ["AdamW", "SGD"])
    def test_before_the_first_step(self, flat, kind):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)

        def build(groups):
            return adamw(groups) if kind == "AdamW" else torch.optim.SGD(groups, lr=0.1, weight_decay=OWN)

        rules = {"*.bias": 0.0, "*": LINEAR}
        model, optimizer = ours(rules=rules, build=build)
        get_optimizer_state_dict(model, optimizer, options=options)
        assert optimizer.param_groups[0]["decay_step"] == 0
        train(model, optimizer, 3)
        state = get_optimizer_state_dict(model, optimizer, options=options)
        resumed, other = ours(rules=rules, build=build)
        resumed.load_state_dict(model.state_dict())
        set_optimizer_state_dict(resumed, other, copy.deepcopy(state), options=options)
        assert other.param_groups[0]["decay_step"] == 3
        for one, two in ((model, optimizer), (resumed, other)):
            train(one, two, 2)
        assert all(map(torch.equal, weights(model), weights(resumed)))

    @pytest.mark.parametrize("flat", [False, True])
    def test_rules_come_and_go(self, flat):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model, optimizer = ours(rules={"*": LINEAR})
        train(model, optimizer, 3)
        plain = adamw(one_group(model))
        plain.zero_grad()
        set_optimizer_state_dict(
            model, plain, get_optimizer_state_dict(model, optimizer, options=options), options=options
        )
        assert plain.state[model[0].weight]["step"] == 3


class TestCompiled:
    """13: compiled before, after, and in the caller: as many frames as with groups by hand, and no more with time."""

    def run(self, rules, when, **options):
        torch._dynamo.reset()
        from torch._dynamo.testing import CompileCounter

        counter = CompileCounter()
        model = net()
        optimizer = adamw(one_group(model) if rules else cut(model, one_group(model)), **options)
        step = torch.compile(optimizer.step, backend=counter) if when == "before" else None
        if rules:
            apply_decay_rules(optimizer, model, rules)
        if when == "after":
            step = torch.compile(optimizer.step, backend=counter)
        elif when == "caller":
            step = torch.compile(lambda: optimizer.step(), backend=counter)
        frames = []
        for number in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.1 * number)
            step()
            frames.append(counter.frame_count)
            assert len(optimizer.param_groups) == (1 if rules else 4)
        return weights(model), frames

    @pytest.mark.parametrize("when", ["before", "after", "caller"])
    def test_as_by_hand(self, when):
        expected, frames_by_hand = self.run(None, when)
        found, frames = self.run(RULES, when)
        assert all(map(torch.equal, found, expected))
        assert frames == frames_by_hand

    def test_with_a_strength_that_moves(self):
        rules = {"*": {"schedule": "linear", "start": 1.0, "end": 0.0, "steps": 10}}
        model = net()
        optimizer = adamw(one_group(model), lr=torch.tensor(0.05), weight_decay=torch.tensor(0.1))
        apply_decay_rules(optimizer, model, rules)
        step = torch.compile(optimizer.step, backend="eager")
        frames = []
        for _ in range(4):
            loss_of(model).backward()
            step()
            frames.append(sum(torch._dynamo.utils.counters["frames"].values()))
        assert frames[1:] == [frames[1]] * 3
        assert groups_in_force(optimizer)[0]["weight_decay"] == pytest.approx(0.7)

    def test_a_tensor_lr_stays_one_tensor(self):
        lr = torch.tensor(0.05)
        model, optimizer = ours(build=lambda groups: adamw(groups, lr=lr))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        train(model, optimizer, 3, after=lambda step: scheduler.step())
        assert optimizer.param_groups[0]["lr"] is lr
        assert all(group["lr"] is lr for group in groups_in_force(optimizer))


class TestMemory:
    """14: bounded caches, and nothing that is kept alive."""

    def test_a_thousand_loads(self):
        model, optimizer = ours(two_groups)
        train(model, optimizer, 1)
        state = optimizer.state_dict()
        for _ in range(1000):
            optimizer.load_state_dict(state)
        train(model, optimizer, 1)
        from lightning_regdecay.optim.in_force import room_of

        assert len(room_of(optimizer).parting._parted) == 2

    @pytest.mark.parametrize("scheduler", [False, True])
    def test_an_optimizer_is_freed_without_the_collector(self, scheduler):
        gc.collect()
        gc.disable()
        try:
            model, optimizer = ours()
            made = torch.optim.lr_scheduler.StepLR(optimizer, 1) if scheduler else None
            train(model, optimizer, 2, closure=True)
            optimizer.load_state_dict(optimizer.state_dict())
            references = [weakref.ref(optimizer), weakref.ref(model[0].weight), weakref.ref(model)]
            del made, optimizer, model
            assert [reference() for reference in references] == [None] * 3
        finally:
            gc.enable()

    def test_a_parameter_that_is_replaced_is_freed(self):
        gc.collect()
        gc.disable()
        try:
            model, optimizer = ours()
            train(model, optimizer, 1)
            old = weakref.ref(model[2].weight)
            model[2] = nn.Linear(5, 3)
            optimizer.state.clear()
            optimizer.param_groups[0]["params"] = list(model.parameters())
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            assert old() is None
        finally:
            gc.enable()


class TestChangingModels:
    """15: replaced heads, adapters, two models."""

    def test_a_replaced_head(self):
        model, optimizer = ours(build=Inner)
        optimizer.step()
        model[2] = nn.Linear(5, 3)
        optimizer.param_groups[0]["params"] += list(model[2].parameters())
        with pytest.warns(UserWarning, match=r"'2\.weight', '2\.bias' are in an optimizer but not of the model"):
            optimizer.step()
        found = {id(p): group["weight_decay"] for group in groups_in_force(optimizer) for p in group["params"]}
        assert found[id(model[2].weight)] == strength("2")
        assert found[id(model[2].bias)] == 0.0

    def test_parameters_in_no_optimizer_are_named_once(self):
        model = net()
        optimizer = adamw(model[0].parameters())
        apply_decay_rules(optimizer, model, RULES)
        with pytest.warns(UserWarning, match=r"'1\.weight', .* are trainable, but in no optimizer"):
            optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()

    def test_two_optimizers_of_one_model_hold_all(self):
        model = net()
        optimizers = [adamw(module.parameters()) for module in model]
        for optimizer in optimizers:
            apply_decay_rules(optimizer, model, RULES)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for optimizer in optimizers:
                optimizer.step()

    def test_two_models_in_one_optimizer(self):
        one, two = net(), net()
        optimizer = Inner([*one.parameters(), *two.parameters()])
        apply_decay_rules(optimizer, one, {"*.bias": 0.0, "*": 0.3})
        apply_decay_rules(optimizer, two, {"*": 0.7})
        optimizer.step()
        assert optimizer.strengths == [[0.3, 0.0, 0.7]]
        apply_decay_rules(optimizer, one, {"*": 0.2})
        optimizer.step()
        assert optimizer.strengths[-1] == [0.2, 0.7]

    def test_two_models_with_rules_for_the_same_parameters(self):
        model, optimizer = ours()
        with pytest.raises(ValueError, match=r"both Sequential and Linear have decay rules for 'weight' and 1 more"):
            apply_decay_rules(optimizer, model[0], {"*": 0.1})
        assert in_force(optimizer)["rest"] == 0.05

    def test_an_optimizer_of_another_model(self):
        with pytest.raises(ValueError, match="are in force nowhere: AdamW has none of its parameters"):
            apply_decay_rules(adamw(net().parameters()), net(), RULES)


class TestOnce:
    def test_applied_ten_times(self):
        model, optimizer = ours()
        hooks = len(optimizer._optimizer_step_pre_hooks)
        step = vars(optimizer)["step"]
        for number in range(10):
            apply_decay_rules(optimizer, model, {"*.bias": 0.0, "*": {"decay_mult": number}})
        assert len(optimizer._optimizer_step_pre_hooks) == hooks
        assert vars(optimizer)["step"] is step
        assert in_force(optimizer) == {"rest": pytest.approx(0.9), "bias": 0.0}

    def test_what_fabric_and_lightning_return_is_unwrapped(self, tmp_path):
        from lightning.fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices=1)
        model = net()
        wrapped, optimizer = fabric.setup(model, Inner(model.parameters()))
        apply_decay_rules(optimizer, wrapped, RULES)
        optimizer.step()
        assert optimizer.optimizer.strengths == [[0.05, 0.0, 0.3, 0.2]]
        assert in_force(optimizer)["rest"] == 0.05

    def test_two_threads(self):
        found = {}

        def run(number):
            model, optimizer = ours(rules={"*.bias": 0.0, "*": 0.1 * number}, build=Inner)
            train(model, optimizer, 20, closure=True)
            found[number] = optimizer.strengths

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {number: [[0.1 * number, 0.0]] * 20 for number in range(4)}

    def test_no_class_is_changed(self):
        before = {kind: dict(vars(kind)) for kind in (torch.optim.Optimizer, torch.optim.AdamW)}
        model, optimizer = ours()
        train(model, optimizer, 1)
        assert all(dict(vars(kind)) == held for kind, held in before.items())


class TestSchedules:
    def test_is_that_of_a_loop_by_hand(self):
        model, optimizer = ours(rules={"*.bias": 0.0, "*": LINEAR})
        train(model, optimizer, 12, closure=True)
        reference = net()
        other = adamw(
            [
                {"params": [p for n, p in reference.named_parameters() if n.endswith("bias") == biased]}
                for biased in (False, True)
            ]
        )
        other.param_groups[1]["weight_decay"] = 0.0
        for step in range(12):
            other.param_groups[0]["weight_decay"] = 1.0 + (0.0 - 1.0) * min(step / 10, 1.0)
            train(reference, other, 1)
        assert all(map(torch.equal, weights(model), weights(reference)))

    def test_steps_that_fail_do_not_count(self):
        model, optimizer = ours(rules={"*": LINEAR})

        def fail():
            raise RuntimeError("out of memory")

        for _ in range(3):
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step(fail)
        train(model, optimizer, 1)
        assert in_force(optimizer) == {"rest": 1.0}

    @pytest.mark.parametrize(("kind", "told"), [("AdamW", True), ("SGD", False)])
    def test_an_old_run_tells_its_steps_or_a_warning_says_that_it_does_not(self, kind, told):
        def build(groups):
            return getattr(torch.optim, kind)(groups, lr=0.1)

        model = net()
        plain = build(one_group(model))
        train(model, plain, 4)
        _resumed, optimizer = ours(rules={"*": LINEAR}, build=build)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.load_state_dict(plain.state_dict())
        assert optimizer.param_groups[0]["decay_step"] == (4 if told else 0)
        assert any("does not tell how many" in str(warning.message) for warning in caught) is not told

    def test_a_coupled_optimizer_cannot_have_a_timescale(self):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="group 'rest' has a timescale, which SGD cannot have"):
            apply_decay_rules(optimizer, model, {"*": {"schedule": "timescale", "steps": 10}})
        assert not optimizer._optimizer_step_pre_hooks


class TestMeta:
    def test_parameters_that_were_materialised_since(self):
        model = nn.Linear(2, 2, device="meta")
        optimizer = torch.optim.AdamW(model.parameters())
        apply_decay_rules(optimizer, model, {"*": 0.1})
        model.to_empty(device="cpu")
        with pytest.raises(ValueError, match="on the meta device, which no step would ever move; build the groups"):
            optimizer.step()


def test_targets_are_what_the_reference_trains_on():
    assert loss_of(net()).item() == pytest.approx(((net()(torch.zeros(16, 4)) - TARGETS) ** 2).mean().item(), rel=2.0)
