"""Parameters: names, owners and dimensions are those of the model as the user wrote it."""

from __future__ import annotations

import pytest
import torch
from helpers import Net
from lightning.fabric import Fabric
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

from lightning_regdecay.groups.parameters import model_parameters


def names(module):
    return [p.name for p in model_parameters(module)]


def all_names(module):
    """Every name that torch has for each parameter."""
    found = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    return list(found.values())


class Chooses(nn.Module):
    """Reports a part of what it has, under names of its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)

    def named_parameters(self, *args, **kwargs):
        for name, parameter in super().named_parameters(*args, **kwargs):
            if name.startswith("head"):
                yield f"my_{name}", parameter


def test_names_and_order_are_those_of_named_parameters():
    model = nn.ModuleDict({"a": nn.TransformerEncoderLayer(8, 2), "b": nn.Sequential(nn.Conv2d(1, 2, 3), Net())})
    model.register_parameter("top", nn.Parameter(torch.ones(3)))
    assert names(model) == [name for name, _ in model.named_parameters()]


def test_owners_are_the_modules_that_hold_the_parameters():
    model = Net()
    owners = {p.name: p.places[0].module for p in model_parameters(model)}
    assert owners["norm.weight"] is model.norm
    assert owners["head.bias"] is model.head


def test_tied_parameters_count_once_with_all_their_names():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    (parameter,) = model_parameters(model)
    assert parameter.names == ["embed.weight", "head.weight"]
    assert [type(place.module) for place in parameter.places] == [nn.Embedding, nn.Linear]


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        checkpoint_wrapper,
        lambda m: checkpoint_wrapper(torch.compile(checkpoint_wrapper(m))),
        nn.DataParallel,
        lambda m: Fabric(accelerator="cpu", devices=1).setup(m),
    ],
    ids=["compile", "checkpoint", "nested", "DataParallel", "Fabric"],
)
def test_wrappers_of_the_model_change_nothing(wrap):
    model = Net()
    plain = model_parameters(model)
    wrapped = model_parameters(wrap(model))
    assert [p.names for p in wrapped] == [p.names for p in plain]
    assert [p.parameter for p in wrapped] == [p.parameter for p in plain]
    assert [[place.module for place in p.places] for p in wrapped] == [[q.module for q in p.places] for p in plain]


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
def test_wrappers_of_submodules_change_nothing(wrap):
    model = Net()
    expected = names(model)
    model.body = wrap(model.body)
    assert names(model) == expected
    assert [name for name, _ in model.named_parameters()] != expected  # torch's names do change


def test_ddp_changes_nothing():
    model = Net()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert [p.names for p in model_parameters(wrapped)] == [p.names for p in model_parameters(model)]
    finally:
        torch.distributed.destroy_process_group()


def test_an_attribute_like_that_of_a_wrapper_keeps_its_name_where_there_is_more():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self._orig_mod = nn.Linear(2, 2)
            self.weight = nn.Parameter(torch.ones(2))

    assert names(Own()) == ["weight", "_orig_mod.weight", "_orig_mod.bias"]


def test_a_users_own_attribute_called_module_keeps_its_name():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert names(model) == ["module.weight", "module.bias"]


def test_parametrized_weights_go_by_their_plain_name_too():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    found = {p.name: p for p in model_parameters(model)}
    assert set(found) == {name for name, _ in model.named_parameters()}
    original = found["0.parametrizations.weight.original1"]
    assert original.names == ["0.parametrizations.weight.original1", "0.weight"]
    assert all(isinstance(place.module, nn.Linear) for place in original.places)
    assert len(model_parameters(model[0].parametrizations["weight"])) == 2


def test_meta_parameters_are_fine():
    with torch.device("meta"):
        model = Net()
    assert [p.ndim for p in model_parameters(model)] == [2, 1, 1, 1, 2, 1]


def test_a_lazy_parameter_is_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"parameter '1.weight' of LazyLinear has no shape yet .* run one batch"):
        model_parameters(model)


def test_what_deepspeed_has_partitioned_keeps_its_shape():
    layer = nn.Linear(2, 3)
    layer.weight.ds_shape = layer.weight.shape  # as deepspeed.zero sets it beside an empty tensor
    layer.weight.data = torch.empty(0)
    assert [p.ndim for p in model_parameters(layer)] == [2, 1]


def test_a_module_inside_itself_is_not_entered_again():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].parent = model
    assert names(model) == ["0.weight", "0.bias"]


def all_hold_each_other(count):
    layers = [nn.Linear(1, 1) for _ in range(count)]
    for layer in layers:
        layer.others = nn.ModuleList(layers)
    return nn.ModuleList(layers)


def each_holds_all_before(count):
    layers = []
    for _ in range(count):
        layer = nn.Linear(1, 1)
        layer.before = nn.ModuleList(layers)
        layers.append(layer)
    return layers[-1]


def each_holds_the_next_twice(count):
    layer = nn.Linear(1, 1)
    for _ in range(count):
        layer = nn.Sequential(layer, layer, nn.Linear(1, 1))
    return layer


class TestWhatIsShared:
    def test_goes_by_all_its_names(self):
        layer = nn.Linear(2, 2)
        encoder = nn.Sequential(*[nn.Sequential(layer, nn.LayerNorm(2))] * 8)
        model = nn.ModuleDict({"online": encoder, "view": encoder, "deep": nn.Sequential(layer), "head": Net()})
        found = model_parameters(model)
        assert [p.names for p in found] == all_names(model)
        assert {f"view.{i}.1.weight" for i in range(8)} < set(found[2].names)

    def test_in_a_layer_that_is_tied_and_there_many_times(self):
        layer = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        layer["b"].weight = layer["a"].weight
        model = nn.Sequential(*[layer] * 6)
        assert [sorted(p.names) for p in model_parameters(model)] == [sorted(own) for own in all_names(model)]
        assert len(model_parameters(model)[0].names) == 12

    @pytest.mark.parametrize("graph", [all_hold_each_other, each_holds_all_before, each_holds_the_next_twice])
    @pytest.mark.parametrize("count", [3, 25])
    def test_is_never_lost_where_there_are_too_many_paths_to_list(self, graph, count):
        model = graph(count)
        assert names(model) == [name for name, _ in model.named_parameters()]


class TestAModelThatNamesItsParametersItself:
    def test_decides_as_it_does_for_torchs_optimizers(self):
        model = Chooses()
        optimizer = torch.optim.SGD(model.parameters())
        assert [p.parameter for p in model_parameters(model)] == optimizer.param_groups[0]["params"]
        assert [p.names for p in model_parameters(model)] == [
            ["my_head.weight", "head.weight"],
            ["my_head.bias", "head.bias"],
        ]
        assert model_parameters(model)[0].module is model.head

    @pytest.mark.parametrize(
        "wrap",
        [
            torch.compile,
            checkpoint_wrapper,
            nn.DataParallel,
            lambda m: nn.DataParallel(torch.compile(checkpoint_wrapper(m))),
            lambda m: Fabric(accelerator="cpu", devices=1).setup(m),
        ],
        ids=["compile", "checkpoint", "DataParallel", "nested", "Fabric"],
    )
    def test_decides_inside_wrappers_too(self, wrap):
        assert names(wrap(Chooses())) == ["my_head.weight", "my_head.bias"]

    def test_loses_nothing_inside_another(self):
        model = nn.Sequential(Chooses(), nn.ModuleDict({"a": Chooses()}))
        assert names(model) == [name for name, _ in model.named_parameters()]
        assert len(names(model)) == len(list(model.parameters())) == 8

    def test_by_an_attribute_of_the_instance(self):
        model = Net()
        model.named_parameters = lambda *args, **kwargs: model.head.named_parameters(*args, **kwargs)
        assert [p.parameter for p in model_parameters(model)] == list(model.parameters()) == [*model.head.parameters()]

    def test_and_has_some_that_no_module_holds(self):
        class Loss(Chooses):
            scale = nn.Parameter(torch.ones(3))

            def named_parameters(self, *args, **kwargs):
                yield from super().named_parameters(*args, **kwargs)
                yield "loss.scale", Loss.scale

        assert names(Loss()) == ["my_head.weight", "my_head.bias", "loss.scale"]


class Around(nn.DataParallel):
    """A wrapper that has a layer too, of the name of one inside."""

    def __init__(self, module):
        super().__init__(module)
        self.head = nn.Linear(2, 2)


class OneName(Chooses):
    def named_parameters(self, *args, **kwargs):
        return (("w", parameter) for _, parameter in super().named_parameters(*args, **kwargs))


@pytest.mark.parametrize(("model", "name"), [(Around(Net()), "head.weight"), (OneName(), "w")])
def test_two_parameters_of_one_name_are_an_error(model, name):
    message = rf"two parameters of {type(model).__name__} come to the name '{name}', one in Linear and one in Linear"
    with pytest.raises(ValueError, match=message):
        model_parameters(model)


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (nn.utils.weight_norm, ["0.weight_g", "0.weight_v"]),
        (nn.utils.spectral_norm, ["0.weight_orig"]),
        (lambda layer: prune.l1_unstructured(layer, "weight", amount=1), ["0.weight_orig"]),
    ],
    ids=["weight_norm", "spectral_norm", "prune"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_was_put_behind_others_in_the_old_way_goes_by_its_plain_name_too(change, changed):
    model = nn.Sequential(change(nn.Linear(3, 2)))
    assert names(model) == [name for name, _ in model.named_parameters()]
    assert {p.name: p.names for p in model_parameters(model)} == {
        "0.bias": ["0.bias"],
        **{name: [name, "0.weight"] for name in changed},
    }


def test_a_users_own_name_of_that_form_is_one_name():
    model = nn.Linear(2, 2, bias=False)
    model.scale_g = nn.Parameter(torch.ones(2))
    assert [p.names for p in model_parameters(model)] == [["weight"], ["scale_g"]]
