"""Rotary position embedding in Triton; the mathematics is in liger_kernel.ops.rope."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from liger_kernel.backends import device_of
from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import cdiv, in_units, int64, launch, power_of_2_from, programs_for, rounded
from liger_kernel.ops.rope import STYLES, row_stride

# Kernels: a program takes `ROWS` tokens with all heads of q and k, so cos and sin are read once.


@triton.jit
def _load_halves(at, here, R: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
                 PAIRS: tl.constexpr):  # fmt: skip
    """(x1, x2) of the R elements at each pointer of `at` (ROWS, HEADS, 1). PAIRS: they alternate in memory."""
    if PAIRS:
        cols = tl.arange(0, 2 * HALF)[None, None, :]
        x = tl.load(at + cols, mask=here & (cols < R), other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, (ROWS, HEADS, HALF, 2)))
    else:
        cols = tl.arange(0, HALF)[None, None, :]
        mask = here & (cols < R // 2)
        x1 = tl.load(at + cols, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(at + (R // 2 + cols), mask=mask, other=0.0).to(tl.float32)
    return x1, x2


@triton.jit
def _load_table(at, live, plane, W: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, FIRST: tl.constexpr,
                SECOND: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """(c1, c2) of each token. From column FIRST of a half on the second plane is read, from SECOND on the third."""
    if PAIRS and W == R:
        c1, c2 = _load_halves(at, live, R, ROWS, 1, HALF, PAIRS)
    else:
        cols = tl.arange(0, HALF)[None, None, :]
        mask = live & (cols < R // 2)
        at = at + cols * STEP
        if FIRST < R // 2:
            at = at + ((cols >= FIRST).to(tl.int64) + (cols >= SECOND).to(tl.int64)) * plane
        c1 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if W == R:
            c2 = tl.load(at + R // 2, mask=mask, other=0.0).to(tl.float32)
        else:
            c2 = c1
    return c1, c2


@triton.jit
def _store_halves(at, y1, y2, here, R: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
                  PAIRS: tl.constexpr):  # fmt: skip
    if PAIRS:
        cols = tl.arange(0, 2 * HALF)[None, None, :]
        tl.store(at + cols, tl.reshape(tl.join(y1, y2), (ROWS, HEADS, 2 * HALF)), mask=here & (cols < R))
    else:
        cols = tl.arange(0, HALF)[None, None, :]
        mask = here & (cols < R // 2)
        tl.store(at + cols, y1, mask=mask)
        tl.store(at + (R // 2 + cols), y2, mask=mask)


@triton.jit
def _rotate(
    X, Y, x_token, y_token, stride_x, stride_y, live, c1, s1, c2, s2,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, X_PAIRS: tl.constexpr, Y_PAIRS: tl.constexpr, WORK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """x_token, y_token: where each token's first head begins, (ROWS, 1, 1)."""
    for first in range(0, H, HEADS):
        head = first + tl.arange(0, HEADS)[None, :, None]
        here = live & (head < H)
        head = head.to(tl.int64)
        x_at = X + x_token + head * stride_x
        y_at = Y + y_token + head * stride_y
        x1, x2 = _load_halves(x_at, here, R, ROWS, HEADS, HALF, X_PAIRS)
        if BACKWARD:
            y1 = x1 * c1 + x2 * s2
            y2 = x2 * c2 - x1 * s1
        else:  # torch rounds each product and the sum
            y1 = rounded(rounded(x1 * c1, WORK) - rounded(x2 * s1, WORK), WORK)
            y2 = rounded(rounded(x2 * c2, WORK) + rounded(x1 * s2, WORK), WORK)
        y1 = y1.to(Y.dtype.element_ty)
        y2 = y2.to(Y.dtype.element_ty)
        _store_halves(y_at, y1, y2, here, R, ROWS, HEADS, HALF, Y_PAIRS)
        if R < D:
            for start in range(R, D, REST):
                rest = start + tl.arange(0, REST)[None, None, :]
                x = tl.load(x_at + rest, mask=here & (rest < D), other=0.0)
                tl.store(y_at + rest, x.to(Y.dtype.element_ty), mask=here & (rest < D))


_VARYING = [
    "T", "S", "n_tiles", "stride_qb", "stride_qs", "stride_qh", "stride_kb", "stride_ks", "stride_kh",
    "stride_yb", "stride_ys", "stride_yh", "stride_zb", "stride_zs", "stride_zh",
]  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def _rope_kernel(
    Q, K, Cos, Sin, Y, Z, T, S, n_tiles,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_yb, stride_ys, stride_yh, stride_zb, stride_zs, stride_zh,
    UNIT: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    STRIDE: tl.constexpr, STEP: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    BATCHED: tl.constexpr, BACKWARD: tl.constexpr, X_PAIRS: tl.constexpr, Y_PAIRS: tl.constexpr, C_PAIRS: tl.constexpr,
    Q_WORK: tl.constexpr, K_WORK: tl.constexpr,
    ROWS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        token = tile * ROWS + tl.arange(0, ROWS)[:, None, None]
        live = token < T
        batch = token // S
        at = (token - batch * S).to(tl.int64)
        batch = batch.to(tl.int64)
        if BATCHED:
            table = token.to(tl.int64) * STRIDE
            plane = int64(T) * STRIDE
        else:
            table = at * STRIDE
            plane = int64(S) * STRIDE
        c1, c2 = _load_table(Cos + table, live, plane, W, R, STEP, FIRST, SECOND, ROWS, HALF, C_PAIRS)
        s1, s2 = _load_table(Sin + table, live, plane, W, R, STEP, FIRST, SECOND, ROWS, HALF, C_PAIRS)
        _rotate(
            Q, Y, (batch * stride_qb + at * stride_qs) * UNIT, (batch * stride_yb + at * stride_ys) * UNIT,
            int64(stride_qh) * UNIT, int64(stride_yh) * UNIT, live, c1, s1, c2, s2,
            HQ, D, R, ROWS, Q_HEADS, HALF, REST, X_PAIRS, Y_PAIRS, Q_WORK, BACKWARD,
        )  # fmt: skip
        _rotate(
            K, Z, (batch * stride_kb + at * stride_ks) * UNIT, (batch * stride_zb + at * stride_zs) * UNIT,
            int64(stride_kh) * UNIT, int64(stride_zh) * UNIT, live, c1, s1, c2, s2,
            HK, D, R, ROWS, K_HEADS, HALF, REST, X_PAIRS, Y_PAIRS, K_WORK, BACKWARD,
        )  # fmt: skip


# Config


@dataclass(frozen=True)
class Tokens:
    """A program's tile: `tokens` tokens, `heads` heads at a time, `num_warps` warps."""

    tokens: int
    heads: int
    num_warps: int

    @classmethod
    def choose(cls, heads: int, half: int, device: torch.device, elements: int = 2048, pairs: bool = False) -> Tokens:
        """half: elements of a rotated half, a power of two. elements: what a tile of one half should hold."""
        backend = device_of(device)
        at_once = min(power_of_2_from(heads), max(1, elements // half))
        tokens = max(1, elements // 2 // (at_once * half))
        if pairs and not backend.threads:
            # A vector unit keeps each pair in 32 bytes of its own while it splits them: 256 pairs. Of two tokens at
            # least: Huawei's compiler fails an assertion of its own at a tile of one.
            at_once = min(power_of_2_from(heads), max(1, 128 // half))
            tokens = max(2, 256 // (at_once * half))
        # 16 fp32 per lane of each half: two 16-byte loads of bf16 in flight
        num_warps = min(max(tokens * at_once * half // (backend.warp_width * 16), 1), backend.max_warps)
        return cls(tokens, at_once, num_warps)


# Launchers

_TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _strides(x, heads_at):
    """(batch, sequence, head); a dim of one element has no stride worth knowing."""
    order = (0, 3 - heads_at, heads_at)
    return [x.stride(d) if x.shape[d] > 1 else 0 for d in order]


def _run(q, k, cos, sin, heads_at, rotary, style, sections, q_dtype, k_dtype, backward, config):
    before, after, table = STYLES[style]
    y, z = torch.empty_like(q, dtype=q_dtype), torch.empty_like(k, dtype=k_dtype)
    batch, seq, dim = q.shape[0], q.shape[3 - heads_at], q.shape[3]
    q_heads, k_heads = q.shape[heads_at], k.shape[heads_at]
    if not batch * seq * max(q_heads, k_heads):
        return y, z
    half = power_of_2_from(rotary // 2)
    config = config or Tokens.choose(max(q_heads, k_heads), half, q.device, pairs=before or after)
    tiles = cdiv(batch * seq, config.tokens)
    strides = [s for x in (q, k, y, z) for s in _strides(x, heads_at)]
    unit = 8 if all(in_units(s, 8)[1] == 8 for s in strides) else 1
    first, second = (rotary, rotary) if sections is None else (sections[0], sections[0] + sections[1])
    work = [_TRITON.get(torch.promote_types(x.dtype, cos.dtype), tl.float32) for x in (q, k)]
    launch(
        _rope_kernel, programs_for(tiles, q.device), q.device,
        q, k, cos, sin, y, z, batch * seq, seq, tiles, *(s // unit for s in strides),
        UNIT=unit, HQ=q_heads, HK=k_heads, D=dim, R=rotary, W=cos.shape[-1],
        STRIDE=row_stride(cos), STEP=cos.stride(-1), FIRST=first, SECOND=second, BATCHED=cos.shape[-3] > 1,
        BACKWARD=backward, X_PAIRS=after if backward else before, Y_PAIRS=before if backward else after, C_PAIRS=table,
        Q_WORK=work[0], K_WORK=work[1], ROWS=config.tokens, Q_HEADS=config.heads,
        K_HEADS=min(config.heads, power_of_2_from(max(k_heads, 1))), HALF=half,
        REST=min(power_of_2_from(max(dim - rotary, 1)), half), num_warps=config.num_warps,
    )  # fmt: skip
    return y, z


def rope_forward(q, k, cos, sin, heads_at, rotary, style, sections, q_dtype, k_dtype, config=None):
    """q, k: 4 dims, heads in dim `heads_at`, last dim dense; cos, sin: rows of one `row_stride` -> both rotated."""
    return _run(q, k, cos, sin, heads_at, rotary, style, sections, q_dtype, k_dtype, False, config)


def rope_backward(dq, dk, cos, sin, heads_at, rotary, style, sections, q_dtype, k_dtype, config=None):
    """-> the gradients of q and k, rotated back, in fresh memory."""
    return _run(dq, dk, cos, sin, heads_at, rotary, style, sections, q_dtype, k_dtype, True, config)


KERNELS = Kernels(rope_forward, rope_backward)
