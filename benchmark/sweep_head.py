"""Time the loss kernel's configs and the head's chunk sizes on this card, correctness first.

    python -m benchmark.sweep_head [cross_entropy] [head]

cross_entropy 8192x128256, with and without gradient, over launch configs; then the fused head at the rows of the
project's table, lean (dW summed in bf16), default (fp32) and without gradients, over chunk sizes, beside the same
GEMMs alone. No number is printed for what differs from torch. All rows go to benchmark/results (or $OUT).
"""

from __future__ import annotations

import functools
import sys

import torch

from benchmark import RESULTS
from liger_kernel.bench.measure import ceilings, path_for, peak_extra_mib, save, time_call, time_graph
from liger_kernel.ops import head, row_loss
from liger_kernel.ops.cross_entropy import liger_cross_entropy
from liger_kernel.ops.fused_linear_cross_entropy import liger_fused_linear_cross_entropy
from liger_kernel.ops.kernels import cross_entropy as kernels

SHAPES = ((4096, 4096, 128256), (8192, 4096, 128256), (16384, 2048, 128256), (16384, 1024, 151936),
          (16384, 4096, 32000))  # fmt: skip
MODES = {"lean": torch.bfloat16, "default": None}
CHUNK_ROWS = (1024, 2048, 4096)
CONFIGS = [kernels.Config(warps * 32 * unroll, 8, warps, programs)
           for warps in (4, 8, 16, 32) for unroll in (1, 2, 4) for programs in (None, 1, 2)
           if not (programs and warps < 16)]  # fmt: skip


def relative(ours, truth):
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


def check_head() -> None:
    """Loss and gradients of a small head against torch in fp64, by several chunks, on this card."""
    x = torch.randn(512, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    w = (torch.randn(5000, 256, device="cuda") / 16).bfloat16().requires_grad_()
    y = torch.randint(0, 5000, (512,), device="cuda")
    y[::7] = -100
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    truth = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*wide), y)
    truths = torch.autograd.grad(truth, wide)
    ours = liger_fused_linear_cross_entropy(x, w, y, workspace_bytes=128 * 5008 * 2)
    errors = [relative(g, t) for g, t in zip(torch.autograd.grad(ours, (x, w)), truths)]
    assert abs(ours.item() - truth.item()) < 1e-2 and max(errors) < 2e-2, (ours.item(), truth.item(), errors)
    print(f"head against fp64: loss {ours.item() - truth.item():+.1e}, gradients {errors[0]:.1e} {errors[1]:.1e}; "
          f"GEMM with fp32 result: {head.widens('cuda', torch.bfloat16, torch.float32)}")  # fmt: skip


def sweep_cross_entropy() -> list[dict]:
    x = (torch.randn(8192, 128256, dtype=torch.bfloat16, device="cuda") * 3).requires_grad_()
    y = torch.randint(0, 128256, (8192,), device="cuda")
    loss = row_loss.RowLoss()
    given = row_loss.prepare(y, loss, x)
    plain = x.detach()
    out = row_loss.empty_stats(8192, x.device, torch.float32, ())
    dx = torch.empty_like(plain)
    losses = torch.nn.functional.cross_entropy(plain[:64].double(), y[:64], reduction="none") / 8192
    grads = plain[:64].double().softmax(-1)
    grads[torch.arange(64), y[:64]] -= 1
    rows = []
    for config in [None, *CONFIGS]:
        row = {"op": "cross_entropy", "config": str(config or "default")}
        rows.append(row)
        try:
            out.loss.zero_(), dx.zero_()
            kernels.cross_entropy_forward(plain, given, loss, out, dx, config)
            assert relative(out.loss[:64], losses) < 1e-5 and relative(dx[:64], grads / 8192) < 5e-3
            for label, room in (("full", dx), ("no grad", None)):
                call = lambda room=room: kernels.cross_entropy_forward(plain, given, loss, out, room, config)  # noqa: B023, E731
                row[label] = time_graph(call, samples=12).median
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:160]}"
    good = [r for r in rows if "failed" not in r]
    for label in ("full", "no grad"):
        for row in [rows[0], *sorted(good, key=lambda r: r[label])[:5]]:
            print(f"cross_entropy kernel {label:8} {row.get(label, float('nan')):7.3f} ms  {row['config']}")
    for row in rows:
        if "failed" in row:
            print(f"cross_entropy {row['config']}: {row['failed']}")
    del dx, grads

    def full():
        x.grad = None
        liger_cross_entropy(x, y).backward()

    rows.append({"op": "cross_entropy", "config": "autograd", "full": time_call(full, samples=15).median,
                 "no grad": time_call(lambda: liger_cross_entropy(plain, y), samples=15).median})  # fmt: skip
    print(f"cross_entropy as called: full {rows[-1]['full']:.3f} ms, no grad {rows[-1]['no grad']:.3f} ms")
    return rows


def gemm_floor(h, w, rows: int, gradients: bool) -> float:
    """The head's products alone, in chunks of `rows`, dW in bf16."""
    chunk = torch.randn(rows, w.shape[0], dtype=h.dtype, device="cuda")
    dh, dw = torch.empty_like(h), torch.empty_like(w)

    def call():
        for i in range(0, h.shape[0], rows):
            part = h[i : i + rows]
            logits = chunk[: part.shape[0]]
            torch.mm(part, w.t(), out=logits)
            if gradients:
                torch.mm(logits, w, out=dh[i : i + rows])
                dw.addmm_(logits.t(), part)

    return time_call(call, samples=10).median


def step(h, w, y, mode: str, budget: int | None):
    if mode == "no grad":
        with torch.no_grad():
            return liger_fused_linear_cross_entropy(h, w, y, workspace_bytes=budget)
    h.grad = w.grad = None
    loss = liger_fused_linear_cross_entropy(h, w, y, accum_dtype=MODES[mode], workspace_bytes=budget)
    return loss.backward()


def sweep_head() -> list[dict]:
    rows = []
    for n_rows, width, classes in SHAPES:
        h = torch.randn(n_rows, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        w = (torch.randn(classes, width, device="cuda") / width**0.5).bfloat16().requires_grad_()
        y = torch.randint(0, classes, (n_rows,), device="cuda")
        shape = f"{n_rows}x{width}x{classes}"
        floors = {g: gemm_floor(h.detach(), w.detach(), 4096, g) for g in (True, False)}
        print(f"{shape}: GEMM floor in 4096-row chunks {floors[True]:.1f} ms, no grad {floors[False]:.1f} ms")
        for mode, chunk in [(m, c) for m in (*MODES, "no grad") for c in (None, *CHUNK_ROWS)]:
            budget = None if chunk is None else chunk * head.pitch(classes) * 2
            row = {"op": "head", "shape": shape, "mode": mode, "chunk_rows": chunk,
                   "floor_ms": floors[mode != "no grad"]}  # fmt: skip
            rows.append(row)

            call = functools.partial(step, h, w, y, mode, budget)
            h.grad = w.grad = None
            row["peak_mib"] = peak_extra_mib(call)
            h.grad = w.grad = None
            row["ms"] = time_call(call, samples=10).median
            print(f"  {mode:8} chunk {str(chunk or 'default'):8} {row['ms']:7.2f} ms {row['peak_mib']:7.0f} MiB")
        del h, w, y, call
        torch.cuda.empty_cache()
    return rows


def main() -> int:
    asked = sys.argv[1:] or ["cross_entropy", "head"]
    check_head()
    rows = []
    if "cross_entropy" in asked:
        rows += sweep_cross_entropy()
        torch.cuda.empty_cache()
    if "head" in asked:
        rows += sweep_head()
    print(save(path_for("sweep_head", RESULTS), rows, ceilings()))
    return 1 if any("failed" in r for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
