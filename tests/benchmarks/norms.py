"""Norms of groups against torch's own, and against one read of the same memory; with the errors of each.

Errors are relative to the norm in float64: the larger one of random values and of one value repeated, which rounds the
same way every time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import peak_memory
from measuring import Row, Sizes, against, seconds_in_turn, time_text
from models import even_shapes, mixed_shapes, vit_b_shapes
from torch import Tensor
from torch.nn.utils import get_total_norm

from lightning_regdecay import GroupL2Norm

ONE_READ = "one read of the memory"
TOTAL_NORM = "get_total_norm"
LOOP = "x.norm().item() per tensor"
LOOP_FLOAT32 = "vector_norm(dtype=float32) per tensor"


def ours() -> Callable[[Sequence[Tensor]], float]:
    metric = GroupL2Norm(["all"])

    def norm(tensors: Sequence[Tensor]) -> float:
        metric.reset()
        metric.update({"all": tensors})
        return metric.compute()["all"].item()

    return norm


def loop(tensors: Sequence[Tensor]) -> float:
    """As composer's OptimizerMonitor does it for gradients."""
    return math.sqrt(math.fsum(tensor.norm().item() ** 2 for tensor in tensors))


def loop_in_float32(tensors: Sequence[Tensor]) -> float:
    norms = (torch.linalg.vector_norm(tensor, dtype=torch.float32).item() for tensor in tensors)
    return math.sqrt(math.fsum(norm**2 for norm in norms))


def in_float64(tensors: Sequence[Tensor]) -> float:
    pieces = (piece for tensor in tensors for piece in tensor.flatten().split(2**20))
    return math.sqrt(math.fsum(piece.double().square().sum().item() for piece in pieces))


WAYS: dict[str, Callable[[Sequence[Tensor]], float]] = {
    "ours": ours(),
    TOTAL_NORM: lambda tensors: get_total_norm(tensors).item(),
    LOOP: loop,
    LOOP_FLOAT32: loop_in_float32,
}


def rows(sizes: Sizes) -> Iterator[Row]:
    cases = {
        "ViT-B": vit_b_shapes() if not sizes.small else [(100, 10), (10,)],
        "1000 tensors, mixed": mixed_shapes(sizes.mixed),
        "1000 tensors, small": even_shapes(sizes.elements // 5000),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for case, shapes in cases.items():
            yield from compare(case, shapes, dtype, sizes.rounds)
    for elements in [n for n in (10**7, 10**8, 10**9) if n < sizes.elements] + [sizes.elements]:
        yield from compare(f"one tensor, {elements:.0e}", [(elements,)], torch.float32, min(sizes.rounds, 5))
    for dtype in (torch.float32, torch.bfloat16):
        for case, shapes in cases.items():
            yield memory(case, [torch.randn(shape).to(dtype) for shape in shapes])
    if torch.cuda.is_available():
        for dtype in (torch.float32, torch.bfloat16):
            yield from on_gpu(dtype, sizes)


def compare(case: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, rounds: int) -> Iterator[Row]:
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    flat = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=dtype).normal_()
    ways = dict(WAYS)
    if dtype == torch.float32:
        del ways[LOOP_FLOAT32]
    seconds = seconds_in_turn(reads(flat) | {name: partial(way, tensors) for name, way in ways.items()}, rounds)
    size = flat.nbytes
    del flat
    one_read = min(seconds.pop("sum"), seconds.pop("dot", math.inf))
    label = f"{ONE_READ} ({size / one_read / 1e9:.0f} GB/s)"
    goals = {label: "≤ 1.15", TOTAL_NORM: "≤ 0.5", LOOP: "≤ 0.5"} if dtype == torch.float32 else {}
    what = f"norms, {type_name(dtype)}"
    goals[LOOP_FLOAT32] = "≤ 0.4"
    yield from against(what, case, {**seconds, label: one_read}, "ours", goals, errors(tensors, ways))


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def reads(flat: Tensor) -> dict[str, Callable[[], object]]:
    """The fastest ways that torch has to read a buffer; its dot of half types is no read, but slower."""
    calls: dict[str, Callable[[], object]] = {
        "sum": flat.view(torch.float32).sum if flat.numel() % 2 == 0 else flat.sum
    }
    return calls | ({"dot": partial(torch.dot, flat, flat)} if flat.dtype == torch.float32 else {})


def errors(tensors: Sequence[Tensor], ways: dict[str, Callable[[Sequence[Tensor]], float]]) -> dict[str, float]:
    found = dict.fromkeys(ways, 0.0)
    for repeat in (False, True):
        for tensor in tensors if repeat else ():
            tensor.fill_(0.1)
        truth = in_float64(tensors)
        for name, way in ways.items():
            found[name] = max(found[name], abs(way(tensors) / truth - 1))
    return found


def memory(case: str, tensors: Sequence[Tensor]) -> Row:
    """The most memory that one logging event takes at a time."""
    norm = ours()
    norm(tensors)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        norm(tensors)
    what = f"memory of one event, {type_name(tensors[0].dtype)}"
    return Row(what, case, f"{peak_memory(profile) / 2**20:.2f} MiB", goal="< 1 MiB")


def on_gpu(dtype: torch.dtype, sizes: Sizes) -> Iterator[Row]:
    """1B parameters against a copy of them, with the transfers to the host and the kernels of one event."""
    count = 1 if sizes.small else 100
    tensors = [torch.randn(10**7, device="cuda").to(dtype) for _ in range(count)]
    target = torch.empty_like(tensors[0])
    norm = ours()

    def copy() -> None:
        for tensor in tensors:
            target.copy_(tensor)

    def synchronised(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            call()
            torch.cuda.synchronize()

        return run

    calls = {"ours": partial(norm, tensors), "copy": copy, TOTAL_NORM: lambda: get_total_norm(tensors).item()}
    calls[LOOP] = partial(loop, tensors)
    seconds = seconds_in_turn({name: synchronised(call) for name, call in calls.items()}, sizes.rounds)
    # A copy reads and writes.
    bandwidth = 2 * sum(tensor.nbytes for tensor in tensors) / seconds.pop("copy")
    of_bandwidth = sum(tensor.nbytes for tensor in tensors) / seconds["ours"] / bandwidth
    what, on = f"norms, CUDA, {type_name(dtype)}", f"{count} tensors of 1e+07"
    copied = f"bandwidth of a copy ({bandwidth / 1e9:.0f} GB/s)"
    yield Row(what, on, time_text(seconds["ours"]), copied, "", of_bandwidth, "≥ 0.8")
    yield from against(what, on, seconds, "ours", {}, errors(tensors, {k: WAYS[k] for k in ("ours", TOTAL_NORM, LOOP)}))

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.profiler.profile() as profile:
        norm(tensors)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    names = [event.name for event in profile.events()]
    yield Row("memory of one event, CUDA", on, f"{peak:.2f} MiB", goal="< 1 MiB")
    yield Row("transfers to the host, CUDA", on, str(sum("Memcpy DtoH" in name for name in names)), goal="1")
    launches = sum("multi_tensor_apply" in name for name in names)
    yield Row("multi-tensor launches, CUDA", on, str(launches), goal="one call per dtype")
