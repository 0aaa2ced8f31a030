"""Whatever happens to an optimizer under rules, its steps are those of one whose groups are written by hand before."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from optim.by_hand import OWN, AsItWas, loss_of, weights
from torch import Tensor, nn

from lightning_regdecay import apply_decay_rules, groups_in_force

EVENTS = 40


class Growing(nn.Module):
    """A body with a norm, a head, and layers that come later."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)
        self.later = nn.ModuleList()

    def forward(self, pixels: Tensor) -> Tensor:
        found = self.head(self.norm(self.body(pixels)).tanh())
        for layer in self.later:
            found = found + layer(found)
        return found


def of_three(name, own):
    return 0.0 if name.endswith(".bias") else 0.5 * own if name.startswith("norm.") else 0.2


def of_two(name, own):
    return 0.3 if name.startswith("body.") else 2.0 * own


def of_weights(name, own):
    return 0.25 * own if name.endswith(".weight") else own


RULES = (
    ({"*.bias": 0.0, "norm.*": {"decay_mult": 0.5}, "*": 0.2}, of_three),
    ({"body.*": 0.3, "*": {"decay_mult": 2.0}}, of_two),
    ({"*.weight": {"decay_mult": 0.25}}, of_weights),
)
"""Each with the λ of a parameter by its name and what its group has."""
LR_RULES = (
    (None, lambda name: 1.0),
    (
        {"head.*": {"lr_mult": 2.0}, "*norm*": {"lr_mult": 0.5}},
        lambda name: {"head": 2.0, "norm": 0.5}.get(name[:4], 1.0),
    ),
    ({"weights": {"params": "*.weight", "lr_mult": 0.25}}, lambda name: 0.25 if name.endswith("weight") else 1.0),
)
"""Each with the factor on the lr of a parameter by its name."""


def of_each(model, groups):
    """λ and lr of every parameter, by its name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (group["weight_decay"], group["lr"]) for group in groups for p in group["params"]}


def sgd(groups, foreach):
    return torch.optim.SGD(groups, lr=0.05, weight_decay=OWN, momentum=0.9, foreach=foreach)


def adamw(groups, foreach):
    return torch.optim.AdamW(groups, lr=0.02, weight_decay=OWN, foreach=foreach)


class Life:
    """A model whose optimizer is under rules, and its twin, whose groups are written by hand before each step."""

    def __init__(self, build, seed):
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.model = Growing()
        self.twin = copy.deepcopy(self.model)
        foreach = self.random.random() < 0.5
        self.optimizer = build(self.two_groups(), foreach)
        self.rules, self.strength = RULES[0]
        self.lr_rules, self.factor = self.random.choice(LR_RULES)
        self.again()
        self.by_hand = build([{"params": list(self.twin.parameters())}], foreach)
        self.steps_done = 0

    def two_groups(self):
        first = [*self.model.body.parameters(), *self.model.norm.parameters()]
        return [{"params": first}, {"params": list(self.model.head.parameters()), "lr": 0.03}]

    def names(self):
        return {parameter: name for name, parameter in self.model.named_parameters()}

    def twin_of(self, parameter):
        return self.twin.get_parameter(self.names()[parameter])

    def a_group(self):
        return self.random.choice(self.optimizer.param_groups)

    # What happens between steps.

    def lr(self):
        self.a_group()["lr"] = self.random.choice([0.01, 0.02, 0.05])

    def weight_decay(self):
        self.a_group()["weight_decay"] = self.random.choice([0.1, 0.3, 0.6])

    def load(self):
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))

    def deepcopy(self):
        self.model, self.optimizer = copy.deepcopy((self.model, self.optimizer))
        self.again()

    def pickle(self):
        self.model, self.optimizer = pickle.loads(pickle.dumps((self.model, self.optimizer)))
        self.again()

    def again(self):
        apply_decay_rules(self.optimizer, self.model, self.rules, lr_rules=self.lr_rules, strict=False)

    def other_rules(self):
        self.rules, self.strength = self.random.choice(RULES)
        self.lr_rules, self.factor = self.random.choice(LR_RULES)
        self.again()

    def add(self):
        layer = nn.Linear(3, 3)
        self.model.later.append(layer)
        self.twin.later.append(copy.deepcopy(layer))
        self.optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.01})

    def move(self):
        source, target = self.a_group()["params"], self.a_group()["params"]
        if len(source) > 1:
            target.append(source.pop(self.random.randrange(len(source))))

    def freeze(self):
        name = self.random.choice(list(self.names().values()))
        trains = self.random.random() < 0.5
        for model in (self.model, self.twin):
            model.get_parameter(name).requires_grad_(trains)
            model.get_parameter(name).grad = None

    def delete(self):
        if len(self.optimizer.param_groups) > 2:
            for parameter in self.optimizer.param_groups.pop()["params"]:
                self.optimizer.state.pop(parameter, None)
                self.by_hand.state.pop(self.twin_of(parameter), None)

    # Steps: each in both, in the way that its name says.

    def step(self):
        self.step_both(self.with_gradients)

    def closure(self):
        self.step_both(lambda model, optimizer: optimizer.step(self.computing(model, optimizer)))

    def closure_that_raises(self):
        def fail(model, optimizer):
            def compute():
                self.computing(model, optimizer)()
                raise FloatingPointError

            with pytest.raises(FloatingPointError):
                optimizer.step(compute)

        self.step_both(fail)

    def step_of_the_class(self):
        self.step_both(lambda model, optimizer: type(optimizer).step(optimizer, self.computing(model, optimizer)))

    def step_with_a_hook(self):
        count, seen = len(self.optimizer.param_groups), []

        def hooked(model, optimizer):
            before = optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(len(optimizer.param_groups)))
            after = optimizer.register_step_post_hook(lambda optimizer, *_: seen.append(len(optimizer.param_groups)))
            self.with_gradients(model, optimizer)
            before.remove()
            after.remove()

        self.step_both(hooked)
        assert seen[:2] == [count] * 2

    def step_with_a_hook_that_steers(self):
        group, lr = self.random.randrange(len(self.optimizer.param_groups)), self.random.choice([0.01, 0.02])

        def steered(model, optimizer):
            def steer(optimizer, *_):
                optimizer.param_groups[group]["lr"] = lr

            handle = optimizer.register_step_pre_hook(steer)
            self.with_gradients(model, optimizer)
            handle.remove()

        self.step_both(steered, self.with_gradients)

    def with_gradients(self, model, optimizer):
        self.computing(model, optimizer)()
        optimizer.step()

    def computing(self, model, optimizer):
        def compute():
            model.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        return compute

    def step_both(self, drive, drive_by_hand=None):
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            for model in (self.model, self.twin):
                model.requires_grad_(True)
        before = AsItWas(self.optimizer)
        drive(self.model, self.optimizer)
        before.check()
        self.by_hand.param_groups[:] = self.groups_by_hand()
        (drive_by_hand or drive)(self.twin, self.by_hand)
        assert all(map(torch.equal, weights(self.model), weights(self.twin)))
        assert of_each(self.model, groups_in_force(self.optimizer)) == of_each(self.twin, self.by_hand.param_groups)
        self.steps_done += 1

    def groups_by_hand(self):
        """Theirs, a group for each parameter."""
        names = self.names()
        return [
            {
                **group,
                "params": [self.twin.get_parameter(names[parameter])],
                "weight_decay": self.strength(names[parameter], group["weight_decay"]),
                "lr": self.factor(names[parameter]) * group["lr"],
            }
            for group in self.optimizer.param_groups
            for parameter in group["params"]
        ]


BETWEEN = (
    *(Life.lr, Life.weight_decay, Life.load, Life.deepcopy, Life.pickle, Life.again, Life.other_rules),
    *(Life.add, Life.move, Life.freeze, Life.delete),
)
STEPS = (
    *(Life.step, Life.closure, Life.closure_that_raises),
    *(Life.step_of_the_class, Life.step_with_a_hook, Life.step_with_a_hook_that_steers),
)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("build", [sgd, adamw])
@pytest.mark.parametrize("seed", range(25))
def test_is_that_of_groups_by_hand(build, seed):
    life = Life(build, seed)
    events = []
    for _ in range(EVENTS):
        event = life.random.choice(life.random.choice([BETWEEN, STEPS]))
        events.append(event.__name__)
        try:
            event(life)
        except BaseException as error:
            raise AssertionError(f"after {', '.join(events)}") from error
    assert life.steps_done > 5
