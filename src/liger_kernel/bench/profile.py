"""Where the time and the peak memory of a training step go."""

from __future__ import annotations

import collections
from collections.abc import Callable

import torch

from liger_kernel.bench import measure

ROWS = 30
OURS = "liger_kernel"


def of(step: Callable[[], object]) -> list[str]:
    """Lines of text: kernels by the time they take, the device's idle time, and who owns memory at the peak."""
    step()
    return [*_time(step), "", *_memory(step)]


def _time(step) -> list[str]:
    from torch.profiler import ProfilerActivity, profile

    on_cpu = measure.device().type == "cpu"
    activities = [ProfilerActivity.CPU] if on_cpu else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as taken:
        step()
        measure.synchronize()
    if on_cpu:
        events = [(e.key, e.count, e.self_cpu_time_total) for e in taken.key_averages()]
    else:
        kernels: dict[str, list[float]] = collections.defaultdict(list)
        for e in taken.events():
            if e.device_type != torch.autograd.DeviceType.CPU and not getattr(e, "is_user_annotation", False):
                kernels[e.name].append(e.time_range.elapsed_us())
        events = [(name, len(times), sum(times)) for name, times in kernels.items()]
    events.sort(key=lambda e: -e[2])
    total = sum(time for *_, time in events)
    lines = [f"{total / 1000:9.2f} ms busy in {sum(n for _, n, _ in events)} kernels of one step"]
    lines += [f"{time / 1000:9.2f} ms {time / total:5.1%} {n:5} x {name[:110]}" for name, n, time in events[:ROWS]]
    rest = events[ROWS:]
    return [*lines, f"{sum(t for *_, t in rest) / 1000:9.2f} ms in {sum(n for _, n, _ in rest)} others"]


def _memory(step) -> list[str]:
    """Each allocation that is alive when most is, by the line of ours or of the model that made it."""
    module = torch.get_device_module(measure.device())
    if not hasattr(module, "memory"):
        return ["no allocator to ask for memory on this device"]
    module.memory._record_memory_history(max_entries=1_000_000, stacks="python")
    before = module.memory_allocated()
    try:
        step()
        snapshot = module.memory._snapshot()
    finally:
        module.memory._record_memory_history(enabled=None)
    events = max(snapshot["device_traces"], key=len)
    peak, alive = _alive_at_peak(events)
    owners: dict[str, list[int]] = collections.defaultdict(list)
    for size, frames in alive.values():
        owners[_owner(frames)].append(size)
    lines = [f"{(before + peak) / 2**30:9.2f} GiB at the peak, {before / 2**30:.2f} of it before the step"]
    for owner, sizes in sorted(owners.items(), key=lambda item: -sum(item[1]))[:ROWS]:
        lines.append(f"{sum(sizes) / 2**20:9.0f} MiB {len(sizes):5} x {owner}")
    return lines


def _alive_at_peak(events) -> tuple[int, dict]:
    """(bytes above the start, address -> (size, frames)) when the sum of what the events allocated is highest."""
    now, most, at = 0, 0, -1
    for i, event in enumerate(events):
        if event["action"] == "alloc":
            now += event["size"]
        elif event["action"] == "free_completed":
            now -= event["size"]
        if now > most:
            most, at = now, i
    alive: dict[int, tuple] = {}
    for event in events[: at + 1]:
        if event["action"] == "alloc":
            alive[event["addr"]] = event["size"], event["frames"]
        elif event["action"] == "free_completed":
            alive.pop(event["addr"], None)
    return most, alive


def _owner(frames) -> str:
    """The innermost line of ours, else of the model, else the innermost of all; backward passes have no Python."""
    named = [f for f in frames if f["filename"] not in ("??", "")]
    for part in (f"{OURS}/ops", f"{OURS}/transformers", "transformers/models", "torch/optim", ""):
        for frame in named:
            if part in frame["filename"] and f"{OURS}/bench" not in frame["filename"]:
                name = "/".join(frame["filename"].split("/")[-2:])
                return f"{name}:{frame['line']} {frame['name']}"
    return "autograd's backward"
