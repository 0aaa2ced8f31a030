"""Muon for hidden matrices and AdamW for the rest, in one optimizer, as rules in plain data. Knows no model."""

from __future__ import annotations

from typing import Any

from lightning_regdecay.rules.by_layer import STEM, PlainRules, check_patterns
from lightning_regdecay.rules.scalars import nonnegative_number, number_of, true_or_false

EMBEDDINGS = ["torch.nn.Embedding", "torch.nn.EmbeddingBag"]
HEADS = (
    r"re:(^|\.)(lm_head|heads?|classifier|embed_out|pooler|score|output_projection|rel(ative)?_pos\w*)(\.|$)|"
    r"^([A-Za-z_]\w*\.)?fc\."
)
"""The usual names of what makes the output, and of tables of relative positions."""


def muon_lr_rules(
    *, lr: Any = None, adamw_lr: Any = None, key: str = "use_muon", heads: Any = HEADS, max_ndim: Any = None
) -> PlainRules:
    """Hidden matrices by Muon, and the rest by AdamW, in one optimizer that does both, as in the reference of Muon.

    As lr rules, which any decay rules cross; :func:`muon_rules` has λ too. AdamW gets what has one dimension or none,
    embeddings, tokens, stems and heads. Source: the README of `Muon <https://github.com/KellerJordan/Muon>`_.

    Args:
        lr: the lr of Muon's groups; None for the optimizer's own.
        adamw_lr: that of AdamW's groups.
        key: what the optimizer reads in a param group: ``"use_muon"`` (the reference, pytorch-optimizer's, timm's) is
            True for Muon's groups, ``"use_fallback"`` (timm's) for AdamW's.
        heads: patterns of what makes the output, which goes to AdamW.
        max_ndim: 2 for an optimizer that takes no kernels of convolutions.

    Raises:
        ValueError: for another key.

    >>> for rule in muon_lr_rules(lr=0.02, adamw_lr=3e-4, heads="head.*")[2:]:
    ...     print(rule)
    {'min_ndim': 2, 'lr': 0.02, 'options': {'use_muon': True}, 'group': 'muon'}
    {'lr': 0.0003, 'options': {'use_muon': False}, 'group': 'adamw', 'optional': True}
    """
    if key not in ("use_muon", "use_fallback"):
        raise ValueError(f"key must be 'use_muon' or 'use_fallback', got {key!r}")
    bounds = {"min_ndim": 2} if max_ndim is None else {"min_ndim": 2, "max_ndim": max_ndim}
    lrs = {True: lr, False: adamw_lr}

    def rule(is_muon: bool, **selectors: Any) -> dict[str, Any]:
        own = {} if lrs[is_muon] is None else {"lr": nonnegative_number("lr", lrs[is_muon])}
        options = {key: is_muon if key == "use_muon" else not is_muon}
        found = {**selectors, **own, "options": options, "group": "muon" if is_muon else "adamw"}
        return found if is_muon else {**found, "optional": True}

    check_patterns("heads", heads)
    outside = [heads] if isinstance(heads, str) else heads
    return [
        rule(False, params=[*outside, STEM]),
        rule(False, modules=EMBEDDINGS),
        rule(True, **bounds),
        rule(False),
    ]


def muon_rules(
    weight_decay: Any = None,
    *,
    adamw_weight_decay: Any = None,
    vectors: Any = 0.0,
    lr: Any = None,
    adamw_lr: Any = None,
    key: str = "use_muon",
    heads: Any = HEADS,
    max_ndim: Any = None,
    marks: bool = True,
) -> PlainRules:
    """Hidden matrices by Muon, and the rest by AdamW, in one optimizer that does both; each with its λ and lr.

    In the groups ``muon``, ``adamw`` and ``adamw_no_decay``, see :func:`muon_lr_rules`; ``vectors`` that are not 0
    have the group ``adamw_vectors``.

    Args:
        weight_decay: λ of Muon's groups.
        adamw_weight_decay: λ of embeddings, tokens, stems and heads.
        vectors: λ of what has one dimension or none; None for that of AdamW's others.
        lr: see there.
        adamw_lr: see there.
        key: see there.
        heads: see there.
        max_ndim: see there.
        marks: False to decay what the model has marked, by ``_no_weight_decay``, like the rest.

    Raises:
        ValueError: for another key.
    """
    by_kind = muon_lr_rules(lr=lr, adamw_lr=adamw_lr, key=key, heads=heads, max_ndim=max_ndim)
    strengths = {"muon": weight_decay, "adamw": adamw_weight_decay}
    found: PlainRules = []
    for rule in by_kind:
        own = strengths[rule["group"]]
        options = {**rule["options"], **({"lr": rule["lr"]} if "lr" in rule else {})}
        strength = {"decay_mult": 1.0} if own is None else {"weight_decay": own}
        found.append({**{k: v for k, v in rule.items() if k != "lr"}, **strength, "options": options})
    alone = {"options": found[-1]["options"], "optional": True, "group": "adamw_no_decay"}
    kept: PlainRules = [{"where": "marked", "weight_decay": 0.0, **alone}] if true_or_false("marks", marks) else []
    if vectors is not None:
        is_zero = isinstance(vectors, (int, float, str)) and number_of(vectors) == 0
        group = "adamw_no_decay" if is_zero else "adamw_vectors"
        kept.append({"max_ndim": 1, "weight_decay": vectors, **alone, "group": group})
    return kept + found
