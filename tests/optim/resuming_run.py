"""A run with a checkpoint every other step, which may be killed: resuming_run.py OPTIMIZER NAME KILL_AT_STEP."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import torch
from helpers import LitHparams, digits_loader, leave, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_regdecay import WeightDecayMonitor

RULES = {"*.bias": 0.0, "head.*": 0.01, "*": {"schedule": "cosine", "start": 0.04, "end": 0.4}}


class ResumableLoader:
    """Goes on with the batch after the last one of the checkpoint."""

    def __init__(self, loader: DataLoader) -> None:
        self.batches = list(loader)
        self.done = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        start, self.done = self.done % len(self.batches), self.done % len(self.batches)
        for batch in self.batches[start:]:
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class KillAt(L.Callback):
    def __init__(self, step: str) -> None:
        self.step = step

    def on_train_start(self, trainer, pl_module):
        if trainer.global_step:
            print("resumed at step", trainer.global_step)

    def on_train_batch_end(self, trainer, *args):
        if str(trainer.global_step) == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Lit(LitHparams):
    def build_optimizer(self, param_groups):
        if sys.argv[1] == "AdamW":
            return torch.optim.AdamW(param_groups, lr=0.01)
        return torch.optim.SGD(param_groups, lr=0.01, momentum=0.9)

    def build_lr_scheduler(self, optimizer):
        return {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12), "interval": "step"}

    def train_dataloader(self):
        return ResumableLoader(digits_loader())


def main(name: str, kill_at: str) -> None:
    torch.set_num_threads(1)
    model = Lit(decay_rules=RULES)
    monitor = WeightDecayMonitor(every_n_steps=1, summary=False)
    checkpoint = ModelCheckpoint(name, filename="{step}", every_n_train_steps=2, save_top_k=1, save_last=True)
    last = Path(name) / "last.ckpt"
    run = trainer(max_epochs=3, callbacks=[monitor, checkpoint, KillAt(kill_at)], enable_checkpointing=True)
    run.fit(model, ckpt_path=last if last.exists() else None)
    weights = {key: value.tolist() for key, value in model.state_dict().items()}
    Path(f"{name}.json").write_text(json.dumps({"weights": weights, "history": monitor.history}))
    leave()


if __name__ == "__main__":
    main(*sys.argv[2:])
