"""Distil a teacher into a student of another width, neither's logits ever whole: python examples/distill.py [--steps 3]

--student and --teacher name models with one vocabulary; default: two tiny ones with random weights.
"""

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from liger_kernel.transformers import apply_liger_kernel

TEXTS = [f"{a} times {b} is {a * b}." for a in range(2, 10) for b in range(2, 10)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student")
    parser.add_argument("--teacher")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if not (args.student and args.teacher):
            import tiny

            args.student, args.teacher = (tiny.save(f"{scratch}/{n}", width) for n, width in (("s", 32), ("t", 64)))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = AutoTokenizer.from_pretrained(args.teacher)
        student = AutoModelForCausalLM.from_pretrained(args.student).to(device).train()
        teacher = AutoModelForCausalLM.from_pretrained(args.teacher).to(device).eval().requires_grad_(False)
    print(apply_liger_kernel(student))
    apply_liger_kernel(teacher)

    loss_fn = LigerFusedLinearJSDLoss(weight_hard_loss=0.1, weight_soft_loss=0.9, beta=0.5, temperature=2.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for step in range(args.steps):
        batch = tokenizer(TEXTS[8 * step % 64 :][:8], return_tensors="pt", padding=True).to(device)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)[:, 1:]
        hidden = student.model(**batch).last_hidden_state[:, :-1]
        with torch.no_grad():
            teacher_hidden = teacher.model(**batch).last_hidden_state[:, :-1]
        loss = loss_fn(hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
