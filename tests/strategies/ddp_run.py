"""Train with DDP or in one process and write down, per rank, what the monitor saw. Run by test_ddp.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from helpers import LitRules, float64_norm, leave, trainer
from lightning.pytorch.loggers import CSVLogger
from torch.distributed.tensor.debug import CommDebugMode

from lightning_regdecay import WeightDecayMonitor


class Counting(WeightDecayMonitor):
    """Counts the collectives of its own logging."""

    collectives = 0

    def _log(self, *args):
        with CommDebugMode() as mode:
            super()._log(*args)
        self.collectives += mode.get_total_counts()


def main(devices: int, out: Path) -> None:
    torch.set_num_threads(1)  # as DDP does, so that sums are added in the same order
    monitor = Counting(every_n_steps=3)
    # Both ranks train on all the data, so that the run is bit for bit the one of a single process.
    run = trainer(
        max_epochs=2,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        use_distributed_sampler=False,
        callbacks=[monitor],
        logger=CSVLogger(out, name="", version=f"logs{devices}"),
    )
    model = LitRules()
    run.fit(model)
    counted = 0
    if dist.is_initialized():
        with CommDebugMode() as mode:  # the counter counts
            dist.all_reduce(torch.ones(1))
        counted = mode.get_total_counts()
    truth = {group["name"]: float64_norm(group["params"]) for group in run.optimizers[0].param_groups}
    report = {
        "world_size": run.world_size,
        "history": monitor.history,
        "callback_metrics": {k: v.item() for k, v in run.callback_metrics.items() if k.startswith("decay/")},
        "groups": {group["name"]: group["decay_params"] for group in run.optimizers[0].param_groups},
        "truth": truth,
        "collectives": monitor.collectives,
        "counted_by_hand": counted,
    }
    (out / f"{devices}-{run.global_rank}.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
