"""Parameters: names, owners and dimensions are those of the model as the user wrote it."""

from __future__ import annotations

import pytest
import torch
from helpers import Net
from lightning.fabric import Fabric
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_regdecay.groups.parameters import model_parameters


def names(module):
    return [p.name for p in model_parameters(module)]


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
