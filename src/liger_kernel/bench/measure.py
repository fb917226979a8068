"""How everything here is timed, and what is recorded beside a number."""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from liger_kernel import __version__, backends
from liger_kernel.cli.memory import Meter

SAMPLES = 30


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median of the samples, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        ordered = sorted(samples)
        at = lambda q: ordered[min(int(q * len(ordered)), len(ordered) - 1)]  # noqa: E731
        return cls(statistics.median(ordered), at(0.2), at(0.8), len(ordered))


@functools.cache
def device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    return torch.device(backends.current().device_type)


def _module():
    return torch.get_device_module(device())


def synchronize() -> None:
    _module().synchronize()


def _has_events() -> bool:
    return device().type != "cpu"


def time_call(call: Callable[[], object], samples: int = SAMPLES, warmup: int = 3) -> Timing:
    """As a user sees it: events around the call, so host time counts. The L2 is flushed before each sample."""
    for _ in range(warmup):
        call()
    synchronize()
    if _has_events():
        return _with_events(call, samples)
    taken = []
    for _ in range(samples):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1000)
    return Timing.of(taken)


def time_graph(call: Callable[[], object], samples: int = SAMPLES) -> Timing | None:
    """The GPU's own time: replays of a CUDA graph of the call. None where it cannot be captured."""
    module = _module()
    if not hasattr(module, "CUDAGraph"):
        return None
    stream = module.Stream()
    stream.wait_stream(module.current_stream())
    try:
        with module.stream(stream):
            for _ in range(3):
                call()
        module.current_stream().wait_stream(stream)
        graph = module.CUDAGraph()
        with module.graph(graph):
            call()
    except Exception:
        synchronize()
        _leave_capture()
        return None
    graph.replay()
    synchronize()
    return _with_events(graph.replay, samples)


def _leave_capture() -> None:
    """A capture that failed leaves the device's random generator in it, where it would refuse to make the next case."""
    generators = getattr(_module(), "default_generators", ())
    if generators and hasattr(torch.Generator, "graphsafe_set_state"):
        fresh = torch.Generator(device=device())
        generators[_module().current_device()].graphsafe_set_state(fresh.graphsafe_get_state())


def _with_events(call, samples: int) -> Timing:
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device=device())  # 256 MiB: several times the L2
    events = [tuple(_module().Event(enable_timing=True) for _ in range(2)) for _ in range(samples)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    synchronize()
    return Timing.of([start.elapsed_time(end) for start, end in events])


def host_us(call: Callable[[], object], samples: int = SAMPLES) -> float | None:
    """Microseconds until the call returns, the device idle before it: what launching costs. None on a CPU."""
    if not _has_events():
        return None
    taken = []
    for _ in range(samples):
        synchronize()
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e6)
    synchronize()
    return round(statistics.median(taken), 1)


def peak_extra_mib(call: Callable[[], object]) -> float:
    """Peak memory of one call beyond what was in use before it."""
    call()
    synchronize()
    meter = Meter(device())
    call()
    synchronize()
    return meter.peak() / 2**20


def ceilings(samples: int = SAMPLES) -> dict[str, object]:
    """What this device can do: copy bandwidth in TB/s (bytes read plus written), GEMM in TFLOP/s on random data.

    On an accelerator in bf16, with the clocks while it works; on a CPU in fp32 and small.
    """
    on_cpu = not _has_events()
    n, size, dtype = (2**24, 512, torch.float32) if on_cpu else (2**30, 8192, torch.bfloat16)
    x = torch.randn(n, dtype=dtype, device=device())
    y = torch.empty_like(x)
    copy = 2 * x.numel() * x.element_size() / time_call(lambda: y.copy_(x), samples).median / 1e9
    a, b = (torch.randn(size, size, dtype=dtype, device=device()) for _ in range(2))
    gemm = 2 * size**3 / time_call(lambda: a @ b, samples).median / 1e9
    found: dict[str, object] = {"copy_TB_s": float(f"{copy:.4g}"), "gemm_TFLOP_s": float(f"{gemm:.4g}")}
    if not on_cpu:
        found["clocks_under_load"] = _clocks_while(lambda: a @ b)
    return found


_QUERY = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit,driver_version", "--format=csv,noheader"]


def _clocks_while(work: Callable[[], object]) -> str:
    try:
        reading = subprocess.Popen(_QUERY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return ""
    until = time.monotonic() + 20
    while reading.poll() is None and time.monotonic() < until:
        for _ in range(20):
            work()
        synchronize()
    reading.kill()
    return (reading.communicate()[0] or "").strip()


def shell(*command: str) -> str:
    """What a command prints; nothing where there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def card() -> str:
    """The device's name."""
    named = getattr(_module(), "get_device_name", None)
    return named() if named else platform.processor() or platform.machine()


def surroundings() -> dict[str, object]:
    """Card, clocks, versions and commit: what a number means nothing without."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    here = str(Path(__file__).parent)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "card": card(),
        "clocks_power_driver": shell(*_QUERY),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "version": __version__,
        "commit": os.environ.get("LIGER_BENCH_COMMIT") or shell("git", "-C", here, "rev-parse", "--short", "HEAD"),
    }


def path_for(name: str, folder: Path, suffix: str = ".json") -> Path:
    """FOLDER/name-card-date.suffix; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [w for w in card().lower().split() if any(c.isdigit() for c in w)]
    return folder / f"{name}-{words[0] if words else device().type}-{datetime.date.today().isoformat()}{suffix}"


def save(path: Path, rows: list[dict], extra: dict | None = None) -> Path:
    """Write rows with their surroundings to `path`."""
    text = json.dumps({**surroundings(), **(extra or {}), "rows": rows}, indent=1, default=_plain)
    beside = path.with_suffix(".part")
    beside.write_text(text + "\n")
    beside.replace(path)
    return path


def _plain(value):
    return asdict(value) if isinstance(value, Timing) else str(value)
