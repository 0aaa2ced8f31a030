"""Speed and accuracy of the norms of groups against torch's own, on the CPU.

    python tests/benchmarks/norms.py [--elements 1e8]

Each row is timed in turn with the others in one run, medians of several rounds; the ratio is to one read of the same
bytes (the faster of ``torch.sum`` and ``torch.dot``). The error is relative to the norm in float64, for random values
and for one value repeated, which rounds the same way every time.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from lightning_regdecay import GroupL2Norm


def ours(tensors: list[Tensor]) -> float:
    metric = GroupL2Norm(["all"])
    metric.update({"all": tensors})
    return metric.compute()["all"].item()


def per_tensor(tensors: list[Tensor]) -> float:
    return math.sqrt(math.fsum(tensor.norm().item() ** 2 for tensor in tensors))


def in_float32(tensors: list[Tensor]) -> float:
    norms = (torch.linalg.vector_norm(tensor, dtype=torch.float32).item() for tensor in tensors)
    return math.sqrt(math.fsum(norm**2 for norm in norms))


def in_float64(tensors: list[Tensor]) -> float:
    pieces = (piece for tensor in tensors for piece in tensor.flatten().split(2**20))
    return math.sqrt(math.fsum(piece.double().square().sum().item() for piece in pieces))


WAYS: dict[str, Callable[[list[Tensor]], float]] = {
    "GroupL2Norm": ours,
    "get_total_norm": lambda tensors: get_total_norm(tensors).item(),
    "x.norm() per tensor": per_tensor,
    "vector_norm(dtype=float32)": in_float32,
    "float64 in pieces": in_float64,
}


def cases(elements: int) -> dict[str, Callable[[Callable[..., Tensor]], list[Tensor]]]:
    sizes = [elements // 2000 * (i % 20 + 1) // 5 for i in range(1000)]
    return {
        "one tensor": lambda make: [make(elements)],
        "1000 tensors": lambda make: [make(max(size, 1)) for size in sizes],
    }


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(
    dtype: torch.dtype, case: str, build: Callable[[Callable[[int], Tensor]], list[Tensor]], rounds: int
) -> None:
    """Time every way on one set of tensors and print a row for each."""
    torch.manual_seed(0)
    tensors = build(lambda n: torch.randn(n).to(dtype))
    constant = build(lambda n: torch.full((n,), 0.1, dtype=dtype))
    flat = torch.cat(tensors)
    calls: dict[str, Callable[[], object]] = {"sum": flat.sum, "dot": lambda: torch.dot(flat, flat)}
    calls |= {name: partial(way, tensors) for name, way in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call))

    one_read = min(median(times["sum"]), median(times["dot"]))
    print(f"{str(dtype)[6:]}, {case}, one read: {flat.nbytes / one_read / 1e9:.1f} GB/s")
    truths = in_float64(tensors), in_float64(constant)
    for name, way in WAYS.items():
        seconds = median(times[name])
        random, repeated = (abs(way(x) / truth - 1) for x, truth in zip((tensors, constant), truths))
        speed = f"{flat.nbytes / seconds / 1e9:>8.1f}{seconds / one_read:>12.2f}"
        print(f"  {name:<40}{speed}{random:>15.0e}{repeated:>17.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=float, default=1e8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {machine}, {args.elements:.0e} elements")
    print(f"{'what':<42}{'GB/s':>8}{'x one read':>12}{'error, random':>15}{'error, constant':>17}")
    for dtype in (torch.float32, torch.bfloat16):
        for case, build in cases(int(args.elements)).items():
            compare(dtype, case, build, args.rounds)


if __name__ == "__main__":
    main()
