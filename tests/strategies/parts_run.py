"""Trains with λ within tensors and toward a start, sharded: parts_run.py WAY OUT. Run by test_parts.py."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import digits, leave
from strategies.sharded_run import Net
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_regdecay import apply_decay_rules, groups_in_force
from lightning_regdecay.figures.measuring import Measurer, live_groups

LR = 0.01
RULES = {
    "up": {"params": "*up.*", "blocks": ["i", "f", "g"], "weight_decay": {"i": 0.1, "f": 0.0, "g": 0.5}},
    "columns": {"params": "*down.weight", "dim": 1, "rows": [0, 3, 4, 5, 11], "weight_decay": 0.4},
    "back": {"params": "*head.weight", "weight_decay": 0.3, "toward": "start"},
    "*": 0.05,
}


def rules_for(way: str) -> dict[str, Any]:
    """The rules; ZeroRedundancyOptimizer needs the start given."""
    if way != "zero":
        return RULES
    torch.manual_seed(0)
    return {
        **RULES,
        "back": {**RULES["back"], "toward": {f"module.{n}": p.detach() for n, p in Net().named_parameters()}},
    }


def masks(name: str, shape: torch.Size) -> torch.Tensor:
    """λ of every element, written down without the package."""
    strength = torch.full(shape, 0.05, dtype=torch.float64)
    if "up." in name:
        for block, decay in enumerate((0.1, 0.0, 0.5)):
            strength[4 * block : 4 * block + 4] = decay
    elif "down.weight" in name:
        strength[:, [0, 3, 4, 5, 11]] = 0.4
    elif "head.weight" in name:
        strength.fill_(0.3)
    return strength


def model_of(way: str) -> nn.Module:
    torch.manual_seed(0)
    net, world = Net(), dist.get_world_size()
    if way in ("ddp", "zero"):
        return nn.parallel.DistributedDataParallel(net)
    if way == "fsdp1":
        options: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
        net.up = FullyShardedDataParallel(net.up, **options)
        return FullyShardedDataParallel(net, **options)
    if way == "fsdp2":
        fully_shard(net.down)
        return fully_shard(net)
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(net, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fully_shard(net, mesh=mesh["data"]) if way == "fsdp2 tensor" else net


def whole(model: nn.Module, gradients: bool) -> dict[str, torch.Tensor]:
    """All parameters, or their gradients, gathered."""

    def read(model: nn.Module) -> dict[str, torch.Tensor]:
        found = {}
        for name, parameter in model.named_parameters():
            value: Any = parameter.grad if gradients else parameter.detach()
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")] = value.clone()
        return found

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=gradients):
            return read(model)
    return read(model)


class Reference:
    """AdamW or Adam on the gathered parameters, with decay by hand, element by element."""

    def __init__(self, kind: str, parameters: dict[str, torch.Tensor]) -> None:
        self.parameters = {name: nn.Parameter(value.clone()) for name, value in parameters.items()}
        self.start = parameters["head.weight"].clone()
        self.optimizer = getattr(torch.optim, kind)(self.parameters.values(), lr=LR, weight_decay=0.0, foreach=False)

    @torch.no_grad()
    def step(self, gradients: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            strength = masks(name, parameter.shape)
            parameter.grad = gradients[name].clone()
            if isinstance(self.optimizer, torch.optim.AdamW):
                parameter.mul_((1 - LR * strength).float())
                if name == "head.weight":
                    parameter.add_(self.start, alpha=LR * 0.3)
            else:
                pulled = parameter - self.start if name == "head.weight" else parameter
                for decay in strength.unique().tolist():
                    there = strength == decay
                    parameter.grad[there] = parameter.grad[there].add(pulled[there], alpha=decay)
        self.optimizer.step()


def optimizer_of(kind: str, way: str, model: nn.Module) -> Any:
    cls = getattr(torch.optim, kind)
    if way == "zero":
        return ZeroRedundancyOptimizer(model.parameters(), cls, lr=LR, weight_decay=0.05, foreach=False)
    return cls(model.parameters(), lr=LR, weight_decay=0.05, foreach=False)


def train(model: nn.Module, optimizer: Any, steps: int, reference: Reference | None = None) -> None:
    pixels, classes = digits(64)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels), classes).backward()
        if reference is not None:
            reference.step(whole(model, gradients=True))
        optimizer.step()


def figures(optimizer: Any, reference: Reference) -> dict[str, Any]:
    """Norms of the groups as they are measured, and in float64 from the gathered parameters."""
    measurer = Measurer(("l2_norm", "penalty", "distance"))
    live = dict(live_groups([optimizer]))
    with CommDebugMode() as mode:
        found = measurer.measure(live)
    truths: dict[str, float] = {}
    strengths = {"up.i": 0.1, "up.f": 0.0, "up.g": 0.5, "columns": 0.4, "back": 0.3, "rest": 0.05}
    for group, decay in strengths.items():
        chosen = []
        for name, parameter in reference.parameters.items():
            of_group = ("up." in name) == group.startswith("up.") and ("head.weight" in name) == (group == "back")
            if of_group:
                values = parameter.detach().double()
                chosen.append(values[masks(name, parameter.shape) == decay])
        truths[group] = torch.cat(chosen).norm().item()
    away = (reference.parameters["head.weight"].detach().double() - reference.start.double()).norm().item()
    return {"found": found, "truths": truths, "away": away, "collectives": mode.get_total_counts()}


def resumed(kind: str, way: str, flat: bool, out: Path) -> bool:
    """Whether a run that goes on from a checkpoint is that of one that was never stopped."""
    models = [model_of(way) for _ in range(2)]
    optimizers = [optimizer_of(kind, way, model) for model in models]
    for model, optimizer in zip(models, optimizers):
        apply_decay_rules(optimizer, model, RULES)
    train(models[0], optimizers[0], 2)
    options = torch.distributed.checkpoint.state_dict.StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, state = get_state_dict(models[0], optimizers[0], options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=out / f"{kind} {flat}")
    weights, state = get_state_dict(models[1], optimizers[1], options=options)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=out / f"{kind} {flat}")
    parts = {"model_state_dict": loaded["model"], "optim_state_dict": loaded["optimizer"]}
    set_state_dict(models[1], optimizers[1], **parts, options=options)
    for model, optimizer in zip(models, optimizers):
        train(model, optimizer, 2)
    ours, theirs = (whole(model, gradients=False) for model in models)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def main(way: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    report: dict[str, Any] = {}
    for kind in ("AdamW", "Adam"):
        model = model_of(way)
        optimizer = optimizer_of(kind, way, model)
        apply_decay_rules(optimizer, model, rules_for(way))
        reference = Reference(kind, whole(model, gradients=False))
        train(model, optimizer, 4, reference)
        ours = whole(model, gradients=False)
        report[kind] = {
            "as by hand": {name: torch.equal(ours[name], p) for name, p in reference.parameters.items()},
            "groups": {group["name"]: group["weight_decay"] for group in groups_in_force(optimizer)},
            **figures(optimizer, reference),
        }
        if way == "zero":
            with contextlib.suppress(ValueError):
                apply_decay_rules(optimizer_of(kind, way, model), model, RULES)
                raise AssertionError("a start that one process has alone")
        if way == "fsdp2":
            report[kind]["resumed"] = [resumed(kind, way, flat, out) for flat in (False, True)]
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
