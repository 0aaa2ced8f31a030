"""A program with a command line, and its models: ``python cli_run.py CLI MODEL SUBCOMMAND …``."""

from __future__ import annotations

import json
import sys
from typing import Any

import lightning as L
import torch
from helpers import RULES, LitBase, digits_loader
from lightning.pytorch.cli import LightningCLI, LRSchedulerCallable, OptimizerCallable

from lightning_regdecay import WeightDecayMixin
from lightning_regdecay.cli import WeightDecayCLI

QUIET = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class LitTyped(WeightDecayMixin, LitBase):
    """With rules as an argument."""

    def __init__(self, lr: float = 1e-3, decay_rules: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()


class LitClassRules(LitTyped):
    """With rules of the class too."""

    decay_rules = RULES


class LitCallables(WeightDecayMixin, LitBase):
    """With the optimizer and the scheduler as arguments."""

    decay_rules = RULES

    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable = torch.optim.lr_scheduler.ConstantLR,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler


class LitPlain(LitBase):
    """Without the mixin."""


class Digits(L.LightningDataModule):
    """Says when it is made."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        print("data made")
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return digits_loader(batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return digits_loader(batch_size=self.batch_size)


def report(trainer: L.Trainer) -> dict[str, Any]:
    """What a run trained with: group name to λ and lr, the classes of optimizer and scheduler."""
    (optimizer,) = trainer.optimizers
    return {
        "optimizer": type(optimizer).__name__,
        "groups": {group.get("name"): [group["weight_decay"], group["lr"]] for group in optimizer.param_groups},
        "lr_schedulers": [[type(c.scheduler).__name__, c.monitor] for c in trainer.lr_scheduler_configs],
    }


if __name__ == "__main__":
    cli_class = {"LightningCLI": LightningCLI, "WeightDecayCLI": WeightDecayCLI}[sys.argv.pop(1)]
    cli = cli_class(globals()[sys.argv.pop(1)], Digits, save_config_callback=None, trainer_defaults=QUIET)
    if cli.trainer is not None:
        cli.trainer.save_checkpoint("model.ckpt")
        print(json.dumps(report(cli.trainer)))
