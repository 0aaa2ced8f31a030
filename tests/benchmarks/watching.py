"""What the figures beside the norms cost: an event with more of them, and looking on at a step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import peak_memory, trainer
from measuring import Row, Sizes, against, seconds_in_turn
from norms import ONE_READ, type_name
from training import LitViT

from lightning_regdecay import GroupL2Norm, WeightDecayMonitor, groups_in_force
from lightning_regdecay.figures.measures import FIGURES, OF_A_STEP
from lightning_regdecay.figures.members import Member
from lightning_regdecay.figures.steps import Stepped, StepWatcher

COPY = "one copy, into new memory"
COPY_AND_READS = "one copy, into new memory, and 3 reads"
THE_STEP = "the step"
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
        stepped = {name: Stepped(list(map(Member, group["params"])), 0.0, False) for name, group in groups.items()}
        watcher = StepWatcher(lambda _: stepped, gradients=gradients, updates=updates)
        watcher.start_batch(True, True)
        return lambda: watcher.before(optimizer), lambda: watcher.after(optimizer)

    weights = [parameter.detach() for parameter in module.parameters()]
    read = torch.cat([weight.flatten() for weight in weights]).sum  # of one buffer: the fastest there is
    copies: list[torch.Tensor] = []

    def copy() -> None:
        copies.extend(weight.clone() for weight in weights)

    def read_thrice() -> None:
        copies.clear()
        for _ in range(3):
            read()

    metric = GroupL2Norm(groups)
    members = {name: group["params"] for name, group in groups.items()}
    looks = {
        "gradients": look(True, False),
        "updates": look(False, True),
        "norms of the weights": (lambda: None, lambda: metric.update(members)),
        ONE_READ: (lambda: None, read),
        COPY: (copy, copies.clear),
        COPY_AND_READS: (copy, read_thrice),
        THE_STEP: (lambda: None, lambda: None),
    }
    seconds = seconds_around(looks, optimizer.step, 2 * sizes.rounds)
    peers = {"gradients": ["norms of the weights", ONE_READ], "updates": [COPY, COPY_AND_READS]}
    for name, of_name in peers.items():
        for peer in (*of_name, THE_STEP):
            pair = {name: seconds[name], peer: seconds[peer]}
            goals = {COPY_AND_READS: "≤ 1"}
            yield from against(f"looking on at a step: {name}", "ViT-S", pair, name, goals)
    for dtype in (torch.float32, torch.bfloat16):
        yield memory(dtype, sizes)


def seconds_around(calls: dict[str, Any], step: Callable[[], Any], rounds: int) -> dict[str, float]:
    """The median time of what is done before and after a step, without the step, and of the step alone.

    A step is between the two, for all alike: it moves the weights, and leaves little of a copy in the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, (before, after) in calls.items():
            start = time.perf_counter()
            before()
            stepping = time.perf_counter()
            step()
            stepped = time.perf_counter()
            after()
            took = (stepped - stepping) if name == THE_STEP else time.perf_counter() - stepped + stepping - start
            if number:
                times[name].append(took)
    return {name: median(of_name) for name, of_name in times.items()}


def memory(dtype: torch.dtype, sizes: Sizes) -> Row:
    """The most memory that looking on at a step takes at a time, in copies of the weights."""
    weights = [torch.nn.Parameter(torch.ones(10**3 if sizes.small else 10**6, dtype=dtype)) for _ in range(20)]
    stepped = {"all": Stepped(list(map(Member, weights)), 0.0, False)}
    watcher = StepWatcher(lambda _: stepped, gradients=False, updates=True)
    watcher.start_batch(True, True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        watcher.before(None)
        with torch.no_grad():
            torch._foreach_mul_(weights, 0.5)
        watcher.after(None)
    copies = peak_memory(profile) / sum(weight.nbytes for weight in weights)
    what = f"memory of looking on at a step: updates, {type_name(dtype)}"
    return Row(what, f"20 tensors of {weights[0].numel():.0e}", f"{copies:.2f} copies", goal="1 copy")
