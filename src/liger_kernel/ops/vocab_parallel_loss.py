"""The fused head's loss where hidden states, weight and bias are DTensors on one mesh, as tensor parallelism has them.

    loss = sum over tokens f w_y nll + f' scale lse^2        f, f': 1 / N and 1 / T times the token's own factors

Placements  a weight that is Shard(0) stays split: liger_kernel.ops.vocab_parallel_head. Any other one is brought
            together for the loss, and its gradient is placed as it is.
Gradients   of a DTensor are DTensors; the loss is a plain tensor, the same on all ranks.
"""

from __future__ import annotations

import torch

from liger_kernel.ops import head
from liger_kernel.ops.core import wide
from liger_kernel.ops.fused_linear_cross_entropy import HeadOptions, check_options
from liger_kernel.ops.row_loss import (
    RECOMPUTES,
    RowLoss,
    Stats,
    check_class_weight,
    factors,
    finish,
    is_early,
    prepare,
    taken,
)
from liger_kernel.ops.sharded import is_dtensor
from liger_kernel.ops.vocab_parallel_head import NAME, LigerVocabParallelLogprobsFunction, run


def cross_entropy_of_dtensors(function, input, weight, target, bias, **options):
    """What function, liger_fused_linear_cross_entropy, computes of whole tensors: -> (loss, z_loss, token_accuracy,
    predicted_tokens, entropy).

    input (..., H) is a DTensor; weight (V, H) and bias (V,) are DTensors of its mesh or the same on all ranks.
    Raises ValueError for a mesh of several dimensions, for DTensors of different meshes, and, where the vocabulary is
    split, for label_smoothing, low_rank and vocab_slice.
    """
    mesh = input.device_mesh
    for name, tensor in (("weight", weight), ("bias", bias), ("target", target)):
        if is_dtensor(tensor) and tensor.device_mesh != mesh:
            raise ValueError(f"{NAME}: input is on {mesh} and {name} on {tensor.device_mesh}")
    if mesh.ndim != 1:
        raise ValueError(f"{NAME}: input must be a DTensor of a mesh of one dimension, got {mesh}")
    target = _whole(target)
    split = is_dtensor(weight) and weight.placements[0].is_shard(0)
    if not split:
        if (low := options.get("low_rank")) is not None:
            options["low_rank"] = tuple(map(_whole, low))
        result = function(_whole(input), _whole(weight), target, _whole(bias), **options)
        if isinstance(result, torch.Tensor):
            return result, None, None, None, None
        return result.loss, result.z_loss, result.token_accuracy, result.predicted_tokens, result.entropy
    for name, off in (("label_smoothing", 0.0), ("low_rank", None), ("vocab_slice", None)):
        if options.pop(name) != off:
            raise ValueError(f"{NAME}: {name} is not offered where the vocabulary is split among ranks")
    return _split_loss(
        _summed_later(input), weight.to_local(), target, _part_of(bias, mesh), weight.shape[0], mesh, **options
    )


def _whole(x):
    """The whole of a DTensor on every rank, whose gradient every rank has whole; other tensors as they are."""
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Replicate

    every = [Replicate()] * x.device_mesh.ndim
    return x.redistribute(placements=every).to_local(grad_placements=every)


def _summed_later(input):
    """The whole of hidden states, whose gradient is this rank's share of a sum.

    Whoever made them whole sums and splits it in one step; of a tensor that nobody made it is summed here.
    """
    from torch.distributed.tensor import Partial, Replicate

    if input.is_leaf or not input.placements[0].is_replicate():
        input = input.redistribute(placements=[Replicate()])
    return input.to_local(grad_placements=[Partial()])


def _part_of(bias, mesh):
    """This rank's part of a bias."""
    if bias is None:
        return None
    from torch.distributed.tensor import DTensor, Replicate, Shard

    bias = bias if is_dtensor(bias) else DTensor.from_local(bias, mesh, [Replicate()], run_check=False)
    return bias.redistribute(placements=[Shard(0)]).to_local()


class _Formed(torch.autograd.Function):
    """apply(loss, grads, *inputs) -> loss, whose gradients for the inputs are formed already."""

    @staticmethod
    def forward(ctx, loss, grads, *inputs):
        ctx.grads = grads
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, d_loss):
        return None, None, *head.scaled(taken(ctx, NAME, RECOMPUTES), d_loss)


def _split_loss(
    hidden, weight, target, bias, n_classes, mesh, *, ce_weight, ignore_index, lse_square_scale, reduction, softcap,
    return_z_loss, accum_dtype, use_token_scaling, return_token_accuracy, return_predicted_tokens, logit_scale,
    temperature, token_weight, normalizer, workspace_bytes, return_entropy,
):  # fmt: skip
    head.check(hidden, weight, bias, NAME)
    if target.shape != hidden.shape[:-1] or target.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{NAME}: target must be int64 or int32 of shape {tuple(hidden.shape[:-1])}, got {target.dtype} of shape "
            f"{tuple(target.shape)}"
        )
    check_class_weight(ce_weight, n_classes, hidden.device, NAME)
    options = HeadOptions(logit_scale, temperature, token_weight, normalizer, workspace_bytes)
    check_options(hidden, target, reduction, accum_dtype, options)
    shape, labels = target.shape, target.reshape(-1).contiguous()
    softmax = RowLoss(ignore_index, softcap=softcap, scale=logit_scale, temperature=temperature)
    loss = RowLoss(ignore_index, 0.0, lse_square_scale, token_scaling=use_token_scaling)
    factor = None if token_weight is None else token_weight.reshape(-1)
    given = prepare(labels, loss, hidden, ce_weight, reduction, factor, normalizer)
    label = labels.clamp(0, n_classes - 1)

    def factors_of(nll, rows=slice(None)):
        """Of nll and of lse^2 in the loss."""
        live = labels[rows] != ignore_index
        keep, _, f_ce, f_z = factors(given.take(rows), loss, nll.detach(), live, label[rows], n_classes)
        return f_ce * keep, f_z * lse_square_scale

    def derive(nll, lse, rows):
        f, f_z = factors_of(nll, rows)
        return f, 2.0 * f_z * lse if lse_square_scale else None

    flat, group = hidden.reshape(-1, hidden.shape[-1]), mesh.get_group()
    needs = tuple(x is not None and x.requires_grad and torch.is_grad_enabled() for x in (flat, weight, bias))
    asked, grads = (return_entropy, return_token_accuracy or return_predicted_tokens), None
    if any(needs) and is_early(reduction, head.product_dtype(flat)):
        largest = -(-n_classes // mesh.size())
        sizes = largest, *asked, workspace_bytes, accum_dtype
        found, grads = run(flat, weight, labels, bias, softmax, group, derive, needs, *sizes)
    else:
        sizes = asked[0], workspace_bytes, asked[1], accum_dtype, False
        found = LigerVocabParallelLogprobsFunction.apply(flat, weight, labels, bias, softmax, group, *sizes)
    nll, lse, entropy, predicted = found
    f, f_z = factors_of(nll)
    z_loss = f_z * lse.square()
    value = f * nll + z_loss if lse_square_scale else f * nll
    stats = Stats(value, z_loss=z_loss.detach(), predicted=predicted)
    total, z_loss, accuracy, predicted = finish(
        stats, labels, ignore_index, reduction, wide(hidden.dtype), return_z_loss, return_token_accuracy,
        return_predicted_tokens,
    )  # fmt: skip
    if grads is not None:
        total = _Formed.apply(total, grads, flat, weight, bias)
    if reduction == "none":
        total, z_loss = total.view(shape), None if z_loss is None else z_loss.view(shape)
    predicted = None if predicted is None else predicted.view(shape)
    return total, z_loss, accuracy, predicted, entropy.detach().view(shape) if return_entropy else None
