"""Time launch configs of the elementwise kernels and of rope on this card, and print the best beside the default.

    python -m benchmark.sweep_elementwise [swiglu geglu relu_squared rope]

Each config's result is compared with the default's before it is timed. Times are medians of CUDA-graph replays; the
default and the best are timed as a user sees them too. All rows go to benchmark/results (or $OUT).
"""

from __future__ import annotations

import importlib
import sys

import torch

from benchmark import RESULTS
from liger_kernel.bench.measure import ceilings, path_for, save, time_call, time_graph

SHAPE = (8192, 14336)
FLAT = [(b, w) for b in (1024, 2048, 4096, 8192) for w in (2, 4, 8, 16) if 8 <= b // (32 * w) <= 32]
TOKENS = [(1, 32, 4), (1, 32, 8), (1, 16, 2), (1, 16, 4), (1, 8, 2), (2, 32, 8), (2, 16, 4), (2, 8, 2), (4, 8, 4),
          (4, 8, 2), (4, 8, 8), (8, 8, 8)]  # fmt: skip


def random(*shape):
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def flat_calls(op):
    """label -> (call(config=None) -> tensors, bytes moved), and the configs."""
    kernels = importlib.import_module(f"liger_kernel.ops.kernels.{op}")
    blocks = importlib.import_module("liger_kernel.ops.kernels.blocks")
    forward, backward = kernels.KERNELS.forward, kernels.KERNELS.backward
    a, b, dc = random(*SHAPE), random(*SHAPE), random(*SHAPE)
    size = a.numel() * a.element_size()
    if op == "relu_squared":
        calls = {"forward": (lambda config=None: forward(a, config=config), 2 * size),
                 "backward": (lambda config=None: backward(dc, a, config=config), 3 * size)}  # fmt: skip
    else:
        options = {"swiglu": (1.0, 1.0), "geglu": ("tanh",)}[op]
        calls = {"forward": (lambda config=None: forward(a, b, *options, config=config), 3 * size),
                 "backward": (lambda config=None: backward(dc, a, b, *options, config=config), 5 * size)}  # fmt: skip
    if op == "swiglu":
        y = torch.cat((a, b), -1)
        calls["forward packed"] = (lambda config=None: forward(y, None, 1.0, 1.0, config=config), 3 * size)
        calls["backward packed"] = (lambda config=None: backward(dc, y, None, 1.0, 1.0, config=config), 5 * size)
    return calls, [blocks.Flat(*c) for c in FLAT]


def rope_calls():
    room = importlib.import_module("liger_kernel.ops.rope")
    kernels = importlib.import_module("liger_kernel.ops.kernels.rope")
    calls = {}
    for label in ("4x4096x(32+8)x128", "4x4096x(4+1)x256", "4x(32+8)x4096x128"):
        case = room.CONTRACT.timed(torch.bfloat16, torch.device("cuda"))[label]
        q, k = case.args
        q, k, cos, sin, options = room.prepare(q, k, case.kwargs["cos"], case.kwargs["sin"])
        moved = 2 * (q.numel() + k.numel()) * q.element_size()

        def forward(config=None, args=(q, k, cos, sin, *options)):
            return kernels.KERNELS.forward(*args, config=config)

        def backward(config=None, args=(q, k, cos, sin, *options)):
            return kernels.KERNELS.backward(*args, config=config)

        calls |= {f"forward {label}": (forward, moved), f"backward {label}": (backward, moved)}
    return calls, [kernels.Tokens(*c) for c in TOKENS]


def assert_same(ours, wanted):
    """Bit for bit: a config changes which program computes an element, never how."""
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (ours, wanted)), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def sweep(op, label, call, moved, configs):
    wanted, rows = call(), []
    for config in [None, *configs]:
        row = {"op": op, "call": label, "config": str(config or "default")}
        rows.append(row)
        try:
            assert_same(call(config=config), wanted)
            timing = time_graph(lambda: call(config=config), samples=15)  # noqa: B023
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        if timing is None:
            row["failed"] = "cannot be captured in a CUDA graph"
            continue
        row |= {"graph_ms": timing.median, "TB/s": moved / timing.median / 1e9, "this": config}
    timed = sorted((r for r in rows if "TB/s" in r), key=lambda r: -r["TB/s"])
    for row in {r["config"]: r for r in (rows[0], *timed[:1]) if "this" in r}.values():
        row["event_ms"] = time_call(lambda: call(config=row["this"]), samples=15).median  # noqa: B023
    for row in rows:
        row.pop("this", None)
    for row in [rows[0], *timed[:3], *(r for r in rows[1:] if "failed" in r)]:
        if "failed" in row:
            print(f"{op:13} {label:34} {row['config']:44} {row['failed']}")
            continue
        event = f"{row['event_ms']:8.4f} ms as called" if "event_ms" in row else ""
        print(f"{op:13} {label:34} {row['config']:44} {row['graph_ms']:8.4f} ms {row['TB/s']:6.3f} TB/s {event}")
    return rows


def main() -> int:
    rows = []
    for op in sys.argv[1:] or ["swiglu", "geglu", "relu_squared", "rope"]:
        calls, configs = rope_calls() if op == "rope" else flat_calls(op)
        for label, (call, moved) in calls.items():
            rows += sweep(op, label, call, moved, configs)
        del calls, call
        torch.cuda.empty_cache()
    print(save(path_for("sweep_elementwise", RESULTS), rows, ceilings()))
    return 0 if not any("failed" in r for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
