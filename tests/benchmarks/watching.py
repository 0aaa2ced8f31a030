"""What the figures beside the norms cost: an event with more of them, and looking on at a step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import trainer
from measuring import Row, Sizes, against, seconds_in_turn
from training import LitViT

from lightning_regdecay import GroupL2Norm, WeightDecayMonitor, groups_in_force
from lightning_regdecay.figures.measures import FIGURES, OF_A_STEP
from lightning_regdecay.figures.steps import StepWatcher

WITHOUT_A_STEP = [name for name in FIGURES if name not in OF_A_STEP and name != "largest"]


def rows(sizes: Sizes) -> Iterator[Row]:
    vit = {"width": 24, "depth": 2, "heads": 2} if sizes.small else {}
    module = LitViT(**vit)
    run = trainer(max_epochs=1, limit_train_batches=1)
    run.fit(module)
    module.zero_grad()
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    [optimizer] = run.optimizers
    groups = {group["name"]: group for group in groups_in_force(optimizer)}

    def event(figures: Any) -> Any:
        monitor = WeightDecayMonitor(figures=figures, summary=False)
        monitor.setup(run, module, "fit")
        return lambda: monitor._metrics(run)

    events = {
        "norm, penalty, λ": event(None),
        "all that ask for no step": event(WITHOUT_A_STEP),
        "and the largest tensor": event([*WITHOUT_A_STEP, "largest"]),
    }
    seconds = seconds_in_turn(events, 2 * sizes.rounds)
    default = seconds.pop("norm, penalty, λ")
    for name, goal in (("all that ask for no step", "1.0"), ("and the largest tensor", "")):
        pair = {name: seconds[name], "norm, penalty, λ": default}
        yield from against(f"an event: {name}", "ViT-S", pair, name, {"norm, penalty, λ": goal})

    def look(gradients: bool, updates: bool) -> Any:
        watcher = StepWatcher(lambda _: groups, gradients=gradients, updates=updates)
        watcher.start_batch(True, True)

        def both() -> None:
            watcher.before(optimizer)
            watcher.after(optimizer)

        return both

    metric = GroupL2Norm(groups)
    members = {name: group["params"] for name, group in groups.items()}
    copies = [torch.empty_like(parameter) for parameter in module.parameters()]
    looks = {
        "gradients": look(True, False),
        "updates": look(False, True),
        "norms of the weights": lambda: metric.update(members),
        "one copy of the weights": lambda: torch._foreach_copy_(copies, list(module.parameters())),
        "the step": optimizer.step,
    }
    with torch.no_grad():
        seconds = seconds_in_turn(looks, 2 * sizes.rounds)
    for name in ("gradients", "updates"):
        for peer in ("norms of the weights", "one copy of the weights", "the step"):
            pair = {name: seconds[name], peer: seconds[peer]}
            yield from against(f"looking on at a step: {name}", "ViT-S", pair, name, {})
