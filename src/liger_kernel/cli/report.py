"""What the two runs say: a heading, a table, one sentence."""

from __future__ import annotations

import statistics

import torch
from rich import box
from rich.table import Table

from liger_kernel.cli.train import Job, Result

MISSING = "out of memory"


def heading(job: Job, title: str, result: Result | None) -> str:
    size = f", {result.parameters / 1e6:.1f} M parameters" if result else ""
    threads = f" ({torch.get_num_threads()} threads)" if job.device == "cpu" else ""
    return (
        f"{title}{size}, {job.dtype}, {job.batch} x {job.seq} tokens per step, {job.steps} steps "
        f"on {job.device}{threads}"
    )


def tokens_per_second(result: Result, tokens: int) -> float:
    return tokens / statistics.median(settled(result.seconds))


def settled(seconds: list[float]) -> list[float]:
    """The steps after warm-up: the first ones compile kernels and allocate the optimizer's state."""
    return seconds[min(3, len(seconds) // 2) :]


def loss_difference(a: Result, b: Result) -> float:
    """Largest difference of any one step's loss."""
    return max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))


def table(plain: Result | None, patched: Result | None, tokens: int) -> Table:
    some = plain or patched
    compared = nothing_patched(patched) is None
    memory = some.memory if some else "allocated"
    made = Table(box=box.SIMPLE_HEAD)
    made.add_column("")
    for name in ("transformers", "liger_kernel", "change"):
        made.add_column(name, justify="right")
    for name, value, show in (
        ("tokens per second", lambda r: tokens_per_second(r, tokens), lambda v: f"{v:,.0f}"),
        (f"peak memory ({memory})", lambda r: r.peak, size),
        ("memory of the loss head", lambda r: r.head, size),
        ("final loss", lambda r: r.losses[-1], lambda v: f"{v:.5f}"),
    ):
        values = [None if r is None else value(r) for r in (plain, patched)]
        shown = [MISSING if r is None else "-" if v is None else show(v) for r, v in zip((plain, patched), values)]
        made.add_row(name, *shown, change(*values) if compared and name != "final loss" else "")
    if plain and patched:
        made.add_row("largest loss difference", "", "", f"{loss_difference(plain, patched):.1e}")
        made.add_row("modules patched", "", str(patched.modules), "")
    return made


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def change(before: float | None, after: float | None) -> str:
    return f"{100 * (after / before - 1):+.0f} %" if before and after is not None else ""


def nothing_patched(patched: Result | None) -> str | None:
    """Why the run with liger_kernel ran none of its kernels; None where it ran some, or did not finish."""
    return None if patched is None or patched.modules else patched.left


def sentence(plain: Result | None, patched: Result | None, tokens: int, device: str) -> str:
    """What this machine gained, or lost, in one sentence."""
    if (why := nothing_patched(patched)) is not None:
        return f"Nothing was patched, so both runs are the same training and there is nothing to compare: {why}."
    if plain is None:
        if patched is not None:
            fits = f"with liger_kernel the same training fits in {size(patched.peak)}"
            return f"transformers alone is out of memory here; {fits}."
        return "Both runs were out of memory, so there is nothing to compare: lower --batch or --seq."
    if patched is None:
        return "With liger_kernel the run was out of memory where transformers alone was not: please report this."
    speed = tokens_per_second(patched, tokens) / tokens_per_second(plain, tokens)
    pace = "at the same speed" if abs(speed - 1) < 0.02 else f"at {speed:.2f} times the speed"
    memory = f"{_less(plain.peak, patched.peak)} memory"
    head = ""
    if plain.head and patched.head is not None:
        head = f" ({_less(plain.head, patched.head)} in the loss head)"
    return (
        f"On this {device} liger_kernel trained with {memory}{head} {pace}, "
        f"and no loss differed by more than {loss_difference(plain, patched):.1e}."
    )


def _less(before: float, after: float) -> str:
    part = round(100 * (1 - after / before))
    return f"{abs(part)} % {'less' if part > 0 else 'more'}" if part else "as much"
