"""Trains with the rules in force in optimizers of others: theirs_run.py OUT (2 processes). Run by test_theirs.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import torch
from helpers import FSDP2_RUNS_ON_CPU, LitBase, leave, trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from strategies.sharded_run import LitSharded, whole
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_regdecay import DecayRule, WeightDecayMixin, WeightDecayMonitor, WeightDecayRules, groups_in_force
from lightning_regdecay.rules.schedules import DecaySchedule

STRENGTHS = {"*.bias": 0.0, "*norm*": {"decay_mult": 0.5}, "*": 0.3}
LR_RULES = {"*head*": {"lr_mult": 0.5}}
FALLING = [DecayRule(0.0, params="*.bias"), DecayRule(DecaySchedule("linear", 0.6, 0.0), group="rest")]


def by_hand(model: torch.nn.Module, theirs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A param group for each part of theirs, with the λ of STRENGTHS and the lr of LR_RULES."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = []
    for group in theirs:
        kinds: dict[float, list[torch.Tensor]] = {}
        for parameter in group["params"]:
            name = names[parameter]
            norm = "norm" in name
            strength = 0.0 if name.endswith(".bias") else 0.5 * group.get("weight_decay", 0.1) if norm else 0.3
            kinds.setdefault(strength, []).append(parameter)
        # All of the head are in one group, the second one.
        lr = {"lr": 0.5 * group["lr"]} if "head" in names[group["params"][0]] else {}
        found += [{**group, "params": params, "weight_decay": strength, **lr} for strength, params in kinds.items()]
    return found


class Theirs:
    """Configures two param groups."""

    def their_groups(self) -> list[dict[str, Any]]:
        head = [p for name, p in self.named_parameters() if "head" in name]
        others = [p for name, p in self.named_parameters() if "head" not in name]
        return [{"params": others}, {"params": head, "lr": 2e-2, "weight_decay": 0.2}]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.their_groups(), lr=1e-2, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class LitTheirs(Theirs, LitSharded):
    pass


class LitTheirsByHand(LitTheirs):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(by_hand(self, self.their_groups()), lr=1e-2, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class LitRuled(WeightDecayMixin, LitTheirs):
    decay_rules = STRENGTHS
    lr_rules = LR_RULES


class LitFalling(WeightDecayMixin, LitTheirs):
    decay_rules = FALLING


class LitZero(Theirs, LitBase):
    """Under ZeroRedundancyOptimizer, with a param group that is added."""

    def groups(self) -> list[dict[str, Any]]:
        return self.their_groups()

    def configure_optimizers(self) -> Any:
        first, *others = self.groups()
        cut = ZeroRedundancyOptimizer([first], optimizer_class=torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
        for group in others:
            cut.add_param_group(group)
        return cut


class LitZeroByHand(LitZero):
    def groups(self) -> list[dict[str, Any]]:
        return by_hand(self, self.their_groups())


def fit(model: L.LightningModule, strategy: Any, epochs: int = 2, ckpt_path: Path | None = None, **more: Any) -> Any:
    run = trainer(max_epochs=epochs, devices=2, strategy=strategy, use_distributed_sampler=False, **more)
    run.fit(model, ckpt_path=ckpt_path)
    return run


def sharded(distributed: bool = True) -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="gloo",
        save_distributed_checkpoint=distributed,
    )


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(whole(p), whole(q)) for p, q in zip(a.parameters(), b.parameters()))


def history(model: L.LightningModule, epochs: int, ckpt_path: Path | None = None) -> list[float]:
    monitor = WeightDecayMonitor(every_n_steps=1, summary=False)
    fit(model, sharded(), epochs, ckpt_path, callbacks=[monitor])
    return [record["decay/0.rest/weight_decay"] for record in monitor.history]


def fsdp2(out: Path) -> dict[str, Any]:
    ruled, hand, carried = LitRuled("fsdp nested"), LitTheirsByHand("fsdp nested"), LitTheirs("fsdp nested")
    run = fit(ruled, sharded())
    fit(hand, sharded())
    fit(carried, sharded(), callbacks=[WeightDecayRules(STRENGTHS, lr_rules=LR_RULES)])
    run.save_checkpoint(out / "ruled")
    old = fit(LitTheirs("fsdp nested"), sharded())
    old.save_checkpoint(out / "old")
    (optimizer,) = run.optimizers
    report = {
        "as by hand": equal(ruled, hand),
        "callback as by hand": equal(carried, hand),
        "groups": len(optimizer.param_groups),
        "keys": sorted(optimizer.param_groups[0].keys() - old.optimizers[0].param_groups[0].keys()),
        "in force": {group["name"]: group["weight_decay"] for group in groups_in_force(optimizer)},
    }
    # With rules, without, and with others: all from either checkpoint.
    from_old, from_ruled = LitRuled("fsdp nested"), LitTheirs("fsdp nested")
    fit(from_old, sharded(), 3, out / "old")
    fit(from_ruled, sharded(), 3, out / "ruled")
    report["rules added"] = [group["weight_decay"] for group in fit_in_force(from_old)]
    report["whole"] = history(LitFalling("fsdp nested"), 3)
    falling = LitFalling("fsdp nested")
    fit(falling, sharded(), 2).save_checkpoint(out / "falling")
    report["resumed"] = history(LitFalling("fsdp nested"), 3, out / "falling")
    fit(LitTheirs("fsdp nested"), sharded(), 3, out / "falling")
    report["schedule added"] = history(LitFalling("fsdp nested"), 3, out / "old")
    fit(LitTheirs("fsdp nested"), sharded(distributed=False)).save_checkpoint(out / "in one file")
    report["schedule added, in one file"] = history(LitFalling("fsdp nested"), 3, out / "in one file")
    return report


def fit_in_force(model: Any) -> list[dict[str, Any]]:
    return groups_in_force(model.trainer.optimizers[0])


def zero_redundancy(out: Path) -> dict[str, Any]:
    ruled = LitZero()
    fit(ruled, "ddp", callbacks=[WeightDecayRules(STRENGTHS, lr_rules=LR_RULES)])
    hand = LitZeroByHand()
    run = fit(hand, "ddp")
    mixed = type("Mixed", (WeightDecayMixin, LitZero), {"decay_rules": STRENGTHS, "lr_rules": LR_RULES})()
    mixed_run = fit(mixed, "ddp")
    return {
        "as by hand": equal(ruled, hand),
        "mixin as by hand": equal(mixed, hand),
        "steps": [run.global_step, mixed_run.global_step],
        "groups": len(ruled.trainer.optimizers[0].param_groups),
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    report = {"zero": zero_redundancy(out)}
    if FSDP2_RUNS_ON_CPU:
        report["fsdp2"] = fsdp2(out)
    rank = torch.distributed.get_rank()
    (out / f"{rank}.json").write_text(json.dumps(report))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
