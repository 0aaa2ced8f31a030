"""Presets for parts of tensors: the layouts of torch, and rows of embeddings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_regdecay import build_decay_groups, rules_as_yaml
from lightning_regdecay.rules.forms import parse_rules, plain_rules
from lightning_regdecay.rules.presets import attention_rules, embeddings_rules, gates_rules


def elements(groups):
    """By group and parameter, the elements that are in it, found by going through them one by one."""
    found = {}
    for group in groups:
        for name, parameter in group.params.items():
            mask = torch.zeros_like(parameter, dtype=torch.bool)
            region = group.regions.get(name)
            for start, stop in [(0, parameter.shape[0])] if region is None else region.ranges:
                mask.narrow(0 if region is None else region.dim, start, stop - start).fill_(True)
            found[group.name, name] = mask
    return found


def test_queries_keys_and_values_of_torch():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, bias=False)
    groups = build_decay_groups(attention, [*attention_rules(0.1, q=0.0, v=0.3), {"weight_decay": 0.05}])
    assert {group.name: group.rule.weight_decay for group in groups} == {
        "attention.q": 0.0,
        "attention.k": 0.1,
        "attention.v": 0.3,
        "rest": 0.05,
    }
    x = torch.randn(3, 1, 6)
    for number, name in enumerate("qkv"):
        # Only one of the three inputs is not 0, so that its weights alone get a gradient from its projection.
        inputs = [torch.zeros_like(x) for _ in range(3)]
        inputs[number] = x
        projected = torch.nn.functional._in_projection_packed(*inputs, attention.in_proj_weight)[number]
        (grad,) = torch.autograd.grad(projected.square().sum(), [attention.in_proj_weight])
        assert torch.equal(grad != 0, elements(groups)[f"attention.{name}", "in_proj_weight"])


def test_fused_layers_and_those_of_gpt2():
    pytest.importorskip("transformers")
    from transformers import GPT2Config, GPT2Model

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12)
            self.proj = nn.Linear(4, 4)

    model = nn.ModuleDict(
        {"block": Block(), "gpt": GPT2Model(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11))}
    )
    found = elements(build_decay_groups(model, [*attention_rules(0.1), {"weight_decay": 0.05, "group": "rest"}]))
    assert found["attention.k", "block.qkv.weight"].any(1).nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert found["attention.v", "gpt.h.1.attn.c_attn.weight"].any(0).nonzero().flatten().tolist() == list(range(16, 24))
    assert ("rest", "gpt.h.0.attn.c_proj.weight") in found


@pytest.mark.parametrize("cell", [False, True], ids=["layers", "cell"])
@pytest.mark.parametrize(("kind", "gates"), [("LSTM", "ifgo"), ("GRU", "rzn")])
def test_gates_of_torch(kind, gates, cell):
    torch.manual_seed(0)
    module = getattr(nn, f"{kind}Cell")(3, 2) if cell else getattr(nn, kind)(3, 2, num_layers=2, bidirectional=True)
    groups = build_decay_groups(module, [*gates_rules(0.1, f=0.0, z=0.2), {"weight_decay": 0.05, "group": "rest"}])
    assert [group.name for group in groups] == [*(f"gates.{gate}" for gate in gates), "rest"]
    assert sum(group.numel for group in groups) == sum(p.numel() for p in module.parameters())
    weights = "weight_ih" if cell else "weight_ih_l1_reverse"
    rows = [elements(groups)[f"gates.{gate}", weights].any(1).nonzero().flatten().tolist() for gate in gates]
    assert rows == [[2 * n, 2 * n + 1] for n in range(len(gates))]


def test_the_forget_gate_is_the_second():
    """By what it does: at the end of its range the cell keeps what it has, or forgets it."""
    cell = nn.LSTMCell(1, 2)
    groups = build_decay_groups(cell, [*gates_rules(0.1), {"weight_decay": 0.0, "group": "rest"}])
    rows = elements(groups)["gates.f", "weight_ih"].any(1)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        cell.weight_ih[rows] = -100.0
        x, state = torch.ones(1, 1), (torch.zeros(1, 2), torch.full((1, 2), 5.0))
        assert torch.all(cell(x, state)[1] == 0)
        cell.weight_ih[rows] = 100.0
        assert torch.all(cell(x, state)[1] == 5)


def test_padding_and_new_rows():
    model = nn.ModuleDict(
        {"tokens": nn.Embedding(12, 4, padding_idx=11), "places": nn.Embedding(5, 4), "head": nn.Linear(4, 2)}
    )
    rules = [*embeddings_rules(new_from=10, new=0.2), {"weight_decay": 0.05, "group": "rest"}]
    groups = build_decay_groups(model, rules)
    found = elements(groups)
    assert found["padding", "tokens.weight"].any(1).nonzero().flatten().tolist() == [11]
    assert found["new_rows", "tokens.weight"].any(1).nonzero().flatten().tolist() == [10]  # the rest of 10 and 11
    assert found["rest", "tokens.weight"].any(1).nonzero().flatten().tolist() == list(range(10))
    assert found["rest", "places.weight"].all()  # which has neither


def test_a_model_without_such_layers_is_no_mistake():
    groups = build_decay_groups(
        nn.Linear(2, 2),
        [*attention_rules(0.1), *gates_rules(0.1), *embeddings_rules(new_from=7), {"weight_decay": 0.05}],
    )
    assert groups.names == ["rest"]


@pytest.mark.parametrize(
    "rules",
    [
        [{"preset": "attention", "weight_decay": 0.1, "k": 0}, {"weight_decay": 0.05}],
        [{"preset": "gates", "f": 0}, {"weight_decay": 0.05}],
        [{"preset": "embeddings", "new_from": 10, "new": "1e-3"}, {"weight_decay": 0.05}],
        {
            "a": {"params": "w", "rows": "1:, 0", "weight_decay": 0.1},
            "b": {"params": "v", "rows": [3], "weight_decay": 1},
        },
        {"a": {"params": "w", "blocks": {"q": 2, "k": 3}, "dim": 1, "weight_decay": {"q": 0.1, "k": 0}}},
        {"a": {"params": "w", "blocks": 3, "block": 2, "weight_decay": {"schedule": "linear", "start": 1, "end": 0}}},
        {"a": {"params": "w", "toward": "start", "toward_dtype": "bfloat16", "weight_decay": 0.1}},
    ],
)
def test_they_travel_as_text(rules):
    yaml = pytest.importorskip("yaml")
    assert parse_rules(yaml.safe_load(rules_as_yaml(rules))) == parse_rules(rules)
    assert parse_rules(plain_rules(parse_rules(rules))) == parse_rules(rules)


def test_what_text_cannot_hold_says_so():
    for rule, message in [
        ({"rows": lambda name, shape: [True]}, "rows is a function, which text cannot hold"),
        ({"toward": {"w": torch.ones(2)}}, "toward is a state dict, which text cannot hold"),
    ]:
        rules = {"w": {"weight_decay": 0.1, **rule}}
        with pytest.raises(ValueError, match=message):
            rules_as_yaml(rules)
        with pytest.raises(TypeError, match="pass it again in code"):
            parse_rules(plain_rules(rules))


def test_new_needs_new_from():
    with pytest.raises(TypeError, match="give new_from, too"):
        embeddings_rules(new=0.1)
