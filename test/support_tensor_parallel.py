"""A tiny model split by tensor parallelism, and what a step of it gives on every rank, patched and as it was."""

import contextlib
import functools
import tempfile

import torch
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from support import tiny_model
from support_ranks import rank_device

VOCAB = 67  # 34 and 33 on two ranks


def whole_model(tied=False, vocab=VOCAB, model_type="llama") -> torch.nn.Module:
    torch.manual_seed(1)
    return tiny_model(model_type, vocab_size=vocab, tie_word_embeddings=tied).to(rank_device())


def by_transformers(**of_model) -> torch.nn.Module:
    """Loaded with tp_plan="auto"."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        given = [folder]
        dist.broadcast_object_list(given)
        if dist.get_rank() == 0:
            whole_model(**of_model).save_pretrained(folder)
        dist.barrier()
        model = AutoModelForCausalLM.from_pretrained(given[0], tp_plan="auto").train()
        dist.barrier()
    return model


def by_torch(sequence=False, head="columns", local=True, fsdp=False, **of_model) -> torch.nn.Module:
    """Split by parallelize_module: the embedding, MLP and head, with `sequence` the norms' and residuals' rows too.

    local: whether the norms and the MLP's first linears return plain tensors. fsdp: under FSDP2 as well, whose mesh is
    of one rank here.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    model = whole_model(**of_model)
    meshes = init_device_mesh(rank_device().type, (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    mesh = meshes["tp"]
    outside = Shard(1) if sequence else Replicate()
    into = functools.partial(ColwiseParallel, input_layouts=outside)
    heads = {
        "columns": into(output_layouts=Replicate()),
        "split": into(output_layouts=Shard(-1)),
        "rows": RowwiseParallel(input_layouts=outside),
    }
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=outside),
        "model.layers.*.mlp.gate_proj": into(use_local_output=local),
        "model.layers.*.mlp.up_proj": into(use_local_output=local),
        "model.layers.*.mlp.down_proj": RowwiseParallel(output_layouts=outside),
        "lm_head": heads[head],
    }
    if sequence:  # the attention of a layer is whole on every rank: there the rows meet
        names = "model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm", "model.norm"
        plan |= {name: SequenceParallel(use_local_output=local) for name in names}
        whole = {"hidden_states": Shard(1)}, {"hidden_states": Replicate()}
        for layer in model.model.layers:
            before = PrepareModuleInput(
                input_kwarg_layouts=whole[0], desired_input_kwarg_layouts=whole[1], use_local_output=True
            )
            after = PrepareModuleOutput(
                output_layouts=(Replicate(), None), desired_output_layouts=(Shard(1), None), use_local_output=True
            )
            parallelize_module(layer, mesh, {"self_attn": before})
            parallelize_module(layer, mesh, {"self_attn": after})
    parallelize_module(model, mesh, plan)
    if fsdp:
        from torch.distributed.fsdp import fully_shard

        for unit in (*model.model.layers, model.lm_head, model):
            fully_shard(unit, mesh=meshes["dp"])
    return model


def one_batch(vocab=VOCAB) -> dict:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, vocab, (3, 12), generator=generator)
    labels = ids.clone()
    labels[0, :5] = labels[2, 9:] = -100
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(12).expand(3, -1)}
    return {name: x.to(rank_device()) for name, x in batch.items()}


def step(model, counted=True) -> tuple:
    """(outputs, whole gradients, placements of the gradients, collectives by name) of a forward and backward."""
    from torch.distributed.tensor.debug import CommDebugMode

    model.zero_grad()
    with CommDebugMode() if counted else contextlib.nullcontext() as counter:
        outputs = model(**one_batch(model.config.vocab_size), use_cache=False)
        outputs.loss.backward()
    counts: dict = {}
    for kind, count in (
        counter.get_comm_counts().items() if counter else ()
    ):  # functional and in-place collectives have names of their own
        name = next(n for n in ("reduce_scatter", "gather", "reduce", str(kind)) if n in str(kind))
        counts[name] = counts.get(name, 0) + count
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    whole = {n: (g.full_tensor() if hasattr(g, "full_tensor") else g).detach().clone() for n, g in grads.items()}
    return outputs, whole, {n: getattr(g, "placements", None) for n, g in grads.items()}, counts


def compare(how: str, options: dict, flags: dict, counts: bool = True) -> dict:
    """What the patched model has of the plain one, split the same way, and of one that is not split."""
    from liger_kernel.transformers import apply_liger_kernel, revert_liger_kernel

    model = {"transformers": by_transformers, "torch": by_torch}[how](**options)
    plain, grads, places, plain_counts = step(model, counts)
    before = dict(model.lm_head.__dict__)
    for _ in range(2):  # a second call changes nothing
        report = apply_liger_kernel(model, **flags)
    outputs, our_grads, our_places, our_counts = step(model, counts)
    of_model = {k: v for k, v in options.items() if k in ("tied", "vocab", "model_type")}
    truth, true_grads, *_ = step(whole_model(**of_model))
    real = outputs.logits.materialize(quiet=True) if hasattr(outputs.logits, "materialize") else outputs.logits
    revert_liger_kernel(model)
    return {
        "reverted": model.lm_head.__dict__ == before,
        "lazy": type(outputs.logits).__name__ == "LazyLogits",
        "left": [f"{row.module}: {row.reason}" for row in report.left],
        "loss": abs(outputs.loss.item() - plain.loss.item()) / truth.loss.item(),
        "of one process": abs(outputs.loss.item() - truth.loss.item()) / truth.loss.item(),
        "logits": largest({"": real}, {"": plain.logits}),
        "gradients": largest(our_grads, grads),
        "gradients of one process": largest(our_grads, true_grads),
        "placed alike": our_places == places,
        "counts": (plain_counts, our_counts),
    }


def compare_in_triton(how: str, options: dict) -> dict:
    """The same with every op in its Triton kernels."""
    from liger_kernel.ops import core

    core.set_impl("triton")
    try:
        return compare(how, options, {})
    finally:
        core.set_impl(None)


def largest(found: dict, wanted: dict) -> float:
    """The largest error of a tensor, by norm."""
    assert found.keys() == wanted.keys()
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm().clamp(min=1e-6)) for n in wanted)


# The op itself


def op_errors(sizes, placement, options) -> dict:
    """{output or gradient: error} of the fused loss of DTensors against fp64 of whole tensors; ValueError's text."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from liger_kernel.ops.fused_linear_cross_entropy import liger_fused_linear_cross_entropy, reference

    rows, width, n_classes = sizes
    generator = torch.Generator().manual_seed(5)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((rows, width), (n_classes, width), (n_classes,))
    )
    target = torch.randint(0, n_classes, (rows,), generator=generator)
    target[1] = -100
    options = dict(options)
    if options.pop("weighted", False):
        options["ce_weight"] = torch.rand(n_classes, generator=generator)
        options["token_weight"] = torch.rand(rows, generator=generator)
    true = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if "normalizer" in wide:
        wide["reduction"] = "sum"
    divisor = wide.pop("normalizer", 1.0)
    wanted = reference(*true, target, **{k: v for k, v in wide.items() if k != "return_entropy"})
    outputs = wanted if isinstance(wanted, tuple) else (wanted,)
    outputs = outputs[0] / divisor, *outputs[1:]
    factor = torch.rand(outputs[0].shape, generator=generator)
    (outputs[0] * factor).sum().backward()

    place = rank_device()
    mesh = init_device_mesh(place.type, (dist.get_world_size(),))
    split = {"rows": (Shard(0), Shard(0)), "whole": (Replicate(),) * 2, "columns": (Shard(1), Replicate())}[placement]
    placements = Replicate(), *split
    given = [
        distribute_tensor(x.to(place), mesh, [p]).requires_grad_()
        for x, p in zip((hidden, weight, bias), placements, strict=True)
    ]
    options = {k: v.to(place) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    try:
        found = liger_fused_linear_cross_entropy(given[0], given[1], target.to(place), given[2], **options)
    except ValueError as refused:
        return {"refused": str(refused)}
    loss = found if isinstance(found, torch.Tensor) else found.loss
    (loss * factor.to(place)).sum().backward()
    errors = {"placed": float(any(x.grad.placements != x.placements for x in given))}
    pairs = {"loss": (loss, outputs[0])}
    if not isinstance(found, torch.Tensor):
        log_p = torch.nn.functional.linear(*true).log_softmax(-1)
        live = target != -100
        pairs["entropy"] = found.entropy, (-(log_p.exp() * log_p).sum(-1)).where(live, 0.0)
        pairs["predicted"] = found.predicted_tokens, log_p.argmax(-1).where(live, -1)
        pairs["accuracy"] = found.token_accuracy, (log_p.argmax(-1) == target)[live].double().mean()
        pairs["z_loss"] = found.z_loss, outputs[1]
    pairs |= {f"d{i}": (x.grad.full_tensor(), t.grad) for i, (x, t) in enumerate(zip(given, true, strict=True))}
    for name, (ours, truth) in pairs.items():
        truth = truth.detach().double()
        errors[name] = float((ours.detach().cpu().double() - truth).abs().max() / truth.abs().max().clamp(min=1.0))
    return errors


class _Watch(TorchDispatchMode):
    """The most elements of one tensor that any operation has made, the elements that each collective brought, and the
    flops of the matrix products (torch's own counter leaves out those in place)."""

    def __init__(self):
        super().__init__()
        self.most, self.brought, self.flops = 0, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, torch.Tensor):
                self.most = max(self.most, one.numel())
        if func.namespace == "c10d":
            self.brought.append(args[0].numel())
        if func.overloadpacket.__name__.rstrip("_") in ("mm", "addmm"):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.flops += 2 * a.shape[0] * b.numel()
        return made


def split_loss(rows: int, width: int, n_classes: int, place=None, live: int | None = None, dtype=torch.float32):
    """The fused loss of a weight split by rows, of which `live` rows count, as a function of its options."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from liger_kernel.ops.fused_linear_cross_entropy import liger_fused_linear_cross_entropy

    device = rank_device()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    shapes = (((rows, width), Replicate()), ((n_classes, width), place or Shard(0)))
    hidden, weight = (
        distribute_tensor(torch.randn(*shape, device=device, dtype=dtype), mesh, [p]).requires_grad_()
        for shape, p in shapes
    )
    target = torch.randint(0, n_classes, (rows,), device=device)
    target[slice(live, None) if live is not None else slice(0)] = -100
    return functools.partial(liger_fused_linear_cross_entropy, hidden, weight, target)


def watched(sizes, options, live=None, fp16=False, gradients=True) -> dict:
    """What a step of the fused loss of a split weight brings from other ranks and computes."""
    from liger_kernel.ops import live_rows

    loss = split_loss(*sizes, live=live, dtype=torch.float16 if fp16 else torch.float32)

    def step():
        with torch.set_grad_enabled(gradients):
            value = loss(**options)
            if gradients:
                getattr(value, "loss", value).sum().backward()

    before, live_rows.WORTH_WAITING = live_rows.WORTH_WAITING, 0  # so small a head asks a GPU how many rows count, too
    try:
        step()  # what is only asked once
        with _Watch() as seen:
            step()
    finally:
        live_rows.WORTH_WAITING = before
    return {"most": seen.most, "brought": seen.brought, "flops": seen.flops}


def peaks(sizes, workspace_bytes) -> dict:
    """Bytes at the highest point of a step above its inputs, the weight split and whole on this rank."""
    from torch.distributed.tensor import Replicate, Shard

    from liger_kernel.cli.memory import Meter

    found = {}
    for name, place in (("warm", Shard(0)), ("split", Shard(0)), ("whole", Replicate())):
        loss = split_loss(*sizes, place=place)
        dist.barrier()
        meter = Meter(rank_device())
        loss(workspace_bytes=workspace_bytes).backward()
        found[name] = meter.peak()
    return found


def errors_in_bf16(sizes, workspace_bytes) -> dict:
    """{gradient: (of the split weight, of a whole one)}, distances from fp64 by norm, of bf16 hidden and weight."""
    from torch.distributed.tensor import Replicate, Shard

    from liger_kernel.ops.fused_linear_cross_entropy import reference

    found: dict = {"hidden": [], "weight": []}
    for place in (Shard(0), Replicate()):
        torch.manual_seed(7)
        loss = split_loss(*sizes, place=place, dtype=torch.bfloat16)
        given = hidden, weight, target = loss.args
        loss(workspace_bytes=workspace_bytes).backward()
        true = [x.full_tensor().detach().double().requires_grad_() for x in given[:2]]
        reference(*true, None, target)[0].backward()
        for name, x, truth in zip(found, given[:2], true):
            found[name].append(float((x.grad.full_tensor().double() - truth.grad).norm() / truth.grad.norm()))
    return found


def second_backward(sizes) -> str:
    """The error of a second backward through one loss."""
    value = split_loss(*sizes)()
    value.backward(retain_graph=True)
    try:
        value.backward()
    except RuntimeError as refused:
        return str(refused)
    return ""


def other_uses() -> dict:
    """A split head's lazy logits where its loss cannot be fused, and the results that go with its loss."""
    from liger_kernel.transformers import apply_liger_kernel

    torch.manual_seed(0)
    model, batch = by_torch(), one_batch()
    plain = model(**batch)
    apply_liger_kernel(model)
    lazy = model(**batch).logits
    flat, labels = plain.logits[:, :-1].reshape(-1, VOCAB), batch["labels"][:, 1:].reshape(-1)
    entropy = torch.nn.functional.cross_entropy
    smooth = [entropy(x.reshape(-1, VOCAB), labels, label_smoothing=0.1) for x in (lazy[:, :-1], plain.logits[:, :-1])]
    part = [entropy(x.reshape(-1, VOCAB)[:, :40], labels.clamp(max=39)) for x in (lazy[:, :-1], plain.logits[:, :-1])]
    more = model(**batch, return_token_accuracy=True, return_entropy=True)
    live = labels != -100
    hits = (flat.argmax(-1) == labels)[live].float().mean()
    log_p = flat.log_softmax(-1)
    spread = -(log_p.exp() * log_p).sum(-1)[live].sum()
    model.eval()
    with torch.no_grad():
        real = model(input_ids=batch["input_ids"]).logits
    return {
        "smooth": abs(smooth[0] - smooth[1]).item(),
        "part": abs(part[0] - part[1]).item(),
        "accuracy": abs(more.token_accuracy - hits).item(),
        "entropy": (abs(more.entropy.sum() - spread) / spread).item(),
        "evaluation": largest({"": real}, {"": plain.logits.detach()}),
    }
