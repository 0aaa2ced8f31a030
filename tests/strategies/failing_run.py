"""One of two ranks raises on its way to the collective. Run by test_failing.py."""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_regdecay import GroupL2Norm

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
weight = distribute_tensor(torch.ones(8), init_device_mesh("cpu", (2,)), [Shard(0)])
metric = GroupL2Norm(["g"])
metric.update({"g": [weight]})
assert math.isclose(metric.compute()["g"].item(), 8**0.5)
metric.reset()
metric.update({"g" if rank == 0 else "typo": [weight]})
metric.compute()
