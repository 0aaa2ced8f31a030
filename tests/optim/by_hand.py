"""An independent reference: their param groups, cut up by hand as the rules below say, and a plain training loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

RULES: dict[str, Any] = {"*.bias": 0.0, "1.*": 0.3, "2.weight": {"decay_mult": 2.0}, "*": 0.05}
LR_RULES: dict[str, Any] = {"2.*": {"lr_mult": 0.25}, "norm": {"modules": "LayerNorm", "lr_mult": 3.0}}
OWN = 0.1
"""The weight decay that the optimizers below have themselves."""
PIXELS = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randn(16, 3, generator=torch.Generator().manual_seed(2))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def decay_group(name: str) -> str:
    """What the rules make of a name."""
    return "bias" if name.endswith("bias") else "1" if name.startswith("1.") else "2" if name == "2.weight" else "rest"


def strength(group: str, own: float = OWN) -> float:
    return {"bias": 0.0, "1": 0.3, "2": 2.0 * own, "rest": 0.05}[group]


def factor(name: str) -> float:
    """What the lr rules make of a name."""
    return 0.25 if name.startswith("2.") else 3.0 if name.startswith("1.") else 1.0


def one_group(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def two_groups(model: Any) -> list[dict[str, Any]]:
    return [{"params": list(model[0].parameters())}, {"params": [*model[1].parameters(), *model[2].parameters()]}]


def cut(model: nn.Module, groups: list[dict[str, Any]], lr: Any = None) -> list[dict[str, Any]]:
    """The same groups with one for each decay group in them, in the order of their first members.

    Args:
        model: the model.
        groups: its param groups.
        lr: that of the optimizer, where lr rules are to cross.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = []
    for group in groups:
        members: dict[tuple[str, float], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            name = names[parameter]
            members.setdefault((decay_group(name), 1.0 if lr is None else factor(name)), []).append(parameter)
        own = group.get("weight_decay", OWN)
        for (name, lr_mult), params in members.items():
            lrs = {} if lr is None else {"lr": lr_mult * lr}
            found.append({**group, "params": params, "weight_decay": strength(name, own), **lrs})
    return found


def loss_of(model: nn.Module) -> torch.Tensor:
    return (model(PIXELS) - TARGETS).square().mean()


def train(model: nn.Module, optimizer: Any, steps: int = 4, *, closure: bool = False, after: Any = None) -> None:
    def compute() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for step in range(steps):
        if closure:
            optimizer.step(compute)
        else:
            compute()
            optimizer.step()
        if after is not None:
            after(step)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


class AsItWas:
    """Asserts that an optimizer is, outside of a step, what it was: list, dictionaries, order and members."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.list = optimizer.param_groups
        self.groups = list(optimizer.param_groups)
        self.members = [list(group["params"]) for group in self.groups]
        self.keys = [set(group) for group in self.groups]
        self.strengths = [group.get("weight_decay") for group in self.groups]

    def check(self, keys: bool = True) -> None:
        assert self.optimizer.param_groups is self.list
        assert len(self.list) == len(self.groups)
        assert all(one is other for one, other in zip(self.list, self.groups))
        for group, members in zip(self.groups, self.members):
            assert len(group["params"]) == len(members)
            assert all(one is other for one, other in zip(group["params"], members))
        if keys:
            assert [set(group) for group in self.groups] == self.keys
        assert [group.get("weight_decay") for group in self.groups] == self.strengths
