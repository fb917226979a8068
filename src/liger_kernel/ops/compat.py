"""Upstream's helper functions under their own signatures, on top of the pairs: what other projects import from a room.

The values upstream returns for its launch (BLOCK_SIZE, num_warps) are None here; backward accepts and ignores them.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.core import kernels

# attn_res


def attn_res_forward(blocks, w_query, w_norm, eps=1e-6):
    """-> (Out, V_3d, Alpha, RSTD): h as (..., D), V as (N, R, D), the weights and 1 / rms as (N, R) in fp32.

    blocks: V (N, ..., D), or a list of N tensors (..., D).
    """
    from liger_kernel.ops import attn_res as room

    v = blocks if isinstance(blocks, torch.Tensor) else torch.stack(tuple(blocks))
    room.check(v, w_query, w_norm)
    shape, v = v.shape[1:], room.as_blocks(v)
    out, alpha, rstd = kernels("attn_res", v).forward(v, w_query.contiguous(), w_norm.contiguous(), eps)
    return out.view(shape), v, alpha, rstd


def attn_res_backward(dh, V_3d, w_query, w_norm, Alpha, RSTD, eps=1e-6):
    """-> (dV like V_3d, dW_query, dW_norm). eps has no effect: RSTD holds it."""
    from liger_kernel.ops import attn_res as room

    return room.gradients(dh, V_3d.contiguous(), w_query.contiguous(), w_norm.contiguous(), Alpha, RSTD)


# rms_norm


def rms_norm_forward(X, W, eps, offset, casting_mode, row_mode=None):
    """-> (Y, X, RSTD, BLOCK_SIZE, num_warps, casting_mode as an int)."""
    from liger_kernel.ops.rms_norm import CASTING, check

    casting_mode = check(X, W, casting_mode)
    X = X.contiguous()
    y, rstd = kernels("rms_norm", X).forward(X, W, eps, offset, casting_mode, X.dtype)
    return y, X, rstd, None, None, CASTING[casting_mode]


def rms_norm_backward(
    dY, X, W, RSTD, offset, casting_mode, BLOCK_SIZE, num_warps, in_place, row_mode=None, needs_dw=None
):
    """-> (dX, dW); dW is None without a weight or with needs_dw=False."""
    from liger_kernel.ops.rms_norm import check

    casting_mode = check(X, W, casting_mode)
    wanted = W is not None if needs_dw is None else needs_dw
    return kernels("rms_norm", X).backward(dY.contiguous(), X, W, RSTD, offset, casting_mode, in_place, wanted)


# swiglu


def swiglu_forward(a, b, gate_multiplier=1.0):
    """-> (a, b, c), a and b contiguous."""
    from liger_kernel.ops.swiglu import check

    check(a, b)
    a, b = a.contiguous(), b.contiguous()
    return a, b, kernels("swiglu", a).forward(a, b, gate_multiplier, 1.0)


def swiglu_backward(a, b, dc, gate_multiplier=1.0):
    """-> (da, db)."""
    return kernels("swiglu", a).backward(dc.contiguous(), a.contiguous(), b.contiguous(), gate_multiplier, 1.0)


def swiglu_fused_gate_up_forward(y):
    """-> (y, c), y contiguous."""
    from liger_kernel.ops.swiglu import check_packed

    check_packed(y)
    y = y.contiguous()
    return y, kernels("swiglu", y).forward(y, None, 1.0, 1.0)


def swiglu_fused_gate_up_backward(y, dc, in_place=False):
    """-> dy, perhaps written over y where in_place permits it."""
    return kernels("swiglu", y).backward(dc.contiguous(), y.contiguous(), None, 1.0, 1.0, in_place)[0]


# geglu


def geglu_forward(a, b):
    """-> (a, b, c), a and b contiguous; the tanh form."""
    from liger_kernel.ops.geglu import check

    check(a, b, "tanh")
    a, b = a.contiguous(), b.contiguous()
    return a, b, kernels("geglu", a).forward(a, b, "tanh")


def geglu_backward(a, b, dc):
    """-> (da, db)."""
    return kernels("geglu", a).backward(dc.contiguous(), a.contiguous(), b.contiguous(), "tanh")


# relu_squared


def relu_squared_forward(X):
    """-> Y."""
    X = X.contiguous()
    return kernels("relu_squared", X).forward(X)


def relu_squared_backward(X, dY):
    """-> dX."""
    return kernels("relu_squared", X).backward(dY.contiguous(), X.contiguous())


# rope


def rope_forward(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    """-> (q, k, cos, sin), q and k rotated."""
    from liger_kernel.ops.rope import prepare

    q, k, cos, sin, options = prepare(q, k, cos, sin, position_ids, unsqueeze_dim, rotary_dim)
    return *kernels("rope", q).forward(q, k, cos, sin, *options), cos, sin


def rope_backward(dq, dk, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    """-> (dq, dk), in the dtypes of the gradients given."""
    from liger_kernel.ops.rope import prepare

    dq, dk, cos, sin, options = prepare(dq, dk, cos, sin, position_ids, unsqueeze_dim, rotary_dim)
    return kernels("rope", dq).backward(dq, dk, cos, sin, *options[:4], dq.dtype, dk.dtype)


# fused_add_rms_norm


def fused_add_rms_norm_forward(X, R, W, eps, offset, casting_mode):
    """-> (Y, S, RSTD, BLOCK_SIZE, num_warps, num_stages, casting_mode as an int)."""
    from liger_kernel.ops.fused_add_rms_norm import check
    from liger_kernel.ops.rms_norm import CASTING

    casting_mode = check(X, R, W, casting_mode)
    X, R = X.contiguous(), R.to(X.dtype).contiguous()
    y, s, rstd = kernels("fused_add_rms_norm", X).forward(X, R, W, eps, offset, casting_mode)
    return y, s, rstd, None, None, None, CASTING[casting_mode]


def fused_add_rms_norm_backward(
    dY, dS_out, S, W, RSTD, offset, casting_mode, BLOCK_SIZE, num_warps, num_stages, in_place, needs_dw=None
):
    """-> (dX, dX, dW); dX is the gradient of the residual too. dS_out may be None; dW is None without a weight."""
    from liger_kernel.ops.fused_add_rms_norm import check

    casting_mode = check(S, S, W, casting_mode)
    wanted = W is not None if needs_dw is None else needs_dw
    dS_out = None if dS_out is None else dS_out.contiguous()
    pair = kernels("fused_add_rms_norm", S)
    dX, dW = pair.backward(dY.contiguous(), dS_out, S, W, RSTD, offset, casting_mode, in_place, wanted)
    return dX, dX, dW


# modulated_rms_norm


def modulated_rms_norm_forward(X, W, scale, shift, eps, offset, casting_mode):
    """-> (Y, RSTD, BLOCK_SIZE, num_warps, casting_mode as an int, rows that share a scale)."""
    from liger_kernel.ops import modulated_rms_norm as room
    from liger_kernel.ops.rms_norm import CASTING

    casting_mode, run = room.check(X, W, scale, shift, casting_mode)
    X, scale, shift = X.contiguous(), room.as_table(scale), None if shift is None else room.as_table(shift)
    y, rstd = kernels("modulated_rms_norm", X).forward(X, W, scale, shift, run, eps, offset, casting_mode)
    return y, rstd, None, None, CASTING[casting_mode], run


def modulated_rms_norm_backward(
    dY, X, W, scale, shift, RSTD, offset, casting_mode, BLOCK_SIZE, num_warps, rows_per_modulation, in_place
):
    """-> (dX, dW, dScale, dShift); dW and dShift are None without a weight or a shift."""
    from liger_kernel.ops import modulated_rms_norm as room

    casting_mode, run = room.check(X, W, scale, shift, casting_mode)
    tables = [None if p is None else room.as_table(p) for p in (scale, shift)]
    dX, dW, *grads = kernels("modulated_rms_norm", X).backward(
        dY.contiguous(), X.contiguous(), W, *tables, RSTD, run, offset, casting_mode, in_place, (True, True, True)
    )
    return dX, dW, *(None if d is None else d.view(p.shape) for d, p in zip(grads, (scale, shift)))


# layer_norm


def layer_norm_forward(X, W, B, eps):
    """-> (Y, X, Mean, RSTD, BLOCK_SIZE, num_warps)."""
    from liger_kernel.ops.layer_norm import check

    check(X, W, B)
    X = X.contiguous()
    y, mean, rstd = kernels("layer_norm", X).forward(X, W, B, eps)
    return y, X, mean, rstd, None, None


def layer_norm_backward(dY, X, W, B, Mean, RSTD, needs_dw=None, needs_db=None):
    """-> (DX, DW, DB); DW and DB are None without a weight or a bias, or where they are not needed."""
    wanted = W is not None if needs_dw is None else needs_dw
    wanted_b = B is not None if needs_db is None else needs_db
    return kernels("layer_norm", X).backward(dY.contiguous(), X, W, B, Mean, RSTD, wanted, wanted_b)


# group_norm


def group_norm_forward(X, num_channels, num_groups, W, B, eps):
    """-> (Y, X, Mean, RSTD, BLOCK_SIZE)."""
    from liger_kernel.ops.group_norm import check

    check(X, W, B, num_channels, num_groups)
    X = X.contiguous()
    y, mean, rstd = kernels("group_norm", X).forward(X, W, B, num_groups, eps)
    return y, X, mean, rstd, None


def group_norm_backward(dY, X, W, B, Mean, RSTD, num_channels, num_groups):
    """-> (DX, DW, DB)."""
    from liger_kernel.ops.group_norm import check

    check(X, W, B, num_channels, num_groups)
    return kernels("group_norm", X).backward(dY.contiguous(), X, W, Mean, RSTD, num_groups, True, True)


# poly_norm


def poly_norm_forward(X, W, B, eps=1e-6):
    """-> (Y, X, RSTD, BLOCK_SIZE, num_warps), RSTD of the third power first."""
    from liger_kernel.ops.poly_norm import check

    check(X, W, B)
    X = X.contiguous()
    y, rstd = kernels("poly_norm", X).forward(X, W.contiguous(), B, eps)
    return y, X, rstd, None, None


def poly_norm_backward(dY, X, W, RSTD, BLOCK_SIZE, num_warps, in_place):
    """-> (dX, dW, dB), dB of one element."""
    from liger_kernel.ops.poly_norm import gradients

    return gradients(dY, X.contiguous(), W.contiguous(), W.new_empty(1), RSTD, in_place, True)


# jsd


def jsd_forward(_input, target, shift_labels, beta, ignore_index, has_label, jsd_impl=None, jsd_mode=None):
    """-> (loss, dX), dX of the loss as it is. has_label=False: every row counts. jsd_mode has no effect."""
    from liger_kernel.ops import jsd as room

    labels = shift_labels if has_label else None
    room.check(_input, target, labels, beta, ignore_index)
    x, target = _input.contiguous(), target.contiguous()
    with torch.no_grad():
        live, scale = room.weigh(x, labels, ignore_index)
        loss, dx = kernels("jsd", x, jsd_impl).forward(x, target, live, scale, beta, True)
    return loss.sum().to(x.dtype), dx


def jsd_backward(dX, grad_output):
    """dX times the 0-d grad_output, in place."""
    return kernels("jsd", dX).backward(dX, grad_output)


# fused_linear_jsd


def fused_linear_jsd_forward(
    student_input, student_weight, teacher_input, teacher_weight, shift_labels, jsd_beta, ignore_index, has_label,
    temperature, jsd_impl=None, jsd_mode=None, accum_dtype=None,
):  # fmt: skip
    """-> (loss, grad_input, grad_weight); a gradient is None where its tensor takes none. jsd_mode has no effect."""
    from liger_kernel.ops import fused_linear_jsd as room

    labels = shift_labels if has_label else None
    room.check(student_input, student_weight, teacher_input, teacher_weight, labels, jsd_beta, ignore_index)
    return room.solve(
        student_input, student_weight, teacher_input, teacher_weight, labels, jsd_beta, ignore_index, temperature,
        (student_input.requires_grad, student_weight.requires_grad), jsd_impl, accum_dtype=accum_dtype,
    )  # fmt: skip


def fused_linear_jsd_backward(grad_output, grad_input, grad_weight):
    """The gradients times the 0-d grad_output, in place; None stays None."""
    grads = grad_input, grad_weight
    present = ([g for g in grads if g is not None] or [None])[0]
    return grads if present is None else kernels("fused_linear_jsd", present).backward(grads, grad_output)


# fused_linear_kl_div


def fused_linear_kl_div_forward(
    student_input, student_weight, target, shift_labels, reduction, ignore_index, has_label, temperature, eps,
    accum_dtype=None,
):  # fmt: skip
    """-> (loss, grad_input, grad_weight); a gradient is None where its tensor takes none."""
    from liger_kernel.ops import fused_linear_kl_div as room

    labels = shift_labels if has_label else None
    room.check(student_input, student_weight, target, labels, reduction, temperature, eps)
    needs = student_input.requires_grad, student_weight.requires_grad
    return room.solve(
        student_input, student_weight, target, labels, reduction, ignore_index, temperature, eps, accum_dtype,
        needs=needs,
    )  # fmt: skip


def fused_linear_kl_div_backward(grad_output, grad_input, grad_weight):
    """The gradients times the 0-d grad_output, in place; None stays None."""
    return fused_linear_jsd_backward(grad_output, grad_input, grad_weight)


# kl_div


def kldiv_forward_triton(y_pred, y_true, log_target, reduction, eps):
    """-> the loss: 0-d, or like y_pred with reduction="none"."""
    from liger_kernel.ops import kl_div as room

    with torch.no_grad():
        return room.LigerKLDivLossFunction.apply(y_pred, y_true, reduction, log_target, eps)


def kldiv_backward_triton(target, grad_output, new_grads, log_target):
    """-> new_grads, filled with the gradient by y_pred of the sum, grad_output being 0-d or like the target."""
    target = target.contiguous()
    pair = kernels("kl_div", target)
    dx, _ = pair.backward(grad_output.contiguous(), None, target, log_target, 0.0, 1, new_grads.dtype)
    return new_grads.copy_(dx)


# tvd


def tv_distance_forward_triton(p, q, shift_labels, reduction, ignore_index, has_label):
    """-> (loss, its gradient by p; with reduction="none" that of the sum). has_label=False: every row counts."""
    from liger_kernel.ops import tvd as room

    p = p.detach().requires_grad_()
    with torch.enable_grad():
        loss = room.LigerTVDLossFunction.apply(p, q, shift_labels if has_label else None, reduction, ignore_index)
        (dp,) = torch.autograd.grad(loss.sum(), p)
    return loss.detach(), dp


def tvd_backward_triton(grad_output, grads):
    """grads times grad_output (0-d, or like grads), in place."""
    return grads.mul_(grad_output)


# cross_entropy


def cross_entropy_forward(
    _input, target, weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss,
    return_token_accuracy=False, return_predicted_tokens=False,
):  # fmt: skip
    """-> (loss, z_loss, token_accuracy, predicted_tokens, the gradient or, where none is asked, _input).

    Unlike upstream's, the gradient does not overwrite _input; reduction="none" gives that of the sum.
    """
    from liger_kernel.ops import cross_entropy as room

    loss = room.RowLoss(ignore_index, label_smoothing, lse_square_scale, softcap)
    room.check(_input, target, weight, reduction, loss)
    x = room.rows_of(_input)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if _input.requires_grad else None
    asked = return_z_loss, return_token_accuracy, return_predicted_tokens
    with torch.no_grad():
        stats = room.compute(x, room.prepare(target, loss, x, weight, reduction), loss, room.wanted(*asked), dx)
    return *room.finish(stats, target, ignore_index, reduction, x.dtype, *asked), _input if dx is None else dx


def cross_entropy_backward(_input, grad_output):
    """The gradient of cross_entropy_forward times grad_output (0-d, or one per row), in place."""
    if grad_output.dim():
        return _input.mul_(grad_output[:, None])
    return kernels("cross_entropy", _input).backward(_input, grad_output)
