"""Groups and one logging event of a 70B-parameter model, sharded over up to 4096 processes, on one core.

    python tests/benchmarks/scale.py [--worlds 8,64,512,4096]

The event is measured twice: the norms alone, and all figures of the monitor, for which a step is looked at and each
tensor has a norm of its own. The processes are simulated with torch's fake process group: this one is rank 0, its
shards are real where they fit into memory, the others' are not there, and a step halves the weights. So times,
collectives and memory are those of one rank; the norms mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from helpers import peak_memory
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_regdecay import DecayRule, GroupL2Norm, build_decay_groups
from lightning_regdecay.figures.measures import FIGURES
from lightning_regdecay.figures.measuring import Measurer, live_groups
from lightning_regdecay.groups.groups import DecayGroups

RULES = [
    DecayRule(0.0, modules="*Norm*"),
    DecayRule(0.0, params="embed.*"),
    DecayRule(0.1, params=["*.q_proj.*", "*.k_proj.*", "*.v_proj.*"], group="attention_in"),
    DecayRule(0.1, params=r"re:layers\.\d+\.o_proj\.", group="attention_out"),
    DecayRule(0.2, modules=nn.Linear, min_ndim=2),
]
MOST_BYTES = 6e9  # of shards that are made real


class Layer(nn.Module):
    """The parameters of one layer of Llama 3 70B (Grattafiori et al. 2024, arXiv 2407.21783, table 3)."""

    def __init__(self, width: int = 8192, hidden: int = 28672, kv_width: int = 1024) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.input_norm = nn.RMSNorm(width)
        self.output_norm = nn.RMSNorm(width)


class Model(nn.Module):
    """All its parameters, 70.6B."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128256, 8192)
        self.layers = nn.ModuleList(Layer() for _ in range(80))
        self.norm = nn.RMSNorm(8192)
        self.head = nn.Linear(8192, 128256, bias=False)


def model_70b() -> Model:
    with torch.device("meta"):
        return Model()


def measurer_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Measurer:
    """For all figures, about to look on at a step."""
    measurer = Measurer(FIGURES)
    measurer.begin(dict(model.named_parameters()))
    measurer.watch(lambda: [optimizer], lambda: False)
    measurer.start_batch(is_due=True, forget=True)
    return measurer


class Collectives(TorchDispatchMode):
    """Notes the number of elements of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.sizes.append(sum(tensor.numel() for tensor in args[0]))
        return func(*args, **(kwargs or {}))


def measure(world: int) -> str:
    """One row of the table."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    model = model_70b()
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        groups = build_decay_groups(model, RULES)
        seconds.append(time.perf_counter() - start)
    tensors = sum(len(group.params) for group in groups)
    here = sum(parameter.to_local().numel() for parameter in model.parameters())
    row = f"{world:>6}{tensors:>9}{len(groups):>8}{median(seconds):>13.3f}{here / 1e6:>12.1f}"
    if here * 4 <= MOST_BYTES:
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.to_local().detach().fill_(0.02)
        row += norms_alone(groups)
    if here * 8 <= MOST_BYTES:
        row += all_figures(model, groups)
    dist.destroy_process_group()
    return row


def norms_alone(groups: DecayGroups) -> str:
    metric = GroupL2Norm(group.name for group in groups)
    times = []
    for _ in range(3):
        metric.reset()
        start = time.perf_counter()
        with Collectives() as collectives:
            metric.update({group.name: group.params.values() for group in groups})
            metric.compute()
        times.append(time.perf_counter() - start)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        metric.update({group.name: group.params.values() for group in groups})
    scratch = peak_memory(profile) / 2**20
    return f"{median(times):>12.3f}{len(collectives.sizes):>13}{sum(collectives.sizes):>9}{scratch:>13.2f}"


def all_figures(model: nn.Module, groups: DecayGroups) -> str:
    optimizer = torch.optim.AdamW(groups.as_param_groups(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = parameter.detach()
    measurer = measurer_of(model, optimizer)
    measurer.measure(dict(live_groups([optimizer])))  # which finds out about the optimizer
    looks, events = [], []
    for _ in range(3):
        start = time.perf_counter()
        measurer._watcher.before(optimizer)
        stepping = time.perf_counter()
        for parameter in model.parameters():
            parameter.to_local().detach().mul_(0.5)
        stepped = time.perf_counter()
        measurer._watcher.after(optimizer)
        looks.append(time.perf_counter() - stepped + stepping - start)
        start = time.perf_counter()
        with Collectives() as collectives:
            measurer.measure(dict(live_groups([optimizer])))
        events.append(time.perf_counter() - start)
    measurer.let_go()
    return f"{median(looks):>12.3f}{median(events):>12.3f}{len(collectives.sizes):>13}{sum(collectives.sizes):>9}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="8,64,512,4096")
    args = parser.parse_args()
    torch.set_num_threads(1)
    total = sum(parameter.numel() for parameter in model_70b().parameters())
    print(f"torch {torch.__version__}, one thread, {total / 1e9:.1f}B parameters, float32")
    print(f"{'':48}{'norms alone':>47}{'all figures':>46}")
    print(f"{'ranks':>6}{'tensors':>9}{'groups':>8}{'groups in s':>13}{'shard in M':>12}", end="")
    print(f"{'event in s':>12}{'collectives':>13}{'numbers':>9}{'scratch MiB':>13}", end="")
    print(f"{'step in s':>12}{'event in s':>12}{'collectives':>13}{'numbers':>9}")
    for world in map(int, args.worlds.split(",")):
        print(measure(world), flush=True)


if __name__ == "__main__":
    main()
