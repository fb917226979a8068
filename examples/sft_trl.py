"""Supervised fine-tuning with TRL on the kernels: python examples/sft_trl.py [--model path/to/model] [--steps 3]

Any TRL from 0.24 on. From 1.15 on TRL brings a loss head of its own; norms, MLP and rope are these.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

TEXTS = [f"{a} times {b} is {a * b}." for a in range(2, 10) for b in range(2, 10)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; default: a tiny one with random weights")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if not args.model:
            import tiny

            args.model = tiny.save(f"{scratch}/model")
        config = SFTConfig(
            output_dir=scratch, max_steps=args.steps, per_device_train_batch_size=4, learning_rate=1e-3,
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(),
            use_liger_kernel=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=args.model, args=config, train_dataset=Dataset.from_list([{"text": t} for t in TEXTS])
        )
        trainer.train()


if __name__ == "__main__":
    main()
