"""What the field tests share: fits with rules in both ways, and optimizers that note the λ of their steps."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from helpers import LitBase, trainer
from torch import nn

from lightning_regdecay import WeightDecayMixin, WeightDecayRules

RULES = {"*.bias": 0.0, "*": 0.5}
OTHER = {"*.bias": 0.0, "*": 0.25}
LINEAR = {"*.bias": 0.0, "*": {"schedule": "linear", "start": 1.0, "end": 0.0}}
OWN = 0.1
"""The weight decay that the optimizers below have themselves."""
EPOCH = 4
"""The optimizer steps of an epoch of ``LitBase``."""
both_ways = pytest.mark.parametrize("way", ["mixin", "callback"])


class Log:
    """λ by parameter, for each step."""

    def __init__(self) -> None:
        self.steps: list[dict[nn.Parameter, float]] = []


def note(optimizer: Any) -> None:
    """Note what an optimizer uses; to be called by its step."""
    groups = optimizer.param_groups
    optimizer.log.steps.append({p: float(group["weight_decay"]) for group in groups for p in group["params"]})


class Notes:
    """Goes before an optimizer in the bases: notes, inside of the step, the λ that it uses."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **{"lr": 0.01, "weight_decay": OWN, **options})
        self.log = Log()

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        note(self)
        super().step()
        return loss


class MyAdamW(Notes, torch.optim.AdamW):
    pass


class MySGD(Notes, torch.optim.SGD):
    pass


class LitAdamW(LitBase):
    """A model as others write it."""

    def configure_optimizers(self) -> Any:
        return MyAdamW(self.parameters())


class LitKept(LitBase):
    """One that keeps its optimizer, so that a second fit goes on with its state."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = MyAdamW(self.parameters())

    def configure_optimizers(self) -> Any:
        return self.kept


class LitOwn(WeightDecayMixin, LitBase):
    """With an optimizer over the decay groups."""

    decay_rules = RULES

    def build_optimizer(self, param_groups):
        return MyAdamW(param_groups)


class LitManual(LitBase):
    """Steps its optimizers itself."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.zero_grad()
        self.manual_backward(self.training_step_loss(batch))
        for optimizer in optimizers:
            optimizer.step()


def with_rules(way: str, theirs: type, rules: Any) -> Any:
    """Their model, with the rules by the mixin; by the callback or without rules, their model alone."""
    return type("Ours", (WeightDecayMixin, theirs), {"decay_rules": rules})() if way == "mixin" else theirs()


def fit(model: Any, way: str, rules: Any, *callbacks: L.Callback, ckpt_path: Any = None, **options: Any) -> L.Trainer:
    run = trainer(callbacks=[*([WeightDecayRules(rules)] if way == "callback" else []), *callbacks], **options)
    run.fit(model, ckpt_path=ckpt_path)
    return run


def fitted(way: str, theirs: type, rules: Any, *callbacks: L.Callback, **options: Any) -> tuple[Any, L.Trainer]:
    model = with_rules(way, theirs, rules)
    return model, fit(model, way, rules, *callbacks, **options)


def used(model: nn.Module, optimizer: Any) -> list[dict[str, float]]:
    """λ by parameter name, for each step that was made."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [{names[p]: value for p, value in step.items()} for step in optimizer.log.steps]


def used_by_weights(model: nn.Module, optimizer: Any) -> list[float]:
    """λ of the head's weight, for each step that was made."""
    return [step["head.weight"] for step in used(model, optimizer)]


def strengths(model: nn.Module, rest: float) -> dict[str, float]:
    """What the rules above say, by parameter name."""
    return {name: 0.0 if name.endswith("bias") else rest for name, _ in model.named_parameters()}


def falling(steps: int, of: int) -> Any:
    """λ of the last steps of a run under the schedule above."""
    return pytest.approx([1 - i / of for i in range(of - steps, of)])
