"""All figures take one all-reduce, whatever the number of processes, groups and tensors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_regdecay.figures.measures import FIGURES
from lightning_regdecay.figures.measuring import Measurer, live_groups

WORLD = 4096


class Collectives(TorchDispatchMode):
    """Notes every collective, with the number of elements that travel."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            self.seen.append((func.name(), sum(tensor.numel() for tensor in args[0])))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def mesh():
    """Of processes that are not there but for this one."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    yield init_device_mesh("cpu", (WORLD,))
    dist.destroy_process_group()


@pytest.mark.parametrize(("groups", "tensors"), [(1, 1), (3, 50), (40, 3)])
def test_whatever_the_number_of_groups_and_tensors(mesh, groups, tensors):
    members = [
        [nn.Parameter(DTensor.from_local(torch.ones(1, 3), mesh, [Shard(0)])) for _ in range(tensors)]
        for _ in range(groups)
    ]
    optimizer = torch.optim.AdamW(
        [{"params": some, "name": f"g{number}"} for number, some in enumerate(members)], lr=0.1, foreach=False
    )
    measurer = Measurer(FIGURES)
    measurer.begin({})
    measurer.watch(lambda: [optimizer], lambda: False)
    measurer.start_batch(is_due=True, forget=True)
    for some in members:
        for parameter in some:
            parameter.grad = parameter.detach().clone()
    with Collectives() as collectives:
        optimizer.step()
        figures = measurer.measure(dict(live_groups([optimizer])))
    measurer.let_go()
    # Of each tensor, as the largest is looked for, and of each group before the step, its gradient and its update.
    assert collectives.seen == [("c10d::allreduce_", groups * (tensors + 3))]
    assert all(
        {"l2_norm", "grad_norm", "update_ratio", "angle", "largest"} <= found.keys() for found in figures.values()
    )
    assert len(figures) == groups
