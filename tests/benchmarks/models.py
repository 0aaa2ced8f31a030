"""What is measured on: the parameters of known models, and a model that can be trained."""

from __future__ import annotations

import math
import random
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

RULES: list[dict[str, Any]] = [
    {"params": "*.bias", "weight_decay": 0.0},
    {"params": "*norm*", "weight_decay": 0.0, "group": "norm"},
    {"modules": "Embedding", "weight_decay": 0.0, "group": "embedding"},
    {"params": "*.router.*", "weight_decay": 0.01},
    {"params": ["*.q_proj.*", "*.k_proj.*", "*.v_proj.*"], "weight_decay": 0.05, "group": "attention_in"},
    {"params": "*.o_proj.*", "weight_decay": 0.05, "group": "attention_out"},
    {"params": "*.gate_proj.*", "weight_decay": 0.1, "optional": True},
    {"params": "*.up_proj.*", "weight_decay": 0.1, "optional": True},
    {"params": r"re:experts\.\d+\.down_proj", "weight_decay": 0.2, "group": "down", "optional": True},
    {"min_ndim": 2, "weight_decay": 0.3, "group": "matrices"},
]
"""Ten rules for the mixture of experts: globs, a regular expression, a class, dimensions."""


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, width, bias=False)
        self.up_proj = nn.Linear(width, width, bias=False)
        self.down_proj = nn.Linear(width, width, bias=False)


class ExpertLayer(nn.Module):
    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.output_norm = nn.RMSNorm(width)
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(Expert(width) for _ in range(experts))


class MixtureOfExperts(nn.Module):
    """A tree of about so many parameter tensors; each layer has up to 256 experts of three matrices."""

    def __init__(self, tensors: int, width: int = 16) -> None:
        super().__init__()
        layers = math.ceil(tensors / (12 + 3 * 256))
        experts = max((tensors // layers - 12) // 3, 1)
        self.embed = nn.Embedding(width, width)
        self.layers = nn.ModuleList(ExpertLayer(experts, width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, width)


def on_meta(make: Any, *args: Any, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return make(*args, **options)


def vit_b_shapes() -> list[tuple[int, ...]]:
    """The 152 parameters of ViT-B/16, 86.6M (Dosovitskiy et al. 2021, arXiv 2010.11929, table 1)."""
    width = 768
    layer = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    first = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    return first + 12 * layer + [(width,), (width,), (1000, width), (1000,)]


def mixed_shapes(most: int) -> list[tuple[int, ...]]:
    """1000 tensors from 100 to ``most`` elements, each decade as often."""
    draw = random.Random(0)
    return [(int(100 * (most / 100) ** draw.random()),) for _ in range(1000)]


def even_shapes(most: int) -> list[tuple[int, ...]]:
    """1000 tensors of twenty sizes up to ``most`` elements, none of them large."""
    return [(most * (i % 20 + 1) // 20,) for i in range(1000)]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(L.LightningModule):
    """A vision transformer of the size of ViT-S (Touvron et al. 2021, arXiv 2012.12877): 12 layers, width 384."""

    def __init__(self, width: int = 384, depth: int = 12, heads: int = 6, size: int = 64) -> None:
        super().__init__()
        self.size = size
        self.patches = nn.Conv2d(3, width, kernel_size=8, stride=8)
        self.position = nn.Parameter(torch.zeros(1, (size // 8) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, classes = batch
        tokens = self.patches(images).flatten(2).mT + self.position
        return nn.functional.cross_entropy(self.head(self.norm(self.blocks(tokens)).mean(1)), classes)

    def train_dataloader(self) -> Any:
        torch.manual_seed(0)
        images, classes = torch.randn(100, 3, self.size, self.size), torch.randint(1000, (100,))
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, classes), batch_size=2)


VIT_RULES = {"*bias": 0.0, "*norm*": 0.0, "position": 0.0, "head.*": 1e-3, "*": 0.05}
