"""Norms: right to 1e-6 at any size, for any data, type and layout."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from helpers import LitBase, float64_norm, peak_memory, trainer
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_regdecay import GroupL2Norm
from lightning_regdecay.figures import norms


def norm(*tensors):
    metric = GroupL2Norm(["g"])
    metric.update({"g": tensors})
    return metric.compute()["g"].item()


def relative_error(value, truth):
    return abs(value - truth) / truth


def exact_norm(tensor, times=1):
    """The norm of a tensor that is repeated, by squares that are exact and a sum that is."""
    return math.sqrt(times * math.fsum(tensor.double().square().flatten().tolist()))


def lossy(length, lanes):
    """A 1, and values whose squares float32 does not add to it, in its lane of a register and beside it."""
    row = torch.zeros(length)
    row[::lanes] = row[:lanes] = 2.0**-12
    row[0] = 1.0
    return row


class TestAccuracy:
    @pytest.mark.parametrize("size", [1, 127, 128, 255, 256, 257, 10_007, 2**22 + 1, 2 * 10**7])
    @pytest.mark.parametrize(
        "make", [torch.randn, torch.rand, lambda n: torch.full((n,), 0.1), lambda n: torch.full((n,), 1.0001)]
    )
    def test_float32(self, make, size):
        torch.manual_seed(0)
        x = make(size)
        assert relative_error(norm(x), x.double().norm().item()) <= 1e-6

    @pytest.mark.parametrize("make", [torch.randn, lambda n: torch.full((n,), 0.1)], ids=["random", "constant"])
    def test_float32_at_2e8_elements_where_torchs_own_norm_is_off(self, make):
        torch.manual_seed(0)
        x = make(2 * 10**8)
        truth = math.sqrt(math.fsum(piece.double().square().sum().item() for piece in x.split(10**7)))
        assert relative_error(norm(x), truth) <= 1e-6
        if torch.__version__ >= "2.13":  # should torch mend this, the sentence in the README must go
            assert relative_error(x.norm().item(), truth) > 1e-3

    def test_float32_where_every_addition_within_a_row_rounds_the_same_way(self):
        row = torch.full((256,), 2.0**-12.5)
        row[:8] = 1.0  # of each lane of a vector register
        assert relative_error(norm(row.repeat(1000)), row.double().norm().item() * 1000**0.5) <= 1e-6

    @pytest.mark.parametrize("length", [32, 64, 128, 256, 512])
    @pytest.mark.parametrize("lanes", [8, 16, 32])
    def test_float32_where_every_addition_is_lost(self, lanes, length):
        row = lossy(length, lanes)
        assert relative_error(norm(row.repeat(2**17 // length)), exact_norm(row, 2**17 // length)) <= 1e-6
        # As the elements of a row, so the norms of rows among each other.
        for rows in (16, 32, 64, 128):
            block, times = torch.zeros(rows, length), 2**18 // (rows * length)
            block[:, 0] = lossy(rows, min(lanes, rows)) * exact_norm(row)
            block[0] = row
            assert relative_error(norm(block.repeat(times, 1)), exact_norm(block, times)) <= 1e-6

    @pytest.mark.parametrize("ratio", [2.0**k for k in range(8, 15)])
    def test_float32_with_large_values_among_small_ones(self, ratio):
        for every in (8, 64, 256, 1000):
            x = torch.full((2**17,), 0.02)
            x[::every] *= ratio
            assert relative_error(norm(x), exact_norm(x)) <= 1e-6

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("size", [3, 1000, 10**7 + 1])
    def test_half_types_take_their_stored_values_as_the_truth(self, dtype, size):
        torch.manual_seed(0)
        x = torch.randn(size).to(dtype)
        assert relative_error(norm(x), x.double().norm().item()) <= 1e-5
        assert (
            relative_error(
                norm(torch.full((size,), 0.1, dtype=dtype)), float(torch.tensor(0.1, dtype=dtype)) * size**0.5
            )
            <= 1e-5
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_types_at_2e8_elements(self, dtype):
        value = torch.tensor(0.1, dtype=dtype)
        assert relative_error(norm(value.repeat(2 * 10**8)), float(value) * (2e8) ** 0.5) <= 1e-5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_types_where_every_addition_within_a_row_rounds_the_same_way(self, dtype):
        row = torch.full((1024,), 2.0**-12, dtype=dtype)
        row[:8] = 1.0
        row[1::2] *= -1  # so that the mean is near 0
        truth = row.double().norm().item() * 1000**0.5
        assert relative_error(norm(row.repeat(1000)), truth) <= 1e-5

    @pytest.mark.parametrize(
        "dtypes", [[torch.float32], [torch.bfloat16], [torch.float32, torch.float16, torch.float64]]
    )
    def test_many_tensors_of_all_sizes(self, dtypes):
        torch.manual_seed(0)
        sizes = [*range(0, 600, 7), 1023, 1024, 1025, 8191, 8192, 8193, *range(9000, 40_000, 1111), 2**15, 2**16 + 1]
        tensors = [torch.randn(size).to(dtypes[i % len(dtypes)]) for i, size in enumerate(sizes)]
        assert relative_error(norm(*tensors), float64_norm(tensors)) <= 1e-6

    def test_a_float16_weight_of_300_does_not_overflow(self):
        assert norm(torch.full((1000,), 300.0, dtype=torch.float16)) == pytest.approx(300 * 1000**0.5, rel=1e-7)

    def test_float64(self):
        torch.manual_seed(0)
        x = torch.randn(10**6, dtype=torch.float64)
        assert norm(x) == pytest.approx(x.norm().item(), rel=1e-13)

    @pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-23, 1e-19, 1e-16, 1e16, 1e19, 1e25, 1e37])
    @pytest.mark.parametrize("size", [5, 1000, 300_000])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_squares_beyond_the_range_of_float32(self, scale, size, dtype):
        torch.manual_seed(0)
        x = (torch.rand(size) + 0.5).mul_(scale).to(dtype)
        assert relative_error(norm(x), x.double().norm().item()) <= 1e-6

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
    def test_complex(self, dtype):
        torch.manual_seed(0)
        x = torch.randn(1001, dtype=dtype)
        assert relative_error(norm(x), float64_norm([x])) <= 1e-6
        assert norm(x.conj()) == norm(x)

    def test_integers_do_not_wrap(self):
        assert norm(torch.tensor([2**40, 2**40])) == pytest.approx(2**40.5)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=300))
    def test_any_finite_values(self, values):
        x = torch.tensor(values, dtype=torch.float32)
        assert norm(x) == pytest.approx(math.sqrt(math.fsum(v * v for v in values)), rel=1e-6)


class TestValuesAndLayouts:
    def test_empty_tensors_and_groups(self):
        assert norm(torch.empty(0), torch.empty(3, 0), torch.tensor([3.0, 4.0])) == 5.0
        assert norm() == 0.0
        assert norm(torch.tensor(-2.0)) == 2.0
        assert norm(torch.zeros(1000)) == 0.0

    @pytest.mark.parametrize("size", [3, 1000])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
    def test_nan_and_infinity_come_out_as_they_are(self, size, dtype):
        x = torch.ones(size, dtype=dtype)
        x[1] = math.inf
        assert norm(x) == math.inf
        x[0] = math.nan
        assert math.isnan(norm(x))

    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x.permute(0, 3, 1, 2),
            lambda x: x.to(memory_format=torch.channels_last),
            lambda x: x[:, :, ::2],
            lambda x: x[1:, 2:],
            lambda x: x[..., 0],
            lambda x: x[:1].expand(3, -1, -1, -1),
            lambda x: x.transpose(0, 1)[..., 1:],
        ],
    )
    def test_any_layout(self, view):
        torch.manual_seed(0)
        x = view(torch.randn(7, 6, 20, 30))
        assert norm(x) == pytest.approx(float64_norm([x]), rel=1e-7)

    SPARSE = {
        "COO": lambda x: x.to_sparse(),
        "COO of rows": lambda x: x.to_sparse(1),
        "COO of no entries": lambda x: torch.zeros_like(x).to_sparse(),
        "CSR": lambda x: x.to_sparse_csr(),
        "CSC": lambda x: x.to_sparse_csc(),
        "BSR": lambda x: x.to_sparse_bsr((2, 2)),
        "BSC": lambda x: x.to_sparse_bsc((2, 2)),
    }

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("make", SPARSE.values(), ids=SPARSE)
    @pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
    def test_sparse_tensors(self, make, dtype):
        torch.manual_seed(0)
        x = make((torch.randn(40, 60) * (torch.rand(40, 60) < 0.1)).to(dtype))
        assert x.layout != torch.strided
        dense = x.to_dense()
        assert norm(x, torch.nn.Parameter(x), dense) == pytest.approx(3**0.5 * float64_norm([dense]), rel=1e-6)

    def test_a_sparse_tensor_with_entries_twice_is_that_of_their_sums(self):
        for last in (4.0, 4.0j):
            entries = torch.sparse_coo_tensor([[0, 0, 1]], torch.tensor([1.0, 2.0, last]), (3,), check_invariants=True)
            assert not entries.is_coalesced()
            assert norm(entries) == 5.0

    def test_rows_with_gaps_of_any_length(self):
        torch.manual_seed(0)
        for x in (torch.randn(3, 300_000)[:, 1:], torch.randn(100_000, 3)[:, 1:], torch.randn(2, 3, 2**17)[:, :, ::2]):
            assert norm(x) == pytest.approx(x.double().norm().item(), rel=1e-7)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("view", [lambda x: x.permute(2, 0, 1), lambda x: x[:, 1:]], ids=["permuted", "with gaps"])
    def test_no_copy_of_the_whole(self, view, dtype):
        x = view(torch.randn(2**22, 2, 2).to(dtype))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            norm(x)
        assert 0 < peak_memory(profile) <= 2**20

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_no_copies_of_many(self, dtype):
        tensors = [torch.randn(20_000 + size).to(dtype) for size in range(500)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            norm(*tensors)
        assert 0 < peak_memory(profile) <= 2**20


class TestDefaults:
    """What else the program has set as torch's defaults is no matter."""

    @pytest.fixture(autouse=True)
    def restore(self):
        yield
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)

    @pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_default_dtype(self, dtype, default):
        torch.manual_seed(0)
        x = torch.randn(300_001, dtype=torch.float32).to(dtype)
        torch.set_default_dtype(default)
        assert norm(x, x[:100], x[:5000]) == pytest.approx(float64_norm([x, x[:100], x[:5000]]), rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
    def test_default_device(self, dtype):
        torch.manual_seed(0)
        x = torch.randn(300_001, dtype=torch.float32).to(dtype)
        truth = float64_norm([x])
        torch.set_default_device("meta")
        assert norm(x) == pytest.approx(truth, rel=1e-6)


class TestMetric:
    def test_updates_add_up_and_reset_starts_anew(self):
        metric = GroupL2Norm(["a", "b"])
        metric.update({"a": [torch.tensor([3.0])]})
        metric.update({"a": [torch.tensor([4.0])], "b": [torch.ones(4)]})
        assert {name: value.item() for name, value in metric.compute().items()} == {"a": 5.0, "b": 2.0}
        assert all(value.ndim == 0 for value in metric.compute().values())
        metric.reset()
        metric.update({"b": [torch.ones(1)]})
        assert {name: value.item() for name, value in metric.compute().items()} == {"a": 0.0, "b": 1.0}

    def test_reset_forgets_that_something_was_sharded(self):
        metric = GroupL2Norm(["a"])
        metric._shard_device = torch.device("cpu")  # as after an update with a shard
        metric.reset()
        metric.update({"a": [torch.ones(4)]})
        assert metric.compute()["a"].item() == 2.0  # and asks no other process, of which there is none

    def test_forward_and_parameters_with_gradients(self):
        layer = torch.nn.Linear(3, 2)
        metric = GroupL2Norm(["g"])
        value = metric({"g": layer.parameters()})["g"]
        assert not value.requires_grad
        assert value.item() == pytest.approx(float64_norm(layer.parameters()), rel=1e-7)

    def test_in_inference_mode(self):
        metric = GroupL2Norm(["g"])
        with torch.inference_mode():
            metric.update({"g": [torch.ones(4)]})
        metric.update({"g": [torch.ones(5)]})
        assert metric.compute()["g"].item() == 3.0

    CASTS = {
        "half": lambda module: module.half(),
        "bfloat16": lambda module: module.bfloat16(),
        "to": lambda module: module.to(torch.bfloat16),
        "to with a device": lambda module: module.to("cpu", torch.float16),
        "there and back": lambda module: module.half().bfloat16().float().double(),
        "set_dtype": lambda module: module[0].set_dtype(torch.float16),
    }

    @pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
    def test_state_stays_float64_whatever_its_module_is_cast_to(self, cast):
        module = torch.nn.ModuleList([GroupL2Norm(["g"]), torch.nn.Linear(2, 2)])
        metric, tensor = module[0], torch.full((1000,), 300.0, dtype=torch.float16)
        cast(module)
        metric.update({"g": [tensor]})  # the square of which no half type holds
        cast(module)
        assert metric.compute()["g"].dtype == torch.float64
        assert metric.compute()["g"].item() == pytest.approx(300 * 1000**0.5, rel=1e-7)
        metric.reset()
        assert metric.sums_of_squares.dtype == torch.float64
        metric.update({"g": [tensor, tensor]})
        assert copy.deepcopy(metric).compute()["g"].item() == pytest.approx(300 * 2000**0.5, rel=1e-7)

    @pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
    def test_state_stays_float64_in_a_model_that_trains_in_half_precision(self, precision):
        class Lit(LitBase):
            def __init__(self):
                super().__init__()
                self.norms = GroupL2Norm(["head"])

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.01)

            def on_train_batch_end(self, *args):
                self.norms.reset()
                self.norms.update({"head": self.head.parameters()})

        model = Lit()
        trainer(precision=precision).fit(model)
        assert model.head.weight.dtype != torch.float32
        assert model.norms.compute()["head"].dtype == torch.float64
        assert model.norms.compute()["head"].item() == pytest.approx(float64_norm(model.head.parameters()), rel=1e-6)

    def test_mistakes(self):
        with pytest.raises(ValueError, match=r"unknown groups \['b'\]; this metric was made with \['a'\]"):
            GroupL2Norm(["a"]).update({"b": [torch.ones(1)]})
        with pytest.raises(ValueError, match="group names must be unique"):
            GroupL2Norm(["a", "a"])
        with pytest.raises(TypeError, match=r"groups must be a list of names, got the text 'bias'; write \['bias'\]"):
            GroupL2Norm("bias")
        with pytest.raises(TypeError, match="groups must be a list of names, got None"):
            GroupL2Norm(None)
        with pytest.raises(TypeError, match=r"group 'a' must get a list of tensors, got Tensor; write \[tensor\]"):
            GroupL2Norm(["a"]).update({"a": torch.ones(2)})
        with pytest.raises(TypeError, match="group 'a' must get a list of tensors, got NoneType"):
            GroupL2Norm(["a"]).update({"a": None})
        with pytest.raises(TypeError, match=r"group 'a' must get tensors, got float 1\.5"):
            GroupL2Norm(["a"]).update({"a": [1.5]})
        with pytest.raises(TypeError, match="group 'a' must get tensors, got NoneType None"):
            GroupL2Norm(["a"]).update({"a": [None]})
        with pytest.raises(
            TypeError, match=r"group 'a' must get tensors with strides, or sparse ones, got torch\._mkldnn"
        ):
            GroupL2Norm(["a"]).update({"a": [torch.eye(3).to_mkldnn()]})
        with pytest.raises(TypeError, match="update takes a mapping of group names to tensors, got list"):
            GroupL2Norm(["a"]).update([torch.ones(1)])

    @pytest.mark.usefixtures("no_window")
    def test_plot(self):
        metric = GroupL2Norm(["a", "b"])
        metric.update({"a": [torch.ones(1)]})
        _, axes = metric.plot()
        assert {line.get_label() for line in axes.get_lines()} >= {"a", "b"}


class TestTheWayForGPUs:
    """Multi-tensor norms, which run on the CPU as well; their speed and accuracy there are not those of a GPU."""

    @pytest.fixture(autouse=True)
    def everywhere(self, monkeypatch):
        monkeypatch.setattr(norms, "_by_rows", norms._by_tensors)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
    @pytest.mark.parametrize("view", [lambda x: x, lambda x: x.mT, lambda x: x[1:, ::2], lambda x: x[:0]])
    def test_types_and_layouts(self, dtype, view):
        torch.manual_seed(0)
        x = view(torch.randn(50, 60).to(dtype))
        assert norm(x) == pytest.approx(float64_norm([x]), rel=1e-6)

    def test_groups_of_mixed_types_are_kept_apart(self):
        metric = norms.GroupL2Norm(["a", "b", "c"])
        metric.update(
            {
                "a": [torch.ones(3), torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.float64)],
                "b": [torch.full((4,), 2, dtype=torch.int64), torch.zeros(())],
                "c": [torch.full((1000,), 300.0, dtype=torch.float16), torch.zeros(5)],
            }
        )
        found = {name: value.item() for name, value in metric.compute().items()}
        assert found == pytest.approx({"a": 3.0, "b": 4.0, "c": 300 * 1000**0.5}, rel=1e-7)

    def test_tensors_are_cut_into_pieces(self):
        torch.manual_seed(0)
        x = torch.rand(2 * norms.GPU_PIECE + 5)
        assert norm(x) == pytest.approx(float64_norm([x]), rel=1e-3)  # as far as torch's own norm on a CPU is right

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_squares_beyond_the_range_of_float32(self, scale):
        x = torch.full((1000,), scale)
        assert norm(x, torch.ones(1)) == pytest.approx((1 + (scale * 1000**0.5) ** 2) ** 0.5, rel=1e-6)
        assert norm(x) == pytest.approx(scale * 1000**0.5, rel=1e-6)

    def test_nan(self):
        assert math.isnan(norm(torch.tensor([1.0, math.nan])))


class TestTheWayForOtherDevices:
    """Half types by float32 copies of pieces."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("size", [3, 1000, 8193, 10**6 + 1])
    def test_half_types(self, dtype, size, monkeypatch):
        by_copies = functools.partial(norms._norms_of_float32_rows, longest=norms.ROW, at_once=norms._WIDENED_ROWS)
        monkeypatch.setattr(norms, "_norms_of_half_rows", by_copies)
        torch.manual_seed(0)
        x = torch.randn(size).to(dtype)
        assert relative_error(norm(x), x.double().norm().item()) <= 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGPU:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("size", [10**4, 10**8, 10**9])
    @pytest.mark.parametrize("make", [torch.randn, lambda n, **where: torch.full((n,), 0.1, **where)])
    def test_accuracy_and_memory(self, make, size, dtype):
        torch.manual_seed(0)
        x = make(size, device="cuda", dtype=dtype)
        truth = math.sqrt(math.fsum(piece.double().square().sum().item() for piece in x.split(10**7)))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        assert relative_error(norm(x), truth) <= (1e-6 if dtype == torch.float32 else 1e-5)
        assert torch.cuda.max_memory_allocated() - before <= 2**20
        assert norm(x, torch.ones(3)) == pytest.approx((truth**2 + 3) ** 0.5, rel=1e-5)

    def test_one_transfer_for_all_groups(self):
        groups = {str(i): [torch.randn(100 + i, device="cuda") for _ in range(50)] for i in range(10)}
        metric = norms.GroupL2Norm(groups)
        with torch.profiler.profile() as profile:
            metric.update(groups)
        transfers = [event for event in profile.events() if "Memcpy DtoH" in event.name]
        assert len(transfers) == 1
