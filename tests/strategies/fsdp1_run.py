"""Train under FSDP1, wrapped by hand, and write down, per rank, norms and truth. Run by test_fsdp1.py."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from helpers import digits, leave
from strategies.sharded_run import RULES, LitRules, Outer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor.debug import CommDebugMode

from lightning_regdecay import GroupL2Norm, build_decay_groups

CPU = torch.device("cpu")


def wrapped(strategy: str) -> nn.Module:
    """The model with a wrapper around one layer and one around all."""
    options: dict[str, Any] = {"sharding_strategy": ShardingStrategy[strategy], "use_orig_params": True}
    options["device_id"] = CPU
    if strategy == "HYBRID_SHARD":
        options["device_mesh"] = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    torch.manual_seed(0)
    model = Outer()
    model.net.up = FullyShardedDataParallel(model.net.up, **options)
    return FullyShardedDataParallel(model, **options)


def train(model: nn.Module, param_groups: list[dict[str, Any]]) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(param_groups, lr=1e-2)
    pixels, classes = digits(64)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels), classes).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def by_hand(model: nn.Module) -> list[dict[str, Any]]:
    net = model.module.net
    vectors = [net.up.module.bias, net.down.bias, net.norm.weight, net.norm.bias, net.head.bias]
    return [
        {"params": [net.scale], "weight_decay": 0.02},
        {"params": vectors, "weight_decay": 0.0},
        {"params": [net.up.module.weight], "weight_decay": 0.01},
        {"params": [net.down.weight, net.head.weight], "weight_decay": 0.05},
    ]


def norms(groups: list[Any]) -> dict[str, float]:
    metric = GroupL2Norm(group.name for group in groups)
    metric.update({group.name: group.params.values() for group in groups})
    return {name: norm.item() for name, norm in metric.compute().items()}


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def flat() -> dict[str, Any]:
    """What users are told where parameters cannot be told apart, and where they can from further out."""
    model = FullyShardedDataParallel(Outer(), use_orig_params=False, device_id=CPU)
    inside = FullyShardedDataParallel(Outer(), use_orig_params=True, device_id=CPU).module
    # As Lightning's FSDPStrategy does: the outermost wrapper is around the module, in the strategy's hands.
    lit = LitRules("one process")
    lit._trainer = SimpleNamespace(
        strategy=SimpleNamespace(model=FullyShardedDataParallel(lit, use_orig_params=True, device_id=CPU)), loggers=[]
    )
    return {
        "in a strategy": {group.name: list(group.params) for group in lit.decay_groups},
        "flat": message(lambda: build_decay_groups(model, RULES)),
        "unknown": message(lambda: build_decay_groups(inside, RULES)),
    }


def compare(strategy: str) -> dict[str, Any]:
    """Train and measure; the report."""
    model = wrapped(strategy)
    groups = build_decay_groups(model, RULES)
    ours = train(model, [group.as_param_group() for group in groups])
    hand_wrapped = wrapped(strategy)
    theirs = train(hand_wrapped, by_hand(hand_wrapped))
    with CommDebugMode() as mode:
        figures = norms(groups)
    here = sum(p.numel() for p in model.parameters())
    with FullyShardedDataParallel.summon_full_params(model):
        truths = {g.name: torch.cat([p.double().flatten() for p in g.params.values()]).norm().item() for g in groups}
        whole_figures = norms(groups)
        names = {group.name: list(group.params) for group in groups}
    return {
        "groups": names,
        "norms": figures,
        "norms_of_summoned": whole_figures,
        "truths": truths,
        "collectives": {str(op): count for op, count in mode.get_comm_counts().items()},
        "as_by_hand": all(map(torch.equal, ours, theirs)),
        "elements_here": here,
        "table": str(groups),
    }


def main(way: str, out: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    report = flat() if way == "flat" else compare(way)
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
