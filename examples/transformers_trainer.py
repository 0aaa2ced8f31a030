"""Weight decay rules in transformers' Trainer: a tiny GPT-2, from scratch, on the standard library's own sources.

    pip install transformers accelerate
    python examples/transformers_trainer.py

The Trainer makes its optimizer as ever; one line puts the rules in force in it. What it steps over is printed, the L2
norms of the groups at the end, and the loss on a module that it was not trained on. Takes about twenty seconds, leaves
nothing behind.
"""

from __future__ import annotations

import tempfile
import textwrap
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from lightning_regdecay import GroupL2Norm, apply_decay_rules, groups_in_force

LENGTH = 64
RULES = {
    "no_decay": {"params": ["*.bias", "*ln_*", "*wte*", "*wpe*"], "weight_decay": 0.0},
    "*.attn.*": 0.05,
    "*": 0.1,
}
LR_RULES = {"embeddings": {"params": ["*wte*", "*wpe*"], "lr_mult": 2.0}}


class RuledTrainer(Trainer):
    """A Trainer with the rules in force in its optimizer."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        apply_decay_rules(optimizer, self.model, RULES, lr_rules=LR_RULES)
        print(groups_in_force(optimizer))
        return optimizer


def text_of(module: Any) -> list[dict[str, torch.Tensor]]:
    """The sources of a module, in pieces of characters."""
    codes = torch.tensor(list(Path(module.__file__).read_bytes()))
    pieces = codes[: len(codes) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main() -> None:
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", ".*pin_memory.*")
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=2,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = RuledTrainer(GPT2LMHeadModel(config), arguments, train_dataset=text_of(warnings))
        trainer.train()
        loss = trainer.evaluate(text_of(textwrap))["eval_loss"]
    groups = groups_in_force(trainer.optimizer)
    metric = GroupL2Norm(group["name"] for group in groups)
    metric.update({group["name"]: group["params"] for group in groups})
    print("\nL2 norms:", ", ".join(f"{name} {norm.item():.2f}" for name, norm in metric.compute().items()))
    print(f"param groups of the optimizer: {len(trainer.optimizer.param_groups)}")
    print(f"loss on textwrap: {loss:.3f} nats per character, {torch.log(torch.tensor(256.0)):.3f} before training")


if __name__ == "__main__":
    main()
