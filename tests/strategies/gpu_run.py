"""Train with one of Lightning's own strategies and write down, per rank, what the monitor saw. Run by test_gpu.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import leave, trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from strategies.sharded_run import LitRules, Net
from torch import nn

from lightning_regdecay import WeightDecayMonitor


class Lit(LitRules):
    def __init__(self) -> None:
        super().__init__("one process")

    def configure_model(self) -> None:
        """Nothing: the strategy wraps the module."""


def strategy(name: str) -> Any:
    if name.startswith("deepspeed"):
        return DeepSpeedStrategy(stage=int(name[-1]))
    if name in FSDP:
        return FSDPStrategy(sharding_strategy=name, auto_wrap_policy={nn.Linear}, use_orig_params=True)
    return name


FSDP = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")


def main(name: str, accelerator: str, devices: int, out: Path) -> None:
    torch.manual_seed(0)
    monitor = WeightDecayMonitor(every_n_steps=3)
    run = trainer(
        max_epochs=2,
        accelerator=accelerator,
        devices=devices,
        strategy=strategy(name),
        use_distributed_sampler=False,
        callbacks=[monitor],
    )
    run.fit(Lit())
    report = {
        "history": monitor.history,
        "groups": {group["name"]: group["decay_params"] for group in run.optimizers[0].param_groups},
        "elements": sum(parameter.numel() for parameter in Net().parameters()),
    }
    (out / f"{name}-{run.global_rank}.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
