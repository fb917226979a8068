"""A patched model under Lightning's FSDP strategy, on two devices: python examples/lightning_fsdp.py [--steps 3]"""

import argparse
import os

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from several import batches, load, parse
from torch.utils.data import DataLoader

from liger_kernel.transformers import apply_liger_kernel


class Module(lightning.LightningModule):
    def __init__(self, name: str | None, steps: int):
        super().__init__()
        self.model, self.steps = load(name), steps
        apply_liger_kernel(self.model)

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        loss = self.model(**batch, use_cache=False).loss
        self.print(f"loss: {loss.item():.4f}")
        return loss

    def train_dataloader(self) -> DataLoader:
        given = [*batches(self.model.config.vocab_size, self.global_rank, self.steps)]
        return DataLoader(given, batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(args: argparse.Namespace) -> None:
    on_gpu = torch.cuda.is_available()  # Lightning's FSDP needs GPUs
    strategy = FSDPStrategy(sharding_strategy="FULL_SHARD") if on_gpu else DDPStrategy(process_group_backend="gloo")
    trainer = lightning.Trainer(
        accelerator="gpu" if on_gpu else "cpu", devices=2, strategy=strategy, max_steps=args.steps, logger=False,
        precision="bf16-mixed" if on_gpu else "32-true", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, barebones=False, default_root_dir=os.getcwd(),
    )  # fmt: skip
    trainer.fit(Module(args.model, args.steps))


if __name__ == "__main__":
    main(parse(__doc__))
