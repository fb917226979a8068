"""A patched model under DeepSpeed ZeRO-3: deepspeed --num_gpus 2 examples/deepspeed_zero3.py [--model m] [--steps 3]"""

import argparse
from pathlib import Path

import deepspeed
from several import batches, load, parse

from liger_kernel.transformers import apply_liger_kernel


def main(args: argparse.Namespace) -> None:
    model = load(args.model)
    apply_liger_kernel(model)  # before it is sharded
    config = str(Path(__file__).with_name("deepspeed_zero3.json"))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for batch in batches(model.config.vocab_size, engine.global_rank, args.steps):
        loss = engine(**{name: rows.to(engine.device) for name, rows in batch.items()}, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        if engine.global_rank == 0:
            print(f"loss: {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main(parse(__doc__))
