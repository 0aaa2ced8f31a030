"""Train a small transformer with FSDP2 and watch the norms of whole parameters, of which each process holds a part.

    python examples/sharded.py                # two processes on the CPU
    python examples/sharded.py --devices 4
    python examples/sharded.py --accelerator gpu --devices 8

The text is Python's own standard library, byte by byte. The rules go by the class of the module and by the number of
dimensions, which FSDP does not change for them. In the end the parameters are gathered once, and each group's logged
norm stands beside the norm of the whole.
"""

from __future__ import annotations

import argparse
import sysconfig
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset

from lightning_regdecay import DecayRule, WeightDecayMixin, WeightDecayMonitor

CONTEXT = 64


class Text(Dataset):
    """Windows of CONTEXT + 1 bytes of the standard library's sources."""

    def __init__(self, windows: int = 4096) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        data = b"".join(file.read_bytes() for file in files)
        data = data[: windows * (CONTEXT + 1)]
        self.windows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, CONTEXT + 1).long()

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Tensor:
        return self.windows[index]


class Transformer(nn.Module):
    """Predicts the next byte."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.position = nn.Parameter(torch.zeros(CONTEXT, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.embed(text) + self.position
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device=text.device)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return self.head(self.norm(hidden))


class LitTransformer(WeightDecayMixin, L.LightningModule):
    """Rules by class and by dimension, which are those of the model as it is written here."""

    decay_rules = [
        DecayRule(0.0, modules=["LayerNorm", "Embedding"], group="norms"),
        DecayRule(0.0, max_ndim=1, group="vectors"),
        DecayRule(0.1, params="model.head.*", group="head"),
        DecayRule(0.3, min_ndim=2, group="matrices"),
    ]

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = Transformer()

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss


def norm_of_whole(parameters: list[Tensor]) -> float:
    """The norm of parameters that are gathered from all processes, in float64."""
    squares = [parameter.detach().full_tensor().double().square().sum() for parameter in parameters]
    return torch.stack(squares).sum().sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*(does not have many workers|returned a view tensor).*")

    L.seed_everything(0, verbose=False)
    monitor = WeightDecayMonitor()
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy=ModelParallelStrategy(
            data_parallel_size=args.devices,
            tensor_parallel_size=1,
            process_group_backend="gloo" if args.accelerator == "cpu" else "nccl",
        ),
        max_epochs=args.epochs,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(LitTransformer(), DataLoader(Text(), batch_size=32, shuffle=True))

    loss = trainer.callback_metrics["train_loss"].item()
    rows = []
    for group in trainer.optimizers[0].param_groups:  # every process takes part in gathering
        here = sum(parameter.to_local().numel() for parameter in group["params"])
        whole = sum(parameter.numel() for parameter in group["params"])
        logged = monitor.history[-1][f"decay/{group['name']}/l2_norm"]
        truth = norm_of_whole(group["params"])
        share = f"{here:,} of {whole:,}"
        rows.append(f"{group['name']:<22}{share:>20}{logged:>14.6f}{truth:>14.6f}{abs(logged / truth - 1):>14.1e}")
    if trainer.is_global_zero:
        print(f"\nloss {loss:.3f} after {trainer.global_step} steps in {trainer.world_size} processes\n")
        print(f"{'group':<22}{'held by rank 0':>20}{'logged norm':>14}{'of the whole':>14}{'difference':>14}")
        print("\n".join(rows))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
