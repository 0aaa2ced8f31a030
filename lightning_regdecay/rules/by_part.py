"""Parts of tensors whose layout is known, as rules in plain data: attention, gates, rows of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_regdecay.rules.by_layer import PlainRules, check_patterns
from lightning_regdecay.rules.regions import PADDING
from lightning_regdecay.rules.scalars import whole_number

FUSED = ("*.qkv.weight", "*.to_qkv.weight", "*.Wqkv.weight")
"""Linear layers that make queries, keys and values, a third of the rows each, in timm, torchvision, x-transformers,
ModernBERT, FlashAttention. Not those that put them together by head (GPT-NeoX, BLOOM), or have fewer keys (Phi-3)."""
_LSTM, _GRU = ("i", "f", "g", "o"), ("r", "z", "n")


def attention_rules(
    weight_decay: Any = None, *, q: Any = None, k: Any = None, v: Any = None, params: str | Sequence[str] = FUSED
) -> PlainRules:
    """Queries, keys and values apart, where one tensor holds all of them: groups ``attention.q``, ``.k`` and ``.v``.

    For ``nn.MultiheadAttention``, fused linear layers and GPT-2's ``c_attn``, to stand before rules for the rest.

    Args:
        weight_decay: λ of those that have none of their own; None for the optimizer's.
        q: λ of queries.
        k: λ of keys.
        v: λ of values.
        params: patterns of the weights of fused linear layers.

    >>> for rule in attention_rules(0.1, q=0.0, params="blocks.*.qkv.weight")[:2]:
    ...     print(rule)
    {'params': '*in_proj_weight', 'modules': 'torch.nn.MultiheadAttention', 'blocks': ['q', 'k', 'v'], 'block': 'q', \
'weight_decay': 0.0, 'group': 'attention.q', 'optional': True}
    {'params': 'blocks.*.qkv.weight', 'blocks': ['q', 'k', 'v'], 'block': 'q', 'weight_decay': 0.0, \
'group': 'attention.q', 'optional': True}
    """
    check_patterns("params", params)
    fused = params if isinstance(params, str) else list(params)
    places: list[dict[str, Any]] = [
        {"params": "*in_proj_weight", "modules": "torch.nn.MultiheadAttention"},
        {"params": fused},
        {"params": "*.attn.c_attn.weight", "modules": "Conv1D", "dim": 1},
    ]
    return _blocks("attention", places, weight_decay, {"q": q, "k": k, "v": v})


def gates_rules(
    weight_decay: Any = None,
    *,
    i: Any = None,
    f: Any = None,
    g: Any = None,
    o: Any = None,
    r: Any = None,
    z: Any = None,
    n: Any = None,
) -> PlainRules:
    """The gates of ``nn.LSTM`` and ``nn.GRU`` apart, and of their cells: groups ``gates.i`` to ``gates.n``.

    In the layout of torch: input, forget, cell and output gate of an LSTM, reset, update and new gate of a GRU. Weights
    alone, to stand before rules for the rest.

    Args:
        weight_decay: λ of those that have none of their own; None for the optimizer's.
        i: λ of the input gate.
        f: λ of the forget gate.
        g: λ of the cell gate.
        o: λ of the output gate.
        r: λ of the reset gate.
        z: λ of the update gate.
        n: λ of the new gate.
    """
    weights = r"re:(^|\.)weight_(ih|hh)(_l\d+)?(_reverse)?$"
    lstm = {"params": weights, "modules": ["torch.nn.LSTM", "torch.nn.LSTMCell"]}
    gru = {"params": weights, "modules": ["torch.nn.GRU", "torch.nn.GRUCell"]}
    return [
        *_blocks("gates", [lstm], weight_decay, dict(zip(_LSTM, (i, f, g, o)))),
        *_blocks("gates", [gru], weight_decay, dict(zip(_GRU, (r, z, n)))),
    ]


def embeddings_rules(
    *, padding: Any = 0.0, new_from: int | None = None, new: Any = None, params: str | Sequence[str] | None = None
) -> PlainRules:
    """Rows of ``nn.Embedding`` apart: the one for padding, and new ones: groups ``padding`` and ``new_rows``.

    To stand before rules for the rest.

    Args:
        padding: λ of the row ``padding_idx``.
        new_from: the first of the rows that were added to a pretrained table; None without.
        new: λ of these; None for the optimizer's.
        params: patterns of the tables, by default all.

    Raises:
        TypeError: for ``new`` without ``new_from``.

    >>> for rule in embeddings_rules(new_from=32000, new=0.1):
    ...     print(rule)
    {'modules': 'torch.nn.Embedding', 'rows': 'padding', 'weight_decay': 0.0, 'group': 'padding', 'optional': True}
    {'modules': 'torch.nn.Embedding', 'rows': '32000:', 'weight_decay': 0.1, 'group': 'new_rows', 'optional': True}
    """
    first = whole_number("new_from", new_from, least=0)
    if new is not None and first is None:
        raise TypeError("new is λ of new rows: give new_from, too, the number of the first of them")
    tables: dict[str, Any] = {"modules": "torch.nn.Embedding"}
    if params is not None:
        check_patterns("params", params)
        tables["params"] = params if isinstance(params, str) else list(params)
    found = [{**tables, "rows": PADDING, **_strength(padding), "group": "padding", "optional": True}]
    if first is not None:
        found.append({**tables, "rows": f"{first}:", **_strength(new), "group": "new_rows", "optional": True})
    return found


def _blocks(group: str, places: Sequence[Mapping[str, Any]], weight_decay: Any, own: Mapping[str, Any]) -> PlainRules:
    """A rule for each block of the tensors in some places."""
    return [
        {
            **place,
            "blocks": list(own),
            "block": name,
            **_strength(weight_decay if strength is None else strength),
            "group": f"{group}.{name}",
            "optional": True,
        }
        for name, strength in own.items()
        for place in places
    ]


def _strength(weight_decay: Any) -> dict[str, Any]:
    return {"decay_mult": 1.0} if weight_decay is None else {"weight_decay": weight_decay}
