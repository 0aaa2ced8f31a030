"""Train with DeepSpeed's own engine on the CPU and write down, per rank, norms and truth. Run by test_zero.py."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from helpers import digits, leave
from strategies.sharded_run import RULES, Outer
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from lightning_regdecay import WeightDecayMonitor, apply_decay_rules, build_decay_groups, schedule_weight_decay
from lightning_regdecay.rules.schedules import DecaySchedule

SCHEDULE = DecaySchedule("linear", 0.0, 0.1, steps=10)


class Run:
    """What the monitor reads of a Trainer, which refuses DeepSpeed on a CPU."""

    global_step = 3

    def __init__(self, optimizer: Any, engine: Any) -> None:
        self.optimizers = [optimizer]
        self.strategy = SimpleNamespace(model=engine)


BLOCKS = {"up": {"params": "*up.weight", "blocks": 3, "weight_decay": 0.1}, "*": 0.05}
TOWARD = {"*": {"weight_decay": 0.1, "toward": "start"}}


def refusal(rules: Any, config: dict[str, Any]) -> str:
    """What is said of rules that DeepSpeed would step past, where they were in force before it came."""
    model = Outer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    apply_decay_rules(optimizer, model, rules)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    pixels, classes = digits(32)
    try:
        engine.backward(nn.functional.cross_entropy(engine(pixels), classes))
        engine.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def main(stage: int, out: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 32,
        # Small sub-groups: ZeRO-3 then makes several calls of the optimizer for one step of a group.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 100},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    torch.manual_seed(0)
    # ZeRO-3 partitions the parameters while the modules are made, as Lightning's configure_model does.
    with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.float32, enabled=stage == 3):
        model = Outer()
    groups = build_decay_groups(model, [*RULES[:3], replace(RULES[3], weight_decay=SCHEDULE)])
    optimizer = torch.optim.AdamW([group.as_param_group() for group in groups], lr=1e-2)
    schedule_weight_decay(optimizer)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    pixels, classes = digits(96)
    pixels = pixels.to(model.net.up.weight.dtype)  # zero.Init makes bfloat16 of them
    part = slice(32 * dist.get_rank(), 32 * dist.get_rank() + 32)
    for _ in range(3):
        engine.backward(nn.functional.cross_entropy(engine(pixels[part]), classes[part]))
        engine.step()

    live = next(group for group in optimizer.param_groups if group["name"] == "linear")["weight_decay"]
    monitor = WeightDecayMonitor(summary=False)
    model.automatic_optimization = True  # as a LightningModule
    trainer = Run(optimizer, engine)
    monitor.on_train_start(trainer, model)
    with CommDebugMode() as mode:
        metrics = monitor._metrics(trainer)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        truths = {g.name: torch.cat([p.double().flatten() for p in g.params.values()]).norm().item() for g in groups}
        gathered = monitor._metrics(trainer)
    report = {
        "by element": [refusal(rules, config) for rules in (BLOCKS, TOWARD)] if stage < 3 else [],
        "groups": {group.name: list(group.params) for group in groups},
        "table": str(groups),
        "norms": {name: metrics[f"decay/{name}/l2_norm"] for name in truths},
        "norms_of_gathered": {name: gathered[f"decay/{name}/l2_norm"] for name in truths},
        "weight_decay_of_the_third_step": live,
        "weight_decay": {name: metrics[f"decay/{name}/weight_decay"] for name in truths},
        "truths": truths,
        "collectives": {str(op): count for op, count in mode.get_comm_counts().items()},
    }
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
