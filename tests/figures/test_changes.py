"""The norm of a change: right to 1e-6 as norms are, without the change in memory, and of a copy in its own type."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import peak_memory

from lightning_regdecay.figures import changes
from lightning_regdecay.figures.members import Member
from lightning_regdecay.figures.norms import Part, local_sums
from lightning_regdecay.figures.steps import Stepped, StepWatcher


def norm_of_change(now, before):
    [sums] = local_sums({"g": [Part(before, 1)]}, pieces=changes.changes({before: now}.__getitem__)).values()
    return math.sqrt(sums.whole)


def truth(now, before):
    wide = torch.complex128 if now.is_complex() else torch.float64
    difference = torch.view_as_real((now.to(wide) - before.to(wide)).to(torch.complex128)).flatten()
    return math.sqrt(math.fsum(piece.square().sum().item() for piece in difference.split(2**20)))


def peak_of(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return peak_memory(profile)


TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [1, 127, 1025, 10_007, 2**17, 2**17 + 1, 3 * 10**6 + 7])
def test_is_that_of_the_definition(size, dtype):
    torch.manual_seed(0)
    before = torch.randn(size).to(dtype)
    now = before + (0.01 * torch.randn(size)).to(dtype)
    kept = now.clone(), before.clone()
    assert norm_of_change(now, before) == pytest.approx(truth(now, before), rel=1e-6)
    assert torch.equal(now, kept[0])
    assert torch.equal(before, kept[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_change_of_large_weights(dtype):
    torch.manual_seed(0)
    before = (1000 * (1 + torch.rand(300, 1000))).to(dtype)
    now = torch.nextafter(before.float(), torch.tensor(math.inf)) if dtype == torch.float32 else before * 1.01
    assert norm_of_change(now, before) == pytest.approx(truth(now, before), rel=1e-6)


@pytest.mark.parametrize("lanes", [8, 16, 32])
def test_where_float32_loses_every_addition(lanes):
    row = torch.full((128,), 2.0**-12)
    row[:lanes] = 1.0
    now = row.repeat(2**14)
    assert norm_of_change(now, torch.zeros_like(now)) == pytest.approx(row.double().norm().item() * 2**7, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e-19, 1e19, 1e25])
@pytest.mark.parametrize("size", [5, 1000, 300_000])
def test_squares_beyond_the_range_of_float32(scale, size):
    torch.manual_seed(0)
    before = torch.zeros(size)
    now = (torch.rand(size) + 0.5) * scale
    assert norm_of_change(now, before) == pytest.approx(truth(now, before), rel=1e-6)


def test_none_nan_and_infinity():
    before = torch.ones(10_000)
    now = before.clone()
    assert norm_of_change(now, before) == 0.0
    now[5] = math.inf
    assert norm_of_change(now, before) == math.inf
    now[6] = math.nan
    assert math.isnan(norm_of_change(now, before))
    assert norm_of_change(torch.empty(0, 3), torch.empty(0, 3)) == 0.0


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "with gaps": lambda x: x[:, :, ::2, 1:],
    "transposed": lambda x: x.transpose(0, 3),
    "one row": lambda x: x[:1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("then", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_any_layout_also_one_that_has_changed(first, then, dtype):
    """Elements are held against each other by their place in the tensor, not in memory."""
    torch.manual_seed(0)
    before = LAYOUTS[first](torch.randn(16, 64, 20, 41).to(dtype))
    now = LAYOUTS[then](torch.empty(16, 64, 20, 41, dtype=dtype))
    now = now if now.shape == before.shape else torch.empty_like(before)
    now.copy_(before + 0.01 * torch.randn(before.shape))
    assert norm_of_change(now, before) == pytest.approx(truth(now, before), rel=1e-6)


@pytest.mark.parametrize("dtype", TYPES)
def test_on_a_gpu_pieces_are_measured_one_by_one(dtype):
    torch.manual_seed(0)
    before, now = torch.randn(2, 300, 1000).to(dtype).unbind()
    norms = list(changes._norms_of_pieces(now, before))
    assert len(norms) == 5
    assert all(norm.numel() == 1 for norm in norms)
    # Those of torch are less exact on a CPU.
    assert torch.cat(norms).double().norm().item() == pytest.approx(truth(now, before), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2**23,), (2**11, 2**12), (2, 2**11, 2**11)])
def test_the_change_is_not_in_memory(shape, dtype):
    before = torch.ones(shape, dtype=dtype)
    now = torch.full(shape, 1.5, dtype=dtype)
    assert 0 < peak_of(lambda: norm_of_change(now, before)) <= 1.01 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looking_on_at_a_step_takes_one_copy_of_the_weights_and_frees_it(dtype):
    weights = [torch.nn.Parameter(torch.ones(1000, 1000, dtype=dtype)) for _ in range(8)]
    size = sum(weight.nbytes for weight in weights)
    group = Stepped(list(map(Member, weights)), rate=0.0, has_start=False)
    watcher = StepWatcher(lambda optimizer: {"g": group}, gradients=False, updates=True)
    watcher.start_batch(is_due=True, forget=True)

    def step():
        watcher.before(None)
        with torch.no_grad():
            for weight in weights:
                weight.mul_(0.5)
        watcher.after(None)

    assert size < peak_of(step) <= size + 1.01 * 2**20
    assert watcher._held == {}
    assert math.sqrt(watcher.sums["g", "update"].whole) == pytest.approx(0.5 * 8000**0.5 * 1000**0.5, rel=1e-6)
