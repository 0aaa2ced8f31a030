"""Resolving groups, against those who do comparable work on the same model, where they are installed.

Theirs is less of it: transformers names the parameters that decay, by two patterns and two classes; OLMo-core's
overrides are globs over names; mmengine's are parts of names, with a group for each parameter; timm looks at dimensions
and biases only. Ours are ten rules, each of which is checked to take something.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import torch
from measuring import Row, Sizes, against, seconds_in_turn, time_text
from models import RULES, MixtureOfExperts, on_meta
from torch import nn

from lightning_regdecay import WeightDecayMixin, build_decay_groups

NAMED = "named_parameters() alone"


def rows(sizes: Sizes) -> Iterator[Row]:
    peers = installed_peers()
    last = None
    for tensors in (size for size in (1000, 10_000, 100_000) if size <= max(sizes.tensors, 1000)):
        model = on_meta(MixtureOfExperts, tensors)
        count = sum(1 for _ in model.parameters())
        calls = {"ours": partial(build_decay_groups, model, RULES), NAMED: lambda m=model: list(m.named_parameters())}
        calls |= {name: partial(peer, model) for name, peer in peers.items()}
        seconds = seconds_in_turn(calls, min(sizes.rounds, 5))
        goals = {name: "≤ 1" for name in peers if not name.startswith("timm")}
        on = f"{count:,} parameters"
        yield from against("groups by 10 rules", on, seconds, "ours", goals)
        if last is not None:
            fewer, before = last
            growth = seconds["ours"] / before / (count / fewer)
            peer = f"{fewer:,} parameters, in proportion"
            yield Row("groups by 10 rules", on, time_text(seconds["ours"]), peer, time_text(before), growth, "≤ 1")
        last = count, seconds["ours"]
    if last is not None:
        yield Row("groups by 10 rules", f"{last[0]:,} parameters", time_text(last[1]), goal="< 1 s")
    yield from llama(sizes)


def installed_peers() -> dict[str, Callable[[nn.Module], Any]]:
    peers: dict[str, Callable[[nn.Module], Any]] = {}
    for find in (transformers_peer, olmo_peer, timm_peer, mmengine_peer):
        try:
            name, peer = find()
        except ImportError:
            continue
        peers[name] = peer
    return peers


def transformers_peer() -> tuple[str, Callable[[nn.Module], Any]]:
    from transformers.trainer_pt_utils import get_parameter_names

    return "transformers", lambda model: get_parameter_names(model, [nn.LayerNorm, nn.RMSNorm], ["bias", "norm"])


def olmo_peer() -> tuple[str, Callable[[nn.Module], Any]]:
    from olmo_core.optim import AdamWConfig, OptimGroupOverride

    patterns = [pattern for rule in RULES for pattern in as_globs(rule.get("params", "embed.*"))]
    overrides = [OptimGroupOverride(params=[pattern], opts={"weight_decay": 0.1}) for pattern in patterns]
    config = AdamWConfig(group_overrides=overrides)
    return "OLMo-core", lambda model: config.build_groups(model)


def as_globs(patterns: str | list[str]) -> list[str]:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return ["*experts.*.down_proj*" if pattern.startswith("re:") else pattern for pattern in patterns]


def timm_peer() -> tuple[str, Callable[[nn.Module], Any]]:
    from timm.optim import param_groups_weight_decay

    return "timm (no rules)", param_groups_weight_decay


def mmengine_peer() -> tuple[str, Callable[[nn.Module], Any]]:
    from mmengine.logging import MMLogger
    from mmengine.optim import DefaultOptimWrapperConstructor

    MMLogger.get_current_instance().setLevel(logging.ERROR)  # it logs a line for each parameter
    keys = ["embed", "router", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    build = DefaultOptimWrapperConstructor(
        {"optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 0.1}},
        {"norm_decay_mult": 0.0, "bias_decay_mult": 0.0, "custom_keys": {key: {"decay_mult": 0.5} for key in keys}},
    )
    return "mmengine", lambda model: build.add_params([], model)


class LitLlama(WeightDecayMixin, L.LightningModule):
    decay_rules = {"*norm*": 0.0, "*embed_tokens*": 0.0, "*.mlp.*": 0.1, "*.self_attn.*": 0.05, "*": 0.1}

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def llama(sizes: Sizes) -> Iterator[Row]:
    """``configure_optimizers`` on the shapes of Llama 3 405B (Grattafiori et al. 2024, arXiv 2407.21783, table 3)."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return
    shape = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "vocab_size": 128256}
    config = LlamaConfig(**shape, num_attention_heads=128, num_key_value_heads=8, tie_word_embeddings=False)
    if sizes.small:
        config.num_hidden_layers = 2
    module = LitLlama(on_meta(LlamaForCausalLM, config))

    def by_hand() -> torch.optim.Optimizer:
        named = list(module.named_parameters())
        norms = [p for name, p in named if "norm" in name or "embed_tokens" in name]
        others = [p for name, p in named if not ("norm" in name or "embed_tokens" in name)]
        groups = [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.1}]
        return torch.optim.AdamW(groups)

    seconds = seconds_in_turn({"ours": module.configure_optimizers, "two groups by hand": by_hand}, sizes.rounds)
    on = f"Llama 3, {sum(p.numel() for p in module.parameters()) / 1e9:.0f}B parameters"
    yield Row("configure_optimizers", on, time_text(seconds["ours"]), goal="< 0.5 s")
    yield from against("configure_optimizers", on, seconds, "ours", {})
