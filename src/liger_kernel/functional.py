"""The ops as functions, each with a choice of what runs it.

impl, or its synonym backend, names an implementation ("torch", "triton", a backend); None is the default of the device.
layer_norm, jsd and fused_linear_jsd run any that the device has. The others run the one that the process uses, see
`liger_kernel.set_impl`, and raise a ValueError for another. mode knows "auto" only. Nothing here writes to its inputs.
"""

from __future__ import annotations

import torch

from liger_kernel.ops import core
from liger_kernel.transformers import functional as _functional

__all__ = [
    "cross_entropy", "fused_add_rms_norm", "fused_linear_cross_entropy", "fused_linear_jsd", "geglu", "jsd", "kl_div",
    "layer_norm", "rms_norm", "rope", "softmax", "swiglu",
]  # fmt: skip


def _chosen(impl: str | None, mode: str | None, backend: str | None) -> str | None:
    """The implementation asked for, None for the default."""
    if mode not in (None, "auto", "default"):
        raise ValueError(f"mode must be None or 'auto', got {mode!r}")
    if None not in (impl, backend) and impl != backend:
        raise ValueError(f"impl={impl!r} and backend={backend!r} name two implementations for one call")
    return core.known_impl(impl if impl is not None else backend, "impl")


def _expect(op: str, x: torch.Tensor, *asked: str | None) -> None:
    """ValueError where another implementation is asked for than runs."""
    impl = _chosen(*asked)
    if impl is not None and impl != (runs := core.resolve(op, x.device.type).source):
        raise ValueError(
            f"{op} runs on {runs!r} here: set_impl({impl!r}) chooses for the process, not impl= for a call"
        )


def rms_norm(
    x, weight, eps=1e-6, *, offset=0.0, casting_mode="llama", in_place=False, row_mode=None, impl=None, mode=None,
    backend=None,
):  # fmt: skip
    """`liger_rms_norm`. in_place=True permits the backward to write over the incoming gradient."""
    _expect("rms_norm", x, impl, mode, backend)
    return _functional.liger_rms_norm(x, weight, eps, offset, casting_mode, in_place)


def layer_norm(x, weight, bias=None, eps=1e-6, *, impl=None, mode=None, backend=None):
    """`liger_layer_norm`."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, eps, _chosen(impl, mode, backend))


def fused_add_rms_norm(
    X, R, W, eps=1e-6, offset=0.0, casting_mode="llama", in_place=False, *, impl=None, mode=None, backend=None
):
    """`liger_fused_add_rms_norm`."""
    _expect("fused_add_rms_norm", X, impl, mode, backend)
    return _functional.liger_fused_add_rms_norm(X, R, W, eps, offset, casting_mode, in_place)


def softmax(x, *, impl=None, mode=None, backend=None):
    """`liger_softmax`."""
    _expect("softmax", x, impl, mode, backend)
    return _functional.liger_softmax(x)


def swiglu(a, b, gate_multiplier=1.0, down_multiplier=1.0, *, impl=None, mode=None, backend=None):
    """silu(gate_multiplier * a) * b * down_multiplier, as `liger_swiglu`."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    _expect("swiglu", a, impl, mode, backend)
    return LigerSiLUMulFunction.apply(a, b, gate_multiplier, down_multiplier)


def geglu(a, b, *, impl=None, mode=None, backend=None):
    """`liger_geglu`."""
    _expect("geglu", a, impl, mode, backend)
    return _functional.liger_geglu(a, b)


def rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, *, impl=None, mode=None, backend=None):
    """`liger_rope`."""
    _expect("rope", q, impl, mode, backend)
    return _functional.liger_rope(q, k, cos, sin, position_ids, unsqueeze_dim)


def kl_div(
    y_pred, y_true, reduction="batchmean", log_target=False, eps=1e-10, *, impl=None, mode=None, backend=None
):  # fmt: skip
    """`liger_kl_div`."""
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    _expect("kl_div", y_pred, impl, mode, backend)
    return LigerKLDivLossFunction.apply(y_pred, y_true, reduction, log_target, eps)


def jsd(_input, target, shift_labels=None, beta=0.5, ignore_index=-100, *, impl=None, mode=None, backend=None):
    """`liger_jsd`."""
    from liger_kernel.ops.jsd import LigerJSDFunction

    return LigerJSDFunction.apply(_input, target, shift_labels, beta, ignore_index, _chosen(impl, mode, backend))


def fused_linear_jsd(
    student_input, student_weight, teacher_input, teacher_weight, shift_labels=None, jsd_beta=0.5, ignore_index=-100,
    temperature=1.0, *, impl=None, mode=None, backend=None,
):  # fmt: skip
    """`liger_fused_linear_jsd`."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    options = shift_labels, jsd_beta, ignore_index, temperature, None, _chosen(impl, mode, backend)
    return LigerFusedLinearJSDFunction.apply(student_input, student_weight, teacher_input, teacher_weight, *options)


def cross_entropy(
    input, target, weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="mean",
    softcap=None, return_z_loss=False, return_token_accuracy=False, return_predicted_tokens=False, *, impl=None,
    mode=None, backend=None,
):  # fmt: skip
    """`liger_cross_entropy`, without torch's two deprecated arguments."""
    _expect("cross_entropy", input, impl, mode, backend)
    return _functional.liger_cross_entropy(
        input, target, weight, ignore_index=ignore_index, lse_square_scale=lse_square_scale,
        label_smoothing=label_smoothing, reduction=reduction, softcap=softcap, return_z_loss=return_z_loss,
        return_token_accuracy=return_token_accuracy, return_predicted_tokens=return_predicted_tokens,
    )  # fmt: skip


def fused_linear_cross_entropy(
    _input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
    reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None, use_token_scaling=False,
    return_token_accuracy=False, return_predicted_tokens=False, *, impl=None, mode=None, backend=None,
):  # fmt: skip
    """`liger_fused_linear_cross_entropy`."""
    _expect("cross_entropy", _input, impl, mode, backend)
    return _functional.liger_fused_linear_cross_entropy(
        _input, weight, target, bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap,
        return_z_loss, accum_dtype, use_token_scaling, return_token_accuracy, return_predicted_tokens,
    )  # fmt: skip
