"""Three steps of TRL's trainers on a tiny model, plain, then fused: `python trl_trainer.py FOLDER dpo,kto` prints JSON.

Run in a process of its own, with the TRL version asked for, and the transformers that goes with it, on PYTHONPATH.
"""

import inspect
import json
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [a + b for a in ("ba", "de", "ki", "lo", "mu") for b in ("n", "r", "s", "t")]
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ eos_token }} {% endfor %}"


def tokenizer():
    names = ["<pad>", "<eos>", "<unk>", "user", "assistant", *WORDS]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                   model_input_names=["input_ids", "attention_mask"])  # fmt: skip
    made.chat_template = CHAT + "{% if add_generation_prompt %}assistant {% endif %}"
    return made


def model(seed, width=32):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=40, hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    ))  # fmt: skip


def rows(kind, n=8):
    def text(i, length):
        return " ".join(WORDS[(7 * i + 3 * k) % len(WORDS)] for k in range(length))

    made = []
    for i in range(n):
        prompt, good, bad = text(i, 4), text(i + 3, 3 + i % 4), text(2 * i + 1, 5 - i % 3)
        if kind in ("dpo", "orpo"):
            made.append({"prompt": prompt, "chosen": " " + good, "rejected": " " + bad})
        elif kind == "kto":
            made.append({"prompt": prompt, "completion": " " + good, "label": i % 3 != 0})
        elif kind == "grpo":
            made.append({"prompt": prompt})
        elif kind == "sft":
            made.append({"text": f"{prompt} {good}"})
        else:
            made.append({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": good}]})
    return Dataset.from_list(made)


def classes(kind, fused):
    import trl

    upper = kind.upper()
    if kind == "orpo":
        if not hasattr(trl, "ORPOTrainer"):
            from trl.experimental import orpo as trl
        if fused:
            from liger_kernel.transformers.trainer import LigerORPOTrainer

            return trl.ORPOConfig, LigerORPOTrainer
    if kind == "gkd" and not hasattr(trl, "GKDTrainer"):
        from trl.experimental import gkd as trl
    return getattr(trl, f"{upper}Config"), getattr(trl, f"{upper}Trainer")


def length_reward(completions, **kwargs):
    return [float(len(c.split()) % 5) for c in completions]


def beside_its_formula(loss, pairs):
    """Records, at each call of GKD's loss, its value and that of the formula on whole logits."""
    forward = loss.forward

    def both(student_input, student_weight, teacher_input, teacher_weight, true_labels, **more):
        value = forward(student_input, student_weight, teacher_input, teacher_weight, true_labels, **more)
        live = true_labels != -100
        with torch.no_grad():
            z, z_p = (student_input @ student_weight.T)[live], (teacher_input @ teacher_weight.T)[live]
            q, p = ((logits / loss.temperature).softmax(-1) for logits in (z, z_p))
            m = loss.beta * p + (1 - loss.beta) * q
            soft = loss.beta * (p * (p / m).log()).sum(-1) + (1 - loss.beta) * (q * (q / m).log()).sum(-1)
            hard = torch.nn.functional.cross_entropy(z, true_labels[live])
        pairs.append((value.item(), (loss.weight_soft_loss * soft.mean() + loss.weight_hard_loss * hard).item()))
        return value

    loss.forward = both


def run(kind, fused, folder):
    make_config, make_trainer = classes(kind, fused)
    known = inspect.signature(make_config.__init__).parameters
    flags = [f for f in ("use_liger_kernel", "use_liger_loss") if f in known]
    config = dict(
        output_dir=folder, max_steps=3, per_device_train_batch_size=4, learning_rate=0.05, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, seed=0, lr_scheduler_type="constant", bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, disable_dropout=True, max_prompt_length=16, max_length=32,
        max_completion_length=8, num_generations=4, max_new_tokens=6, lmbda=0.0, optim="sgd",
    ) | {f: fused for f in flags}  # fmt: skip
    config = {k: v for k, v in config.items() if k in known}
    more = {}
    if kind in ("dpo", "kto"):
        more["ref_model"] = model(1)
    if kind == "gkd":
        more["teacher_model"] = model(2, width=48)
    if kind == "grpo":
        more["reward_funcs"] = length_reward
    trainer = make_trainer(
        model=model(0), args=make_config(**config), train_dataset=rows(kind), processing_class=tokenizer(), **more
    )
    losses = [v for v in vars(trainer).values() if type(v).__module__.startswith("liger_kernel.chunked_loss")]
    pairs = []
    if kind == "gkd" and losses:
        beside_its_formula(losses[0], pairs)
    trainer.train()
    logs = [
        {k: v for k, v in log.items() if isinstance(v, float)} for log in trainer.state.log_history if "loss" in log
    ]
    return {"logs": logs, "losses": [type(v).__name__ for v in losses], "pairs": pairs,
            "norm": trainer.model.model.norm.forward.__module__}  # fmt: skip


def main():
    folder, kinds = sys.argv[1], sys.argv[2].split(",")
    results = {kind: {} for kind in kinds}
    for fused in (False, True):  # fused ones last: rotary functions are patched for the whole process
        for kind in kinds:
            results[kind]["fused" if fused else "plain"] = run(kind, fused, folder)
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    main()
