"""How everything here is timed, and what is recorded beside a number."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median of the samples, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float
    samples: int


def _timing(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    at = lambda q: ordered[min(int(q * len(ordered)), len(ordered) - 1)]  # noqa: E731
    return Timing(statistics.median(ordered), at(0.2), at(0.8), len(ordered))


def _flush_buffer() -> torch.Tensor:
    return torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")  # 256 MiB: several times the L2


def time_call(call: Callable[[], object], samples: int = 40, warmup: int = 5, budget_s: float = 2.0) -> Timing:
    """As a user sees it: events around the call, so host time counts. The L2 is flushed before each sample."""
    flush = _flush_buffer()
    for _ in range(warmup):
        call()
    torch.cuda.synchronize()
    return _sample(call, flush, samples, budget_s)


def time_graph(call: Callable[[], object], samples: int = 40, budget_s: float = 2.0) -> Timing | None:
    """The GPU's own time: replays of a CUDA graph of the call. None where it cannot be captured."""
    flush = _flush_buffer()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except Exception:
        torch.cuda.synchronize()
        return None
    graph.replay()
    torch.cuda.synchronize()
    return _sample(graph.replay, flush, samples, budget_s)


def _sample(call, flush, samples, budget_s) -> Timing:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(samples)]
    first = None
    for i, (start, end) in enumerate(events):
        flush.zero_()
        start.record()
        call()
        end.record()
        if i == 2:  # a slow call gets fewer samples, never fewer than ten
            torch.cuda.synchronize()
            first = max(start.elapsed_time(end), 1e-3)
        if first is not None and i >= 9 and i * first > budget_s * 1000:
            events = events[: i + 1]
            break
    torch.cuda.synchronize()
    return _timing([start.elapsed_time(end) for start, end in events])


def peak_extra_mib(call: Callable[[], object]) -> float:
    """Peak device memory of one call beyond what was allocated before it."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings() -> dict[str, float]:
    """What this card can do: copy bandwidth in TB/s (bytes read plus written), bf16 GEMM in TFLOP/s on random data."""
    x = torch.randn(2**30, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    copy = 2 * x.numel() * x.element_size() / time_call(lambda: y.copy_(x)).median / 1e9
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    gemm = 2 * 8192**3 / time_call(lambda: a @ b).median / 1e9
    return {"copy_TB_s": round(copy, 3), "gemm_TFLOP_s": round(gemm, 1)}


def surroundings() -> dict[str, object]:
    """Card, clocks, versions and commit: what a number means nothing without."""
    import triton

    def shell(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except OSError:
            return ""

    clocks = shell("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit,driver_version", "--format=csv,noheader")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "card": torch.cuda.get_device_name(),
        "clocks_power_driver": clocks,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("LIGER_BENCH_COMMIT") or shell("git", "rev-parse", "--short", "HEAD"),
    }


def save(name: str, rows: list[dict], extra: dict | None = None) -> Path:
    """Write rows with their surroundings to benchmark/results (or $OUT) and return the path."""
    folder = Path(os.environ.get("OUT", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name().split()[1].lower()
    path = folder / f"{name}-{card}-{datetime.date.today().isoformat()}.json"
    path.write_text(json.dumps({**surroundings(), **(extra or {}), "rows": rows}, indent=1, default=_plain) + "\n")
    return path


def _plain(value):
    return asdict(value) if isinstance(value, Timing) else str(value)
