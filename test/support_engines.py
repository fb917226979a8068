"""Sharding engines under one interface, and what a model trained with each becomes."""

import functools
import importlib

import torch
from torch import distributed as dist

from support import tiny_model
from support_ranks import rank_device

VOCAB, STEPS, RATE = 67, 3, 0.2
ZERO = {f"zero{stage}": stage for stage in (1, 2, 3)}
FSDP2 = {  # reshard_after_forward of every unit, and whether the head is a unit
    "fsdp2": (True, True), "fsdp2_kept": (False, True), "fsdp2_root": (True, False), "fsdp2_root_kept": (False, False),
}  # fmt: skip
ENGINES = ("ddp", "fsdp1", *FSDP2, *ZERO)
KINDS = ("full", "lora", "tied", "tied_lora")


def make_model(kind: str, dtype=torch.float32) -> torch.nn.Module:
    """The same tiny llama on every rank: all of it trained, or adapters in its attention and its head."""
    torch.manual_seed(1)
    model = tiny_model("llama", vocab_size=VOCAB, tie_word_embeddings=kind.startswith("tied"))
    if kind.endswith("lora"):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        model = get_peft_model(model, config)
    return model.to(rank_device(), dtype)


def batches() -> list[dict]:
    """One global batch per step, four rows whose numbers of labels differ: [chosen; rejected] of two pairs."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(STEPS):
        ids = torch.randint(3, VOCAB, (4, 12), generator=generator)
        labels = ids.clone()
        for row, ignored in enumerate((1, 6, 3, 9)):
            labels[row, :ignored] = -100
        made.append({"input_ids": ids.to(rank_device()), "labels": labels.to(rank_device())})
    return made


def share(batch: dict) -> dict:
    """The rows of this rank: every pair stays together."""
    return {name: rows[dist.get_rank() :: dist.get_world_size()] for name, rows in batch.items()}


# Losses, of the model itself and in plain torch


def plain_head(forward, batch, whole):
    """The mean over the tokens of all ranks of this rank's loss, times the number of ranks, which is divided by."""
    return _loss_and_logits(forward, batch, whole)[0]


def fused_head(forward, batch, whole):
    loss, logits = _loss_and_logits(forward, batch, whole)
    assert type(logits).__name__ == "LazyLogits"
    return loss


def _loss_and_logits(forward, batch, whole):
    count = (whole["labels"][:, 1:] != -100).sum()
    parts = whole["labels"].shape[0] // batch["labels"].shape[0]
    output = forward(**batch, use_cache=False, num_items_in_batch=count)
    return output.loss * parts, output.logits


def fused_dpo(forward, batch, whole):
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    from liger_kernel.transformers.head_weight import merged

    loss = LigerFusedLinearDPOLoss(compute_nll_loss=False, use_ref_model=False, average_log_prob=False)

    def of_head(hidden, weight, bias, low_rank=None):
        if low_rank is not None:
            hidden, weight = merged(hidden, weight, low_rank)
        return loss(weight, hidden, batch["labels"][:, 1:], bias)[0]

    return forward(input_ids=batch["input_ids"], use_cache=False, skip_logits=True).logits[:, :-1].reduce(of_head)


def plain_dpo(forward, batch, whole):
    logits = forward(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    chosen, rejected = (-nll.sum(1)).chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


LOSSES = {"head": (fused_head, plain_head), "dpo": (fused_dpo, plain_dpo)}  # of a patched model, of a plain one

# Engines


class Plain:
    """One process."""

    def __init__(self, model):
        self.module = self.model = model
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)

    def train(self, loss_of, batch, whole) -> None:
        from liger_kernel.transformers.fsdp import _FSDPForwardRedirection

        def inside(*_):
            return loss_of(self.module.forward, batch, whole)

        if loss_of in (fused_head, plain_head):
            self.step(loss_of(self.model, batch, whole))
        else:
            self.step(_FSDPForwardRedirection()(self.model, inside, batch["input_ids"]))

    def step(self, loss) -> None:
        loss.backward()
        self.check_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check_gradients(self) -> None:
        pass

    def parameters(self) -> dict:
        """The whole trained parameters by name."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}


class DDP(Plain):
    def __init__(self, model):
        super().__init__(model)
        self.model = torch.nn.parallel.DistributedDataParallel(model)

    def check_gradients(self) -> None:
        for name, p in self.module.named_parameters():
            if p.requires_grad:
                assert_same_on_all_ranks(p.grad, name)

    def parameters(self) -> dict:
        return {name: p.detach().clone() for name, p in self.module.named_parameters() if p.requires_grad}


def layers_of(model):
    return [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]


class FSDP1(Plain):
    def __init__(self, model):
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

        units = set(layers_of(model))
        head = model.get_output_embeddings()
        if not model.config.tie_word_embeddings:
            units.add(head)
        policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=units.__contains__)
        model = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=rank_device())
        super().__init__(model)
        self.module = model.module

    def parameters(self) -> dict:
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(self.model):
            found = {name: p.detach().clone() for name, p in self.module.named_parameters() if p.requires_grad}
        return {name.replace("_fsdp_wrapped_module.", ""): p for name, p in found.items()}


class FullyShard(Plain):
    def __init__(self, model, reshard, own_unit):
        from torch.distributed.fsdp import fully_shard

        for layer in layers_of(model):
            fully_shard(layer, reshard_after_forward=reshard)
        if own_unit:
            head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
            unit = [embedding, head] if model.config.tie_word_embeddings else head
            fully_shard(unit, reshard_after_forward=reshard)
        fully_shard(model, reshard_after_forward=reshard)
        super().__init__(model)

    def parameters(self) -> dict:
        return {name: p.full_tensor() for name, p in super().parameters().items()}


class Zero(Plain):
    def __init__(self, model, stage):
        import deepspeed

        if rank_device().type == "cpu":  # where it would compile C++ first; gloo serves as well
            importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": next(model.parameters()).dtype is torch.bfloat16},
        }
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
        self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.module = self.model.module

    def step(self, loss) -> None:
        self.model.backward(loss)
        self.model.step()

    def parameters(self) -> dict:
        import deepspeed

        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        sharded = [p for p in named.values() if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(sharded):
            return {name: p.detach().clone() for name, p in named.items()}


def make_engine(engine: str, model) -> Plain:
    if engine in ZERO:
        return Zero(model, ZERO[engine])
    if engine in FSDP2:
        return FullyShard(model, *FSDP2[engine])
    return {"ddp": DDP, "fsdp1": FSDP1}[engine](model)


# What the tests call on every rank


def train(engine: str, kind: str, loss: str, patched: bool = True, dtype=torch.float32) -> dict:
    """The parameters after STEPS steps on this rank's share."""
    model = make_model(kind, dtype)
    if patched:
        from liger_kernel.transformers import apply_liger_kernel

        apply_liger_kernel(model)
    trained = make_engine(engine, model)
    for whole in batches():
        trained.train(LOSSES[loss][0 if patched else 1], share(whole), whole)
    found = trained.parameters()
    for name, p in found.items():
        assert_same_on_all_ranks(p, name)
    return found


def train_alone(kind: str, loss: str, dtype=torch.float32) -> tuple[dict, dict]:
    """The parameters before and after the same steps of the unpatched model in one process."""
    trained = Plain(make_model(kind, dtype))
    before = trained.parameters()
    for whole in batches():
        trained.step(LOSSES[loss][1](trained.model, whole, whole))
    return before, trained.parameters()


def distances(engine: str, kind: str, loss: str, patched: bool = True, dtype=torch.float32) -> tuple[float, float]:
    """How far the engine ends from the one process, and how far that went, both against the parameters' norm."""
    before, truth = train_alone(kind, loss)
    found = train(engine, kind, loss, patched, dtype)
    assert found.keys() == truth.keys()
    norm = distance(truth)
    return distance(truth, found) / norm, distance(truth, before) / norm


def distance(a: dict, b: dict | None = None) -> float:
    parts = [a[name].double() - (0 if b is None else b[name].double()) for name in a]
    return float(sum(part.square().sum() for part in parts) ** 0.5)


def assert_same_on_all_ranks(tensor, name) -> None:
    there = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(there, tensor.contiguous())
    for other in there:
        assert torch.equal(other, tensor), name


def refusal(engine: str) -> str:
    """What the loss says of the head's weight that it is given outside the model's forward."""
    from liger_kernel.ops.fused_linear_cross_entropy import liger_fused_linear_cross_entropy

    model = make_model("full")
    trained = make_engine(engine, model)
    weight = next(p for name, p in trained.module.named_parameters() if "lm_head" in name)
    hidden = torch.randn(4, 64, device=rank_device())
    try:
        liger_fused_linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.int64, device=rank_device()))
    except ValueError as error:
        return str(error)
    return "accepted"
