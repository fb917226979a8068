"""Direct preference optimisation with TRL: python examples/dpo_trl.py [--model path/to/model] [--steps 3]

TRL 0.24 to 1.12 computes the loss with liger_kernel.chunked_loss; later versions with their own head, on these kernels.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

ROWS = [{"prompt": f"{a} times {b} is", "chosen": f" {a * b}.", "rejected": f" {a * b + 1}."}
        for a in range(2, 10) for b in range(2, 10)]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; default: a tiny one with random weights")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if not args.model:
            import tiny

            args.model = tiny.save(f"{scratch}/model")
        config = DPOConfig(
            output_dir=scratch, max_steps=args.steps, per_device_train_batch_size=4, learning_rate=1e-4, beta=0.1,
            max_length=128, logging_steps=1, save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(),
            use_liger_kernel=True,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=args.model, args=config, train_dataset=Dataset.from_list(ROWS),
            processing_class=AutoTokenizer.from_pretrained(args.model),
        )  # fmt: skip
        trainer.train()


if __name__ == "__main__":
    main()
