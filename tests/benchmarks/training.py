"""What the mixin and the monitor cost a training: an epoch with and without, an optimizer step over the groups."""

from __future__ import annotations

import itertools
import logging
import runpy
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import torch
from helpers import trainer
from measuring import Row, Sizes, against, seconds_in_turn, time_text
from models import VIT_RULES, ViT

from lightning_regdecay import WeightDecayMixin, WeightDecayMonitor, apply_decay_rules, build_decay_groups

EXAMPLES = Path(__file__).parents[2] / "examples"
WITHOUT = "groups by hand, no monitor"


class LitViT(WeightDecayMixin, ViT):
    decay_rules = VIT_RULES
    options: dict[str, Any] = {}

    def build_optimizer(self, param_groups: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(param_groups, **self.options)


def groups_by_hand(module: torch.nn.Module, rules: Any) -> list[dict[str, Any]]:
    """The same groups as one would write them, without names."""
    groups = build_decay_groups(module, rules)
    return [{"params": list(g.params.values()), "weight_decay": g.rule.weight_decay} for g in groups if g.rule]


def without_mixin(lit: type, rules: Any) -> type:
    """The same module with an optimizer over groups that are written by hand."""

    def configure_optimizers(self: Any) -> torch.optim.Optimizer:
        lr = self.hparams.get("lr", 1e-3)
        return torch.optim.AdamW(groups_by_hand(self, rules), lr=lr)

    return type(f"{lit.__name__}ByHand", (lit,), {"configure_optimizers": configure_optimizers})


class Stopwatch(L.Callback):
    """The time of each epoch but the first, validation included."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.starts.append(time.perf_counter())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.starts.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - start for start, end in itertools.pairwise(self.starts)][1:]


class TimedMonitor(WeightDecayMonitor):
    """Adds up the time of its own hooks, which is what a noisy machine still tells."""

    def __init__(self) -> None:
        super().__init__(summary=False)
        self.seconds = 0.0

    def on_train_batch_end(self, *args: Any) -> None:
        self._timed(super().on_train_batch_end, args)

    def on_validation_start(self, *args: Any) -> None:
        self._timed(super().on_validation_start, args)

    def on_train_epoch_end(self, *args: Any) -> None:
        self._timed(super().on_train_epoch_end, args)

    def _timed(self, hook: Callable[..., None], args: Any) -> None:
        start = time.perf_counter()
        hook(*args)
        self.seconds += time.perf_counter() - start


def rows(sizes: Sizes) -> Iterator[Row]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*number of training batches.*")
    example = runpy.run_path(str(EXAMPLES / "digits.py"))
    data = example["digits"]()[:2]
    rules = {"decay_rules": example["RULES"]}
    yield from epochs("digits example", example["LitDigits"], rules, example["RULES"], data, 21, 2 * sizes.rounds)
    vit = {"width": 24, "depth": 2, "heads": 2} if sizes.small else {}
    yield from epochs("ViT-S", LitViT, vit, VIT_RULES, (), 4, min(sizes.rounds, 4))
    yield from steps(sizes, vit)


def epochs(
    on: str, lit: type, arguments: dict[str, Any], rules: Any, data: tuple[Any, ...], max_epochs: int, rounds: int
) -> Iterator[Row]:
    """Epochs with mixin and monitor, against the same with neither, in turn."""
    by_hand = without_mixin(lit, rules)

    def fit(cls: type, *callbacks: L.Callback) -> list[float]:
        torch.manual_seed(0)
        stopwatch = Stopwatch()
        trainer(max_epochs=max_epochs, callbacks=[*callbacks, stopwatch]).fit(cls(**arguments), *data)
        return stopwatch.seconds()

    ways: dict[str, Callable[[], list[float]]] = {
        WITHOUT: lambda: fit(by_hand),
        "each epoch": lambda: fit(lit, WeightDecayMonitor(summary=False)),
        "every 50 steps": lambda: fit(lit, WeightDecayMonitor(every_n_steps=50, summary=False)),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name] += way()
    seconds = {name: median(of_name) for name, of_name in times.items()}
    for way, goal in (("each epoch", "≤ 1.01"), ("every 50 steps", "≤ 1.02")):
        pair = {way: seconds[way], WITHOUT: seconds[WITHOUT]}
        yield from against(f"an epoch, logged {way}", on, pair, way, {WITHOUT: goal})
    monitor = TimedMonitor()
    epoch = median(fit(lit, monitor))
    own = monitor.seconds / max_epochs
    yield Row("the monitor's hooks", on, time_text(own), "the epoch", time_text(epoch), own / epoch, "≤ 0.01")


def with_rules_in_its_steps(module: LitViT) -> torch.optim.Optimizer:
    """Two param groups of somebody else's, under the rules."""
    decay = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    optimizer = module.build_optimizer([{"params": decay}, {"params": others}])
    apply_decay_rules(optimizer, module, VIT_RULES)
    return optimizer


STEPS: dict[str, Callable[[LitViT], torch.optim.Optimizer]] = {
    "ours": lambda module: module.configure_optimizers(),
    "rules in the steps of theirs": with_rules_in_its_steps,
    "the same groups by hand": lambda module: module.build_optimizer(groups_by_hand(module, VIT_RULES)),
    "a group for each parameter": lambda module: module.build_optimizer(
        [{**group, "params": [p]} for group in groups_by_hand(module, VIT_RULES) for p in group["params"]]
    ),
}


def seconds_of_steps(
    ways: dict[str, Callable[[LitViT], Any]], kind: str, vit: dict[str, Any], sizes: Sizes
) -> dict[str, float]:
    """How long a step takes with each of some optimizers, in turn, each over a model of its own.

    Args:
        ways: make the optimizers.
        kind: the option that they are made with, ``"fused"`` or ``"foreach"``.
        vit: the arguments of the model.
        sizes: how often.
    """
    built = {}
    for name, build in ways.items():
        module = LitViT(**vit)
        module.options = {kind: True}
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        built[name] = module, build(module)
    return seconds_in_turn({name: optimizer.step for name, (_, optimizer) in built.items()}, 3 * sizes.rounds)


def steps(sizes: Sizes, vit: dict[str, Any]) -> Iterator[Row]:
    """An optimizer step over our groups, over the same by hand, and over a group for each parameter."""
    for kind in ("fused", "foreach"):
        seconds = seconds_of_steps(STEPS, kind, vit, sizes)
        theirs = seconds.pop("rules in the steps of theirs")
        yield from against(f"AdamW step, {kind}", "ViT-S", seconds, "ours", {"the same groups by hand": "1.00"})
        pair = {"ours": theirs, "the same groups by hand": seconds["the same groups by hand"]}
        yield from against(f"AdamW step, {kind}, rules in the steps of theirs", "ViT-S", pair, "ours", {})
    yield from by_element(sizes, vit)
    yield from many_groups(sizes)


def under(rules: Any) -> Callable[[LitViT], torch.optim.Optimizer]:
    """An optimizer with rules in its steps."""

    def build(module: LitViT) -> torch.optim.Optimizer:
        optimizer = module.build_optimizer(list(module.parameters()))
        apply_decay_rules(optimizer, module, rules)
        return optimizer

    return build


def toward_a_start_by_hand(module: LitViT) -> Any:
    """The same in a loop that one would write: a copy of the weights, and a line before the step."""
    optimizer = module.build_optimizer(list(module.parameters()))
    starts = [(p, p.detach().clone()) for p in module.parameters() if p.ndim > 1]
    step = optimizer.step

    @torch.no_grad()
    def with_decay() -> None:
        for parameter, start in starts:
            parameter.mul_(1 - 1e-3 * 0.05).add_(start, alpha=1e-3 * 0.05)
        step()

    optimizer.step = with_decay
    return optimizer


def by_element(sizes: Sizes, vit: dict[str, Any]) -> Iterator[Row]:
    """Steps that decay parts of tensors, and toward a start."""
    apart = {
        "attn": {"params": "*in_proj_weight", "blocks": ["q", "k", "v"], "weight_decay": {"q": 0, "k": 0.1, "v": 1}}
    }
    vectors = {"max_ndim": 1, "weight_decay": 0.0}
    ways: dict[str, Callable[[LitViT], Any]] = {
        "q, k and v apart": under({**apart, "vectors": vectors, "*": 0.05}),
        "toward a start": under({"vectors": vectors, "rest": {"params": "*", "weight_decay": 0.05, "toward": "start"}}),
        "whole tensors": under({"vectors": vectors, "*": 0.05}),
        "a start by hand": toward_a_start_by_hand,
    }
    for kind in ("fused", "foreach"):
        seconds = seconds_of_steps(ways, kind, vit, sizes)
        for name, peer in (("q, k and v apart", "whole tensors"), ("toward a start", "a start by hand")):
            pair = {name: seconds[name], peer: seconds[peer]}
            yield from against(f"AdamW step, {kind}, {name}", "ViT-S", pair, name, {})


def many_groups(sizes: Sizes) -> Iterator[Row]:
    """What the rules add to a step over many param groups of somebody else's, each cut in two."""
    count = 20 if sizes.small else 1500
    module = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(count)))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD([{"params": layer.parameters()} for layer in module], lr=0.0)
    by_hand = torch.optim.SGD([{"params": [parameter]} for parameter in module.parameters()], lr=0.0)
    apply_decay_rules(optimizer, module, {"*.bias": 0.0, "*": 0.1})
    steps = {"ours": optimizer.step, "the same groups by hand": by_hand.step}
    seconds = seconds_in_turn(steps, 3 * sizes.rounds)
    on = f"{count:,} groups cut in two"
    yield from against("SGD step, rules in the steps of theirs", on, seconds, "ours", {})
