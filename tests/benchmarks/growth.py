"""How the cost grows: groups over parameters, norms over elements, and the errors of norms; drawn as a picture."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from grouping import NAMED, installed_peers
from measuring import Sizes, seconds_in_turn
from models import RULES, MixtureOfExperts, on_meta
from norms import LOOP, TOTAL_NORM, WAYS, errors, reads

from lightning_regdecay import build_decay_groups

STYLE: dict[str, dict[str, Any]] = {
    "ours": {"color": "black", "linewidth": 2.5, "zorder": 3, "label": "lightning_regdecay"},
    TOTAL_NORM: {"linewidth": 3.5, "alpha": 0.5},
}


def draw(path: Path, sizes: Sizes) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    grouping_axes, norm_axes, error_axes = axes
    curves(grouping_axes, grouping(sizes))
    grouping_axes.set(
        title="Groups by 10 rules, on the meta device", xlabel="parameters of the model", ylabel="seconds"
    )
    times, found = norms(sizes)
    curves(norm_axes, times)
    norm_axes.set(title="Norm of one float32 tensor", xlabel="elements", ylabel="seconds")
    curves(error_axes, found)
    error_axes.axhline(1e-6, color="gray", linestyle="--", linewidth=1)
    error_axes.set(title="Its error, random or constant values", xlabel="elements", ylabel="relative to float64")
    figure.savefig(path, dpi=110)


def curves(axes: Any, points: dict[str, list[tuple[float, float]]]) -> None:
    for name, of_name in points.items():
        axes.loglog(*zip(*of_name), marker=".", **{"label": name, **STYLE.get(name, {})})
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def grouping(sizes: Sizes) -> dict[str, list[tuple[float, float]]]:
    """10³ to 10⁹ parameters: up to 10⁵ of them wider matrices, from there on more of them."""
    points: dict[str, list[tuple[float, float]]] = {}
    peers = installed_peers()
    for tensors, width in ((20, 7), (20, 23), (20, 70), (100, 100), (1000, 100), (10_000, 100), (100_000, 100)):
        if tensors > sizes.tensors:
            continue
        model = on_meta(MixtureOfExperts, tensors, width)
        count = sum(parameter.numel() for parameter in model.parameters())
        calls = {"ours": partial(build_decay_groups, model, [{**rule, "optional": True} for rule in RULES])}
        calls |= {name: partial(peer, model) for name, peer in peers.items()}
        calls[NAMED] = lambda model=model: list(model.named_parameters())
        for name, seconds in seconds_in_turn(calls, min(sizes.rounds, 3)).items():
            points.setdefault(name, []).append((count, seconds))
    return points


def norms(sizes: Sizes) -> tuple[dict[str, list[tuple[float, float]]], dict[str, list[tuple[float, float]]]]:
    """10⁴ to 10⁹ elements: times and errors."""
    times: dict[str, list[tuple[float, float]]] = {}
    found: dict[str, list[tuple[float, float]]] = {}
    ways = {name: WAYS[name] for name in ("ours", TOTAL_NORM, LOOP)}
    for elements in (10**4, 10**5, 10**6, 10**7, 10**8, 10**9):
        if elements > sizes.elements:
            continue
        tensors = [torch.randn(elements)]
        calls: dict[str, Any] = {name: partial(way, tensors) for name, way in ways.items()}
        calls["one read (torch.sum)"] = reads(tensors[0])["sum"]
        for name, seconds in seconds_in_turn(calls, min(sizes.rounds, 5)).items():
            times.setdefault(name, []).append((elements, seconds))
        for name, error in errors(tensors, ways).items():
            found.setdefault(name, []).append((elements, max(error, 1e-12)))
    return times, found
