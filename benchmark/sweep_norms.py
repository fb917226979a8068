"""Time the row kernels over tilings on the accelerator at hand, to choose the numbers of RowTiles from.

    python benchmark/sweep_norms.py [--ops rms_norm,softmax] [--shapes 16384x4096] [--seconds 150]

For each op, shape and pass: first tile shapes and warps, then programs per core, then prefetch and column loops, each
around the best so far. A tiling whose result differs from the default's is an error, not a candidate. Prints the best
beside the default; writes every timing to $OUT/sweep_norms.json where OUT is set.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from triton.testing import do_bench

from liger_kernel import backends
from liger_kernel.ops.kernels import fused_add_rms_norm, layer_norm, rms_norm, softmax
from liger_kernel.ops.kernels.blocks import RowTiles, cdiv, power_of_2_from

DEVICE = torch.device(backends.current().device_type)
OPTIONS = 1e-6, 0.0, "llama"


@dataclass(frozen=True)
class Pass:
    """run(tiles) launches once; tensors: how many (R, N) tensors it reads and writes."""

    name: str
    run: object
    tensors: int


def of_rms_norm(x, dy, w):
    _, rstd = rms_norm.rms_norm_forward(x, w, *OPTIONS, x.dtype)
    yield Pass("forward", lambda t: rms_norm.rms_norm_forward(x, w, *OPTIONS, x.dtype, tiles=t), 2)
    yield Pass("backward", lambda t: rms_norm.rms_norm_backward(dy, x, w, rstd, *OPTIONS[1:], False, True, tiles=t), 3)


def of_fused_add_rms_norm(x, dy, w):
    room, ds = fused_add_rms_norm, torch.randn_like(dy)
    _, s, rstd = room.fused_add_rms_norm_forward(x, dy, w, *OPTIONS)
    backward = dy, ds, s, w, rstd, *OPTIONS[1:], False, True
    yield Pass("forward", lambda t: room.fused_add_rms_norm_forward(x, dy, w, *OPTIONS, tiles=t), 4)
    yield Pass("backward", lambda t: room.fused_add_rms_norm_backward(*backward, tiles=t), 4)


def of_layer_norm(x, dy, w):
    b = torch.randn_like(w)
    _, mean, rstd = layer_norm.layer_norm_forward(x, w, b, 1e-6)
    backward = dy, x, w, b, mean, rstd, True, True
    yield Pass("forward", lambda t: layer_norm.layer_norm_forward(x, w, b, 1e-6, tiles=t), 2)
    yield Pass("backward", lambda t: layer_norm.layer_norm_backward(*backward, tiles=t), 3)


def of_softmax(x, dy, w):
    y = softmax.softmax_forward(x)
    yield Pass("forward", lambda t: softmax.softmax_forward(x, tiles=t), 2)
    yield Pass("backward", lambda t: softmax.softmax_backward(dy, y, tiles=t), 3)


JOBS = {
    "rms_norm": (of_rms_norm, ["16384x4096", "8192x8192", "65536x1024", "1048576x128"]),
    "fused_add_rms_norm": (of_fused_add_rms_norm, ["16384x4096", "8192x8192"]),
    "layer_norm": (of_layer_norm, ["16384x4096", "65536x1024"]),
    "softmax": (of_softmax, ["8192x32768", "4096x131072", "16384x4096"]),
}


def tiling(rows: int, cols: int, block: int, elements: int, per_lane: int, waves: int, prefetch: bool) -> RowTiles:
    """waves=0: one program per tile."""
    backend = backends.device_of(DEVICE)
    tall = max(1, elements // block)
    warps = min(max(tall * block // (backend.warp_width * per_lane), 1), backend.max_warps)
    programs = cdiv(rows, tall)
    if waves:
        programs = min(programs, waves * backend.cores(DEVICE))
    return RowTiles(tall, block, block < cols, warps, programs, prefetch)


# block, warps of walks over a row that does not fit; each is tried with so many programs per core
WALKS = ((16384, 32), (8192, 32), (8192, 16), (4096, 16), (4096, 8), (2048, 8))
WAVES = (1, 2, 3, 4, 8)


class Search:
    """The timings of one pass at one shape."""

    def __init__(self, run, n_bytes: int, rows: int, cols: int, until: float):
        self.run, self.bytes, self.rows, self.cols, self.until = run, n_bytes, rows, cols, until
        self.expected = [t.float() for t in self.outputs(None)]
        self.default = self.time(None)
        self.tried: dict[RowTiles, float] = {}
        self.failed: dict[str, str] = {}

    def outputs(self, tiles) -> list[torch.Tensor]:
        made = self.run(tiles)
        return [t for t in (made if isinstance(made, tuple) else (made,)) if t is not None]

    def time(self, tiles, rep: int = 20) -> float:
        """TB/s; the L2 cache is flushed before each launch."""
        return self.bytes / do_bench(lambda: self.run(tiles), warmup=5, rep=rep, return_mode="median") / 1e9

    def attempt(self, tiles: RowTiles) -> None:
        if tiles in self.tried or str(tiles) in self.failed or time.monotonic() > self.until:
            return
        try:
            for ours, truth in zip(self.outputs(tiles), self.expected, strict=True):
                # two units in bf16's last place of the largest value: sums are taken in another order
                assert (ours.float() - truth).abs().max() <= 2**-6 * truth.abs().max(), "wrong result"
            self.tried[tiles] = self.time(tiles)
        except Exception as error:  # a tiling that does not compile or fit is an answer too
            self.failed[str(tiles)] = f"{type(error).__name__}: {error}"[:200]

    def best(self) -> RowTiles:
        return max(self.tried, key=self.tried.get)

    def go_through_long_rows(self) -> None:
        """A whole row at once; then walks."""
        cores, whole = backends.device_of(DEVICE).cores(DEVICE), power_of_2_from(self.cols)
        if whole <= 32768:
            self.attempt(RowTiles(1, whole, False, 32, self.rows))
            self.attempt(RowTiles(1, whole, False, 32, min(self.rows, cores)))
        for block, warps in WALKS:
            for waves in [w for w in WAVES if w * warps <= 64]:
                self.attempt(RowTiles(1, block, True, warps, min(self.rows, waves * cores)))

    def go(self, backward: bool, can_prefetch: bool) -> None:
        full = min(power_of_2_from(self.cols), 32768)
        shape = self.rows, self.cols
        for elements in sorted({max(full, e) for e in (1024, 2048, 4096, 8192)}):
            for per_lane in (16, 8, 32):
                self.attempt(tiling(*shape, full, elements, per_lane, 2 * can_prefetch, can_prefetch))
        loops = [b for b in (16384, 8192, 4096, 2048) if b < full] if self.cols >= 8192 else []
        for block in loops:
            self.attempt(tiling(*shape, block, block, 16, 2 * can_prefetch, False))
            if backward:
                self.attempt(tiling(*shape, block, 4 * block, 16, 2 * can_prefetch, False))
        if not self.tried:
            return
        cores = backends.device_of(DEVICE).cores(DEVICE)
        n_tiles = cdiv(self.rows, self.best().rows)
        for programs in (*(waves * cores for waves in (1, 2, 3, 4, 6, 8)), n_tiles):
            self.attempt(replace(self.best(), programs=min(programs, n_tiles)))
        for tiles in sorted(self.tried, key=self.tried.get)[-3:] if can_prefetch else ():
            self.attempt(replace(tiles, prefetch=not tiles.prefetch and not tiles.loop))
            self.attempt(replace(tiles, num_warps=min(2 * tiles.num_warps, 32)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default=",".join(JOBS))
    parser.add_argument("--shapes", help="instead of each op's own, as 16384x4096,8192x8192")
    parser.add_argument("--seconds", type=float, default=150)
    args = parser.parse_args()
    jobs = [(op, s) for op in args.ops.split(",") for s in (args.shapes.split(",") if args.shapes else JOBS[op][1])]
    end, records = time.monotonic() + args.seconds, []
    for i, (op, shape) in enumerate(jobs):
        rows, cols = map(int, shape.split("x"))
        x, dy = (torch.randn(rows, cols, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        w = torch.randn(cols, dtype=torch.bfloat16, device=DEVICE)
        for k, step in enumerate(JOBS[op][0](x, dy, w)):
            now = time.monotonic()
            until = now + (end - now) / (2 * (len(jobs) - i) - k)
            search = Search(step.run, step.tensors * x.numel() * x.element_size(), rows, cols, until)
            if op == "softmax" and cols >= 16384:
                search.go_through_long_rows()
            else:
                search.go(step.name == "backward", step.name == "backward" and op != "softmax")
            record = {"op": op, "shape": shape, "pass": step.name, "default": search.default, "failed": search.failed}
            record["tried"] = [asdict(t) | {"TB/s": v} for t, v in sorted(search.tried.items(), key=lambda i: -i[1])]
            records.append(record)
            best = search.best() if search.tried else None
            rate = search.time(best, rep=60) if best else float("nan")
            print(f"{op:20} {shape:12} {step.name:8} default {search.default:.2f}  best {rate:.2f} TB/s of "
                  f"{len(search.tried)}, {len(search.failed)} failed: {best}", flush=True)  # fmt: skip
    if os.environ.get("OUT"):
        Path(os.environ["OUT"], "sweep_norms.json").write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
