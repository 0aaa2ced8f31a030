"""What the tests share: real data, small models, plain references."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_regdecay import WeightDecayMixin

# torch's own FSDP2 does not run on CPUs in older versions, such as 2.6.
FSDP2_RUNS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
RULES = {"*.bias": 0.0, "*norm*": 0.01, "head.*": 1e-3, "*": 0.05}


def digits(count: int = 256) -> tuple[Tensor, Tensor]:
    """Real handwritten digits: (count, 64) pixels from 0 to 1, and their classes."""
    pixels, classes = load_digits(return_X_y=True)
    return torch.tensor(pixels[:count], dtype=torch.float32) / 16, torch.tensor(classes[:count])


def digits_loader(count: int = 256, batch_size: int = 64) -> DataLoader:
    return DataLoader(TensorDataset(*digits(count)), batch_size=batch_size)


class Net(nn.Module):
    """A body with a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.norm(self.body(pixels)).relu())


class LitBase(L.LightningModule):
    """Trains on digits; the optimizer is up to subclasses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(64, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        pixels, classes = batch
        loss = nn.functional.cross_entropy(self.head(self.norm(self.body(pixels)).relu()), classes)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step_loss(batch))

    def training_step_loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.norm(self.body(batch[0])).relu()), batch[1])

    def train_dataloader(self) -> DataLoader:
        return digits_loader()


class LitWithBackbone(LitBase):
    """With a backbone, as Lightning's finetuning callbacks want it; the optimizer is up to subclasses."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(self.body, nn.BatchNorm1d(16))
        del self.body

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.norm(self.backbone(batch[0])).relu()), batch[1])


class LitRules(WeightDecayMixin, LitBase):
    """With rules from the class."""

    decay_rules = RULES


class LitHparams(WeightDecayMixin, LitBase):
    """With rules and learning rate as hyperparameters."""

    def __init__(self, lr: float = 1e-3, decay_rules: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


class SAM(torch.optim.Optimizer):
    """As published: shares the groups of the optimizer inside."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old"] = p.clone()
                    p.add_(p.grad, alpha=group["rho"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if "old" in self.state[p]:
                    p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        closure()
        self.first_step()
        closure()
        self.second_step()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


def trainer(**options: Any) -> L.Trainer:
    """A quiet Trainer on the CPU."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{**defaults, **options})


def float64_norm(tensors: Any) -> float:
    """The L2 norm by the plainest route: every element as float64."""
    return float(sum((t.detach().cpu().to(torch.complex128).abs() ** 2).sum() for t in tensors)) ** 0.5


def members(groups: Any) -> dict[str, list[str]]:
    """Group name to the names of its parameters."""
    return {group.name: list(group.params) for group in groups}


def peak_memory(profile: torch.profiler.profile) -> int:
    """The most bytes that were allocated at a time while the profile was taken."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events)
    return max(itertools.accumulate(change for _, change in changes))


def leave() -> None:
    """End this process of a distributed run, which has done its work.

    At once, without Python's and torch's own end: on a busy machine torch 2.13 with gloo at times aborts there
    ("terminate called without an active exception"), though the process group is destroyed.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def run_python(*args: Any, cwd: Path, timeout: float, may_abort: bool = False, returncode: int = 0, **env: str) -> str:
    """Run Python in a process group of its own, which is gone when this returns; the output, or an AssertionError.

    With ``may_abort`` the abort that :func:`leave` avoids is no error.
    """
    process = subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.terminate()  # torchrun's workers are in sessions of their own: it ends them itself
            process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    aborted = may_abort and "terminate called without an active exception" in output
    assert process.returncode == returncode or aborted, output
    return output
