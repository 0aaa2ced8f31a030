"""Train a sharded model and write down, per rank, what the monitor saw and what is true. Run by test_sharded.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import torch
from helpers import digits_loader, leave, trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_regdecay import DecayRule, WeightDecayMixin, WeightDecayMonitor

RULES = [
    DecayRule(0.02, params="*scale", group="scale"),
    DecayRule(0.0, max_ndim=1, group="vectors"),
    DecayRule(0.01, where=lambda name, parameter, module: name.startswith("net.up"), group="up"),
    DecayRule(0.05, modules=nn.Linear, group="linear"),
]
EXPECTED = {
    "scale": ["net.scale"],
    "vectors": ["net.up.bias", "net.down.bias", "net.norm.weight", "net.norm.bias", "net.head.bias"],
    "up": ["net.up.weight"],
    "linear": ["net.down.weight", "net.head.weight"],
}


class Net(nn.Module):
    """Two layers that tensor parallelism cuts by columns and rows, a norm, and a head of ten rows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))  # one element: most ranks hold nothing of it
        self.up = nn.Linear(64, 12)
        self.down = nn.Linear(12, 20)
        self.norm = nn.LayerNorm(20)
        self.head = nn.Linear(20, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.norm(self.down(self.up(pixels).relu()))) * self.scale


class Outer(nn.Module):
    """Holds the network where a LightningModule would."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(pixels)


class LitSharded(L.LightningModule):
    """Shards itself in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.net = Net()

    def configure_model(self) -> None:
        if self.way == "one process":
            return
        mesh = self.device_mesh
        options: dict[str, Any] = {"mesh": mesh["data_parallel"], "reshard_after_forward": "keep" not in self.way}
        if "tensor" in self.way:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(self.net, mesh["tensor_parallel"], plan)
        if "hybrid" in self.way:
            options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        if "mixed" in self.way:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        if "nested" in self.way:
            for part in (self.net.up, self.net.down):
                fully_shard(part, **options)
        fully_shard(self.net, **options)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])

    def train_dataloader(self) -> Any:
        return digits_loader()


class Recording(torch.optim.AdamW):
    """Notes what a step really did to the whole parameters of each group, in float64."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        before = [flat(group["params"]) for group in self.param_groups]
        gradients = [flat([p.grad for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        super().step()
        self.truth = {}
        for group, old, gradient in zip(self.param_groups, before, gradients):
            new, tensors = flat(group["params"]), [whole(p).double() for p in group["params"]]
            cosine = torch.dot(old / old.norm(), new / new.norm())
            self.truth[group["name"]] = {
                "grad_norm": gradient.norm().item(),
                "update_ratio": ((new - old).norm() / old.norm()).item(),
                "angle": torch.acos(cosine.clamp(max=1.0)).item(),
                "rms": (new.norm() / new.numel() ** 0.5).item(),
                "largest": max((t.norm() / t.numel() ** 0.5).item() for t in tensors),
                "decay_share": group["lr"] * group["weight_decay"] * (old.norm() / (new - old).norm()).item(),
            }
        return loss


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([whole(tensor).double().flatten() for tensor in tensors])


class LitRules(WeightDecayMixin, LitSharded):
    decay_rules = RULES

    def build_optimizer(self, param_groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return Recording(param_groups, lr=1e-2)


class LitByHand(LitSharded):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        net = self.net
        vectors = [net.up.bias, net.down.bias, net.norm.weight, net.norm.bias, net.head.bias]
        groups = [
            {"params": [net.scale], "weight_decay": 0.02},
            {"params": vectors, "weight_decay": 0.0},
            {"params": [net.up.weight], "weight_decay": 0.01},
            {"params": [net.down.weight, net.head.weight], "weight_decay": 0.05},
        ]
        return torch.optim.AdamW(groups, lr=1e-2)


class Watching(WeightDecayMonitor):
    """Writes down the truth beside each event, and counts the collectives of the event."""

    def __init__(self) -> None:
        super().__init__(every_n_steps=3, figures="all")
        self.steps: list[dict[str, dict[str, float]]] = []
        self.truths: list[dict[str, float]] = []
        self.collectives: list[dict[str, int]] = []

    def _metrics(self, run: L.Trainer) -> dict[str, float]:
        with CommDebugMode() as mode:
            metrics = super()._metrics(run)
        self.collectives.append({str(op): count for op, count in mode.get_comm_counts().items()})
        [optimizer] = run.optimizers
        self.truths.append({group["name"]: true_norm(group["params"]) for group in optimizer.param_groups})
        self.steps.append(optimizer.truth)
        return metrics


def whole(parameter: Tensor) -> Tensor:
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach()


def true_norm(parameters: list[Tensor]) -> float:
    """Of the whole parameters, gathered, in float64."""
    return flat(parameters).norm().item()


def fit(model: L.LightningModule, devices: int, **options: Any) -> L.Trainer:
    strategy = "auto"
    if devices > 1:
        tensor = 2 if "tensor" in model.way else 1
        strategy = ModelParallelStrategy(
            data_parallel_size=devices // tensor, tensor_parallel_size=tensor, process_group_backend="gloo"
        )
    run = trainer(max_epochs=2, devices=devices, strategy=strategy, use_distributed_sampler=False, **options)
    run.fit(model)
    return run


def main(way: str, devices: int, out: Path) -> None:
    torch.set_num_threads(1)
    monitor = Watching()
    model = LitRules(way)
    run = fit(model, devices, callbacks=[monitor])
    by_hand = LitByHand(way)
    fit(by_hand, devices)
    pairs = zip(model.parameters(), by_hand.parameters())
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    report = {
        "world_size": run.world_size,
        "groups": {group["name"]: group["decay_params"] for group in run.optimizers[0].param_groups},
        "weight_decay": {group["name"]: group["weight_decay"] for group in run.optimizers[0].param_groups},
        "history": monitor.history,
        "truths": monitor.truths,
        "steps": monitor.steps,
        "largest": monitor.largest,
        "collectives": monitor.collectives,
        "as_by_hand": all(torch.equal(whole(ours), whole(theirs)) for ours, theirs in pairs),
        "elements_here": sum(part.numel() for part in parts),
        "empty_parts": sum(part.numel() == 0 for part in parts),
        "types": sorted({type(p).__name__ for p in model.parameters()}),
    }
    (out / f"{run.global_rank}.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
