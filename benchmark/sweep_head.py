"""Time the loss kernel's configs, the head's pieces and its chunk sizes on this card, correctness first.

    python -m benchmark.sweep_head [cross_entropy] [pieces] [head] [logprobs] [tiles] [ignored] [crossover]
                                  [--peers DIR] [--small]

cross_entropy: 8192x128256 and 8192x151936, with and without gradient, over launch configs. pieces: the ways to sum dW
and to round the sum, one chunk's worth. head: the rows of the project's table, lean (dW summed in bf16), default (fp32)
and without gradients, over chunk sizes, beside the same GEMMs alone. logprobs: forward and backward of per-token
outputs, beside TRL's where DIR has it. tiles: the same without gradients, over heights and bytes of a tile. ignored:
the head with 75 % of the labels ignored, host waiting or not. crossover: small heads beside plain torch.
No number is printed for what differs from torch. All rows go to benchmark/results (or $OUT).
"""

from __future__ import annotations

import argparse
import functools
import os
import site
import sys

import torch

from benchmark import RESULTS
from liger_kernel.bench.measure import (
    ceilings,
    device,
    host_us,
    path_for,
    peak_extra_mib,
    save,
    time_call,
    time_graph,
)
from liger_kernel.ops import head_chunks, head_tiles, live_rows, row_loss, weight_sum
from liger_kernel.ops.cross_entropy import liger_cross_entropy
from liger_kernel.ops.fused_linear_cross_entropy import HeadOptions, _plain, liger_fused_linear_cross_entropy
from liger_kernel.ops.fused_linear_scaled_cross_entropy import liger_fused_linear_logprobs
from liger_kernel.ops.kernels import cross_entropy as kernels
from liger_kernel.ops.kernels import weight_sum as rounding

DEVICE = device()
SHAPES = ((4096, 4096, 128256), (8192, 4096, 128256), (16384, 2048, 128256), (16384, 1024, 151936),
          (16384, 4096, 32000), (32768, 4096, 128256))  # fmt: skip
MODES = {"lean": torch.bfloat16, "default": None}
CHUNK_ROWS = (1024, 2048, 4096)
TILE_ROWS, TILE_MIB = (2048, 4096, 8192), (64, 128, 300)
SMALL_ROWS, SMALL_CLASSES = (32, 128, 512, 2048), (128, 2048, 32000)
CONFIGS = [kernels.Config(warps * 32 * unroll, 8, warps) for warps in (8, 16, 32) for unroll in (1, 2, 4)]  # fmt: skip


def relative(ours, truth):
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


def check_head() -> None:
    """Loss and gradients of a small head against torch in fp64, by several chunks, on this card."""
    x = torch.randn(512, 256, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    w = (torch.randn(5000, 256, device=DEVICE) / 16).bfloat16().requires_grad_()
    y = torch.randint(0, 5000, (512,), device=DEVICE)
    y[::7] = -100
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    truth = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*wide), y)
    truths = torch.autograd.grad(truth, wide)
    ours = liger_fused_linear_cross_entropy(x, w, y, workspace_bytes=128 * 5008 * 2)
    errors = [relative(g, t) for g, t in zip(torch.autograd.grad(ours, (x, w)), truths)]
    assert abs(ours.item() - truth.item()) < 1e-2 and max(errors) < 2e-2, (ours.item(), truth.item(), errors)
    print(f"head against fp64: loss {ours.item() - truth.item():+.1e}, gradients {errors[0]:.1e} {errors[1]:.1e}; "
          f"GEMM with fp32 result: {weight_sum.widens(DEVICE.type, torch.bfloat16, torch.float32)}")  # fmt: skip


def sweep_cross_entropy() -> list[dict]:
    return [row for n_classes in (128256, 151936) for row in cross_entropy_at(n_classes)]


def cross_entropy_at(n_classes: int) -> list[dict]:
    x = (torch.randn(8192, n_classes, dtype=torch.bfloat16, device=DEVICE) * 3).requires_grad_()
    y = torch.randint(0, n_classes, (8192,), device=DEVICE)
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
        row = {"op": "cross_entropy", "classes": n_classes, "config": str(config or "default")}
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
        for row in [rows[0], *sorted(good, key=lambda r: r[label])[:6]]:
            print(f"cross_entropy 8192x{n_classes} {label:8} {row.get(label, float('nan')):7.3f} ms  {row['config']}")
    for row in rows:
        if "failed" in row:
            print(f"cross_entropy {row['config']}: {row['failed']}")
    del dx, grads

    def full():
        x.grad = None
        liger_cross_entropy(x, y).backward()

    rows.append({"op": "cross_entropy", "classes": n_classes, "config": "autograd",
                 "full": time_call(full, samples=15).median,
                 "no grad": time_call(lambda: liger_cross_entropy(plain, y), samples=15).median})  # fmt: skip
    print(f"cross_entropy as called: full {rows[-1]['full']:.3f} ms, no grad {rows[-1]['no grad']:.3f} ms")
    return rows


def sweep_pieces() -> list[dict]:
    """One chunk's dW, and the rounding of the sum, in milliseconds."""
    rows = []
    for n_rows, width, classes in ((2048, 4096, 128256), (1664, 1024, 151936)):
        a = torch.randn(n_rows, head_chunks.pitch(classes), dtype=torch.bfloat16, device=DEVICE)[:, :classes].t()
        b = torch.randn(n_rows, width, dtype=torch.bfloat16, device=DEVICE)
        wide, narrow = (torch.zeros(classes, width, dtype=d, device=DEVICE) for d in (torch.float32, torch.bfloat16))
        left, right = (torch.zeros(classes, width // 2, device=DEVICE) for _ in range(2))
        top, bottom = wide[: classes // 2], wide[classes // 2 :]
        ways = {"narrow": [narrow], "wide": [wide], "wide in 2 column halves": [left, right]}
        calls = {f"{name}, {'first' if first else 'further'}": functools.partial(
                     weight_sum.add_product, parts, a, b, first)
                 for name, parts in ways.items() for first in (True, False)}  # fmt: skip

        def by_rows(first, top=top, bottom=bottom, a=a, b=b):
            for part, columns in ((top, a[: top.shape[0]]), (bottom, a[top.shape[0] :])):
                weight_sum.add_product([part], columns, b, first)

        calls |= {f"wide in 2 row halves, {'first' if first else 'further'}": functools.partial(by_rows, first)
                  for first in (True, False)}  # fmt: skip
        calls["round: kernel"] = functools.partial(rounding.narrow, left, right, torch.bfloat16)
        calls["round: torch slabs"] = functools.partial(weight_sum.narrow, left, right, torch.bfloat16)
        calls["round: one copy to other memory"] = functools.partial(narrow.copy_, wide)
        calls["allocate and free the halves"] = lambda c=classes, w=width: [
            torch.empty(c, w // 2, device=DEVICE) for _ in range(2)
        ]
        sample = torch.randn(classes, width, device=DEVICE)
        left.copy_(sample[:, : width // 2]), right.copy_(sample[:, width // 2 :])
        rounding.narrow(left, right, torch.bfloat16)
        assert torch.equal(left.view(torch.bfloat16), sample.bfloat16()), "the sum is not rounded in place"
        del sample
        left.zero_(), right.zero_()
        for name, call in calls.items():
            rows.append({"op": "pieces", "shape": f"{n_rows}x{width}x{classes}", "piece": name})
            rows[-1]["ms"] = time_call(call, samples=12).median
            print(f"{rows[-1]['shape']} {name:36} {rows[-1]['ms']:7.3f} ms")
        del calls, a, b, wide, narrow, left, right, top, bottom, ways, by_rows, call
        torch.cuda.empty_cache()
    return rows


def sweep_logprobs() -> list[dict]:
    """Forward, and forward and backward, of per-token log-probabilities and entropies, both differentiated."""
    rows, trl = [], _trl()
    for n_rows, width, classes in SHAPES:
        h = torch.randn(n_rows, width, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        w = (torch.randn(classes, width, device=DEVICE) / width**0.5).bfloat16().requires_grad_()
        y = torch.randint(0, classes, (n_rows,), device=DEVICE)
        upstream = [torch.randn(n_rows, device=DEVICE) for _ in range(2)]
        calls = {"ours": lambda h=h, w=w, y=y: _logprobs(h, w, y)}
        if trl:
            calls["trl"] = lambda h=h, w=w, y=y: trl(h, w, y)
        first = [t[:512] for t in calls["ours"]()]
        floor = gemm_floor(h.detach(), w.detach(), 4096, True) + gemm_floor(h.detach(), w.detach(), 4096, False)
        for name, call in calls.items():
            off = max(relative(a[:512], b) for a, b in zip(call(), first))
            assert off < 2e-2, f"{name} differs from ours by {off}"  # of logits in bf16

            def full(call=call, h=h, w=w, upstream=upstream):
                h.grad = w.grad = None
                torch.autograd.backward(call(), upstream)

            def forward(call=call):
                with torch.no_grad():
                    call()

            for mode, run in (("full", full), ("no grad", forward)):
                row = {"op": "logprobs", "shape": f"{n_rows}x{width}x{classes}", "peer": name, "mode": mode,
                       "floor_ms": floor, "peak_mib": peak_extra_mib(run)}  # fmt: skip
                h.grad = w.grad = None
                row["ms"] = time_call(run, samples=10).median
                h.grad = w.grad = None
                rows.append(row)
                print(f"logprobs {row['shape']} {name:5} {mode:8} {row['ms']:7.2f} ms {row['peak_mib']:7.0f} MiB "
                      f"(four GEMMs alone {floor:.2f} ms)")  # fmt: skip
        del h, w, calls, call, full, forward, run, first
        torch.cuda.empty_cache()
    return rows


def sweep_tiles() -> list[dict]:
    """Per-token outputs without gradients over the tiles of the head; 0 rows: chunks of whole rows."""
    rows, trl, tall, least = [], _trl(), head_tiles.TALL, head_tiles.LEAST
    for n_rows, width, classes in SHAPES:
        h = torch.randn(n_rows, width, dtype=torch.bfloat16, device=DEVICE)
        w = (torch.randn(classes, width, device=DEVICE) / width**0.5).bfloat16()
        y = torch.randint(0, classes, (n_rows,), device=DEVICE)
        shape, first = f"{n_rows}x{width}x{classes}", None
        sizes = [(0, 300), *((t, mib) for t in TILE_ROWS for mib in TILE_MIB)]
        calls = {(t, mib): functools.partial(_logprobs, h, w, y, mib << 20) for t, mib in sizes}
        if trl:
            calls["trl", 0] = functools.partial(trl, h, w, y)
        for (height, mib), call in calls.items():
            head_tiles.LEAST = least if height else 1 << 60
            head_tiles.TALL = height if isinstance(height, int) and height else tall
            row = {"op": "tiles", "shape": shape, "rows": height, "mib": mib}
            with torch.no_grad():
                found = call()
                first = first or found
                off = max(relative(a, b) for a, b in zip(found, first))
                assert off < 2e-2, f"{row} differs by {off}"  # of logits in bf16
                row |= {"peak_mib": peak_extra_mib(call), "ms": time_call(call, samples=10).median}
            rows.append(row)
            print(f"tiles {shape} rows {height!s:5} of {mib:4} MiB {row['ms']:7.2f} ms {row['peak_mib']:7.0f} MiB")
        head_tiles.TALL, head_tiles.LEAST = tall, least
        print(f"tiles {shape}: GEMM alone in 4096-row chunks {gemm_floor(h, w, 4096, False):.2f} ms")
        del h, w, calls, call, found, first
        torch.cuda.empty_cache()
    return rows


def _logprobs(h, w, y, workspace_bytes=None):
    found = liger_fused_linear_logprobs(h, w, y, return_entropy=True, workspace_bytes=workspace_bytes)
    return found.log_prob, found.entropy


def _trl():
    """TRL's head for per-token log-probabilities, with its trainers' chunk size; None where it is not installed."""
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError:
        return None
    return lambda h, w, y: ChunkedLogProbFunction.apply(h, w, None, y, 1.0, 32768, None, 1.0, ("entropy",))[:2]


def sweep_ignored() -> list[dict]:
    rows = []
    for n_rows, width, classes in SHAPES[1:4:2]:
        h = torch.randn(n_rows, width, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        w = (torch.randn(classes, width, device=DEVICE) / width**0.5).bfloat16().requires_grad_()
        for share in (0.0, 0.5, 0.75):
            y = torch.randint(0, classes, (n_rows,), device=DEVICE)
            y[torch.rand(n_rows, device=DEVICE) < share] = -100
            for wait in ("1", "0"):
                os.environ[live_rows.SYNC_ENV] = wait
                call = functools.partial(step, h, w, y, "default", None)
                h.grad = w.grad = None
                rows.append({"op": "ignored", "shape": f"{n_rows}x{width}x{classes}", "share": share, "waits": wait,
                             "ms": time_call(call, samples=10).median})  # fmt: skip
                print(f"ignored {rows[-1]['shape']} {share:.0%} host waits {wait}: {rows[-1]['ms']:7.2f} ms")
        del os.environ[live_rows.SYNC_ENV], h, w, call
        torch.cuda.empty_cache()
    return rows


def sweep_crossover() -> list[dict]:
    """From which rows x classes on the engine is faster than logits and torch's cross entropy, at H = 1024."""
    rows = []
    for n_rows, classes in ((r, c) for r in SMALL_ROWS for c in SMALL_CLASSES):
        h = torch.randn(n_rows, 1024, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        w = (torch.randn(classes, 1024, device=DEVICE) / 32).bfloat16().requires_grad_()
        y = torch.randint(0, classes, (n_rows,), device=DEVICE)
        row = {"op": "crossover", "shape": f"{n_rows}x1024x{classes}"}
        fused = functools.partial(liger_fused_linear_cross_entropy, h, w, y, workspace_bytes=1 << 30)  # never plain
        plain = functools.partial(_plain, h, w, y, None, None, -100, 0.0, "mean", None, HeadOptions())
        for name, loss in (("fused", fused), ("plain", plain)):
            call = functools.partial(lambda loss, leaves: torch.autograd.grad(loss(), leaves), loss, (h, w))
            row |= {name: time_call(call).median, f"{name}_host_us": host_us(call)}
            row |= {f"{name}_graph": (timing := time_graph(call)) and timing.median}
        print(row)
        rows.append(row)
    return rows


def gemm_floor(h, w, rows: int, gradients: bool) -> float:
    """The head's products alone, in chunks of `rows`, dW in bf16."""
    chunk = torch.randn(rows, w.shape[0], dtype=h.dtype, device=DEVICE)
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
        h = torch.randn(n_rows, width, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        w = (torch.randn(classes, width, device=DEVICE) / width**0.5).bfloat16().requires_grad_()
        y = torch.randint(0, classes, (n_rows,), device=DEVICE)
        shape = f"{n_rows}x{width}x{classes}"
        floors = {g: gemm_floor(h.detach(), w.detach(), 4096, g) for g in (True, False)}
        print(f"{shape}: GEMM floor in 4096-row chunks {floors[True]:.1f} ms, no grad {floors[False]:.1f} ms")
        for mode, chunk in [(m, c) for m in (*MODES, "no grad") for c in (None, *CHUNK_ROWS)]:
            budget = None if chunk is None else chunk * head_chunks.pitch(classes) * 2
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


SWEEPS = {"cross_entropy": sweep_cross_entropy, "pieces": sweep_pieces, "head": sweep_head,
          "logprobs": sweep_logprobs, "tiles": sweep_tiles, "ignored": sweep_ignored,
          "crossover": sweep_crossover}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", choices=[*SWEEPS, []], default=[])
    parser.add_argument("--peers", metavar="DIR", help="folder with TRL's package")
    parser.add_argument("--small", action="store_true", help="tiny shapes for the head's sweeps: a dry run")
    args = parser.parse_args()
    if args.small:
        global SHAPES, SMALL_ROWS, SMALL_CLASSES
        SHAPES, SMALL_ROWS, SMALL_CLASSES = ((300, 64, 500),) * 5, (4,), (64,)
    if args.peers:
        site.addsitedir(args.peers)
    check_head()
    rows = []
    for name in args.sweeps or SWEEPS:
        rows += SWEEPS[name]()
        torch.cuda.empty_cache()
    if not args.small:
        print(save(path_for("sweep_head", RESULTS), rows, ceilings()))
    return 1 if any("failed" in r for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
