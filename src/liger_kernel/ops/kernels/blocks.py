"""What the kernels share: how rows are cut into tiles, and small jitted pieces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from liger_kernel.backends import device_of
from liger_kernel.ops.kernels.launch import launch


@dataclass(frozen=True)
class RowTiles:
    """How R rows of N columns are cut: tiles of `rows` x `block`, `num_warps` each, over `programs` programs.

    loop is True where a row does not fit one block and the kernel walks its columns. prefetch: a persistent kernel
    loads its next tile before it computes on this one.
    """

    rows: int
    block: int
    loop: bool
    num_warps: int
    programs: int
    prefetch: bool = False

    @classmethod
    def choose(cls, n_rows: int, n_cols: int, device: torch.device, live: int, walks: bool = False) -> RowTiles:
        """`live` fp32 tiles exist at once. walks=True: few programs, each walking many tiles, as a sum over rows needs.

        Short rows share a tile, so that a program has enough to load.
        """
        if torch.compiler.is_compiling():  # sizes may be symbols there, which no table can look up
            return cls._choose(device_of(device), n_rows, n_cols, device, live, walks)
        key = id(device_of(device)), n_rows, n_cols, device, live, walks
        found = _chosen.get(key)
        if found is None:
            if len(_chosen) > 4096:
                _chosen.clear()
            found = _chosen[key] = cls._choose(device_of(device), n_rows, n_cols, device, live, walks)
        return found

    @classmethod
    def _choose(cls, backend, n_rows, n_cols, device, live, walks) -> RowTiles:
        at_most = backend.max_block(live)
        block = min(power_of_2_from(n_cols), at_most)
        rows = max(1, min(4096 if walks else 2048, at_most) // block)
        if not backend.threads:
            rows = min(rows, 64)  # a column, one number of each row, takes 32 bytes a row in a core's buffer
        tile = rows * block
        # 16 fp32 per lane: four 16-byte loads of bf16 pairs in flight. A walking program prefetches, which lets 32 do:
        # fused_add_rms_norm backward 16384x4096 at 4 warps 2.77 TB/s, at 8 2.54 (H100 bf16, sweep 2026-11-21). More
        # live tiles than its four would spill.
        per_lane = 32 if walks and tile <= 4096 and live <= 4 else 16
        num_warps = min(max(tile // (backend.warp_width * per_lane), 1), backend.max_warps)
        programs, limit = cdiv(n_rows, rows), backend.max_programs
        if backend.persistent:
            limit = backend.cores(device)
        elif walks:
            # 8192 elements per core: of 1 to 8 programs each, best at every N from 128 to 8192 (the same sweep)
            limit = backend.cores(device) * max(1, 8192 // tile)
        loop = block < n_cols
        return cls(rows, block, loop, num_warps, max(1, min(programs, limit)), walks and not loop and backend.threads)


_chosen: dict[tuple, RowTiles] = {}  # choosing takes longer than looking up: host time of every call


# Plain Python: Triton's own cdiv and next_power_of_2 read the environment, which torch.compile cannot trace.


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def power_of_2_from(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def as_rows(x: torch.Tensor) -> tuple[int, int]:
    """(R, N) of a tensor seen as R rows of N = x.shape[-1] columns."""
    n_cols = x.shape[-1]
    return (x.numel() // n_cols if n_cols else 0), n_cols


@triton.jit
def int64(index):
    """A loop index as a 64-bit scalar, before it meets a size; the interpreter's loop index is a plain int."""
    return tl.full((), index, tl.int64)


@triton.jit
def index(i, WIDE: tl.constexpr):
    """A loop index, in 64 bits where WIDE: what is added to it becomes as wide, and vectors of 64 bits are slow."""
    if WIDE:
        return int64(i)
    else:
        return i


def is_wide(size: int) -> bool:
    """Whether 32 bits cannot count the elements of a tensor, and of a tile that reaches past its end."""
    return size >= 2**31 - 2**20


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x as it would be after a store in DTYPE, in fp32 again."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def square(x, CAST: tl.constexpr, DTYPE: tl.constexpr):
    """x^2 as the casting mode of an RMSNorm rounds it."""
    if CAST == -1:
        return rounded(x * x, DTYPE)
    else:
        return x * x


@triton.jit
def normed(x, rstd, CAST: tl.constexpr, DTYPE: tl.constexpr):
    """x * rstd as the casting mode of an RMSNorm rounds it: what its weight is multiplied with."""
    if CAST <= 0:
        return rounded(x * rstd, DTYPE)
    else:
        return x * rstd


@triton.jit
def exp(x):
    """e^x of fp32 where what lies below the least normal number may be 0.

    Two instructions an element; tl.exp keeps such results and takes five on NVIDIA, nine on AMD.
    """
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def tanh(x):
    """tanh of fp32 to a few units in the last place, near zero too."""
    u = tl.abs(x)
    e = exp(-2.0 * u)
    square = x * x
    near = x * (1.0 - square * (0.33333333 - square * (0.13333333 - square * (0.053968254 - square * 0.021869488))))
    far = tl.where(x < 0.0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    return tl.where(u < 0.2, near, far)  # 1 - e cancels near zero


@triton.jit
def load_tile(X, tile, R, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows tile * ROWS ... of X (R, N) as (ROWS, BLOCK) in X's dtype, zeros outside; tile may lie past the end."""
    row = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (tile * ROWS + row < R) & (cols < N)
    return tl.load(X + int64(tile) * ROWS * N + row * N + cols, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["P"])
def _sum_rows_kernel(Partial, Out, P, N, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    for tile in range(tl.program_id(0), tl.cdiv(N, BLOCK), tl.num_programs(0)):
        cols = tile * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for first in range(0, P, ROWS):
            rows = first + tl.arange(0, ROWS)
            mask = (rows < P)[:, None] & (cols < N)[None, :]
            total += tl.load(Partial + rows[:, None] * N + cols[None, :], mask=mask, other=0.0)
        tl.store(Out + cols, tl.sum(total, axis=0).to(Out.dtype.element_ty), mask=cols < N)


def sum_rows(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(P, N) fp32 partial sums -> (N,) in `dtype`, always added in the same order."""
    n_partials, n_cols = partial.shape
    out = torch.empty(n_cols, dtype=dtype, device=partial.device)
    block = 64
    launch(
        _sum_rows_kernel, programs_for(cdiv(n_cols, block), partial.device), partial.device,
        partial, out, n_partials, n_cols, BLOCK=block, ROWS=32, num_warps=4,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class Flat:
    """How an elementwise kernel cuts its columns: tiles of `block` elements, `num_warps` each."""

    block: int
    num_warps: int

    @classmethod
    def choose(cls, device: torch.device, n_cols: int | None = None) -> Flat:
        """n_cols: the length of a row, where rows are not one flat run of elements."""
        backend = device_of(device)
        block = backend.max_block(8) if backend.persistent else 2048
        if n_cols is not None:
            block = min(block, power_of_2_from(n_cols))
        # 16 elements per lane: two 16-byte loads of bf16 in flight per operand
        return cls(block, min(max(block // (backend.warp_width * 16), 1), backend.max_warps))


@dataclass(frozen=True)
class Strips:
    """How a long row is walked: `lanes` x `vec` columns at once, the `vec` neighbours of a lane in one thread."""

    lanes: int
    vec: int
    num_warps: int

    @classmethod
    def choose(cls, n_cols: int, dtype: torch.dtype, device: torch.device) -> Strips:
        backend = device_of(device)
        if not backend.threads:
            return cls(1, min(power_of_2_from(n_cols), backend.max_block(8)), 1)
        vec = 16 // dtype.itemsize  # one 16-byte load per lane
        lanes = power_of_2_from(max(cdiv(n_cols, vec), 1))
        num_warps = max(1, min(lanes // backend.warp_width, 8, backend.max_warps))
        return cls(min(lanes, num_warps * backend.warp_width), vec, num_warps)


def programs_for(n_tiles: int, device: torch.device) -> int:
    """A program per tile, as far as the device allows."""
    backend = device_of(device)
    return max(1, min(n_tiles, backend.cores(device) if backend.persistent else backend.max_programs))


def in_units(size: int, unit: int = 16) -> tuple[int, int]:
    """size = n * unit with a unit of 1 or `unit`: what a kernel must know to load 16 bytes at once.

    Only the unit is compiled in, so a size that changes from step to step compiles nothing.
    """
    return (size // unit, unit) if size % unit == 0 else (size, 1)
