"""Resumes a run under FSDP2 with other groups: sharded_resume_run.py distributed|full OUT (2 processes)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import leave, trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from strategies.sharded_run import LitSharded, whole

from lightning_regdecay import DecayRule, WeightDecayMixin, WeightDecayMonitor
from lightning_regdecay.rules.schedules import DecaySchedule

SCHEDULE = DecaySchedule("linear", 0.0, 0.3, epochs=3)
SLOW = {"lr": 0.001}
RULES = [
    DecayRule(SCHEDULE, params="*scale", group="scale", options=SLOW),
    DecayRule(0.1, max_ndim=1, group="vectors"),
    DecayRule(SCHEDULE, group="matrices", options=SLOW),
]
# The same λ and lr of every parameter, in other groups and another order.
OTHER_GROUPS = [
    DecayRule(SCHEDULE, params="net.head.weight", group="head", options=SLOW),
    DecayRule(0.1, params=["net.up.bias", "net.norm.*"], group="first"),
    DecayRule(SCHEDULE, params=["*scale", "net.down.weight"], group="mixed", options=SLOW),
    DecayRule(0.1, max_ndim=1, group="last"),
    DecayRule(SCHEDULE, group="others", options=SLOW),
]
OTHER_STRENGTHS = [RULES[0], DecayRule(0.5, max_ndim=1, group="vectors"), RULES[2]]
JOINED = {"*": 0.1}


class Lit(WeightDecayMixin, LitSharded):
    def build_optimizer(self, param_groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(param_groups, lr=1e-2)

    def build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, step_size=3), "interval": "step"}


def fit(rules: Any, epochs: int, distributed: bool, ckpt_path: Path | None = None) -> tuple[Any, Any]:
    strategy = ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        save_distributed_checkpoint=distributed,
    )
    monitor = WeightDecayMonitor(every_n_steps=1, summary=False)
    options = {"devices": 2, "strategy": strategy, "use_distributed_sampler": False, "callbacks": [monitor]}
    run = trainer(max_epochs=epochs, **options)
    model = Lit("fsdp nested")
    model.decay_rules = rules
    run.fit(model, ckpt_path=ckpt_path)
    return run, model


def main(kind: str, out: Path) -> None:
    torch.set_num_threads(1)
    distributed = kind == "distributed"
    run, expected = fit(RULES, 3, distributed)
    history = run.callbacks[0].history
    run, _ = fit(RULES, 2, distributed)
    run.save_checkpoint(out / "checkpoint")
    resumed, model = fit(OTHER_GROUPS, 3, distributed, ckpt_path=out / "checkpoint")
    changed, _ = fit(OTHER_STRENGTHS, 3, distributed, ckpt_path=out / "checkpoint")
    try:
        fit(JOINED, 3, distributed, ckpt_path=out / "checkpoint")
        error = ""
    except ValueError as raised:
        error = str(raised)
    pairs = zip(model.parameters(), expected.parameters())
    (optimizer,) = resumed.optimizers
    report = {
        "as_never_stopped": all(torch.equal(whole(ours), whole(theirs)) for ours, theirs in pairs),
        "lrs": {group["name"]: group["lr"] for group in optimizer.param_groups},
        "keys": sorted({key for group in optimizer.param_groups for key in group}),
        "schedule": [record["decay/matrices/weight_decay"] for record in history],
        "resumed_schedule": [record["decay/others/weight_decay"] for record in resumed.callbacks[0].history[8:]],
        "changed": {group["name"]: group["weight_decay"] for group in changed.optimizers[0].param_groups},
        "joined": error,
    }
    (out / f"{run.global_rank}.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
